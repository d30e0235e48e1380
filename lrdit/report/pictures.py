"""Grids of the arms' samples, and the path of one sample.

Axes: n samples, H W image.
"""

import base64
import dataclasses
import io
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from lrdit.data import images
from lrdit.report.arms import Arm
from lrdit.report.fields import describe_difference, differing_fields
from lrdit.report.runs import DAMAGED, Run, SampleSet, as_dict
from lrdit.runtime.errors import UserError
from lrdit.runtime.store import parse_json
from lrdit.sampling import sample_set

GRID_COLUMNS = 10
MAX_SAMPLES = 40  # in each arm's grid
MAX_PIXELS = 1 << 19  # in each arm's grid, unless one row has more


@dataclasses.dataclass
class Path:
  """The predicted clean images on the path to sample 0, from path.json and path.png."""

  label: int | None
  steps: list[int]  # solver steps, from 0
  timesteps: list[int]
  ranks: dict[str, list[int]]  # active ranks at these steps, by factorized layer
  image: str  # data URL


@dataclasses.dataclass
class Grid:
  """The first samples of one of an arm's sample sets."""

  arm: int
  workdir: str
  sample_set: str
  settings: dict[str, Any]  # of sampling, with seed and checkpoint step
  labels: list[int] | None
  pixels: UInt8[np.ndarray, "n H W 3"]
  image: str = ""  # data URL
  size: tuple[int, int] = (0, 0)  # width and height of the image
  path: Path | None = None
  differs: str = ""  # how settings or labels differ from the first grid


def choose_grids(arms: Sequence[Arm]) -> list[Grid]:
  """Return a grid for each arm with samples, from the set most like the first grid's.

  All grids show the same number of samples. An unreadable set becomes a note.
  """
  grids: list[Grid] = []
  for number, arm in enumerate(arms):
    sets = ((run, *own) for run in arm.runs for own in run.sample_sets.items())
    found = [(run, name, _grid_settings(own)) for run, name, own in sets]
    if grids:
      found.sort(key=lambda item: len(differing_fields(grids[0].settings, item[2])))
    else:
      found.sort(key=lambda item: item[1] != "default")
    readable = (grid for item in found if (grid := _read_grid(number, *item)))
    grids += itertools.islice(readable, 1)
  if not grids:
    return []
  area = max(grid.pixels[0, ..., 0].size for grid in grids)
  fitting = max(1, MAX_PIXELS // area // GRID_COLUMNS) * GRID_COLUMNS
  count = min(fitting, *(len(grid.pixels) for grid in grids))
  for grid in grids:
    grid.labels = grid.labels and grid.labels[:count]
    tiles = images.make_grid(grid.pixels[:count], GRID_COLUMNS)
    grid.image, grid.size = _data_url(tiles), (tiles.shape[1], tiles.shape[0])
    differs = [describe_difference(grids[0].settings, grid.settings)]
    differs.append("other labels" if grid.labels != grids[0].labels else "")
    grid.differs = "; ".join(filter(None, differs))
  return grids


def _grid_settings(own: SampleSet) -> dict[str, Any]:
  settings = {field: value for field, value in own.settings.items() if field != "num_samples"}
  more = ("seed", "checkpoint_step")
  return settings | {f: own.metadata[f] for f in more if f in own.metadata}


def _read_grid(arm: int, run: Run, name: str, settings: dict[str, Any]) -> Grid | None:
  directory = pathlib.Path(run.workdir).expanduser() / "samples" / name
  try:
    _, batches = sample_set.read_sample_set(directory, MAX_SAMPLES)
    pixels, labels = next(batches)
  except (UserError, OSError, StopIteration) as error:
    run.notes.append(f"the samples {name!r} cannot be shown: {error or 'there are none'}")
    return None
  labels = None if labels is None else [int(label) for label in labels]
  grid = Grid(arm, run.workdir, name, settings, labels, pixels)
  try:
    grid.path = _read_path(directory)
  except DAMAGED as error:
    run.notes.append(f"the path of the samples {name!r} is damaged: {error}")
  return grid


def _read_path(directory: pathlib.Path) -> Path | None:
  if not (directory / "path.json").exists():
    return None
  stored = parse_json((directory / "path.json").read_bytes())
  steps, timesteps = (list(map(int, stored[field])) for field in ("steps", "timesteps"))
  with Image.open(directory / "path.png") as file:
    image = _data_url(np.asarray(file.convert("RGB")))
  return Path(stored["label"], steps, timesteps, as_dict(stored["ranks"]), image)


def _data_url(pixels: UInt8[np.ndarray, "H W 3"]) -> str:
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, format="PNG")
  return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
