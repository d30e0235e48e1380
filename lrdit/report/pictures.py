"""Samples of the arms side by side, and the path that one sample took.

Axes: n samples, H W image.
"""

import base64
import dataclasses
import io
import itertools
import json
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
from lrdit.sampling import sample_set

GRID_COLUMNS = 10
MAX_SAMPLES = 40  # of each arm's grid,
MAX_PIXELS = 1 << 19  # in at most so many pixels, but at least one row


@dataclasses.dataclass
class Path:
  """The clean images predicted on the way to sample 0, from path.json and path.png."""

  label: int | None
  steps: list[int]  # solver steps, from 0
  timesteps: list[int]
  ranks: dict[str, list[int]]  # active ranks of each factorised layer at these steps
  image: str  # data URL of the row of pictures


@dataclasses.dataclass
class Grid:
  """The first samples of one set of an arm."""

  arm: int
  workdir: str
  sample_set: str
  settings: dict[str, Any]  # how they were drawn, with seed and step
  labels: list[int] | None
  pixels: UInt8[np.ndarray, "n H W 3"]
  image: str = ""  # data URL
  size: tuple[int, int] = (0, 0)  # width and height of the image
  path: Path | None = None
  differs: str = ""  # how settings or labels differ from the first grid's


def choose_grids(arms: Sequence[Arm]) -> list[Grid]:
  """Return a grid of each arm that has samples, drawn as much alike as there are.

  All show the same number of samples. A set that cannot be read becomes a note.
  """
  grids: list[Grid] = []
  for number, arm in enumerate(arms):
    found = [
      (r, name, _grid_settings(own)) for r in arm.runs for name, own in r.sample_sets.items()
    ]
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
    other_labels = "other labels" if grid.labels != grids[0].labels else ""
    differs = describe_difference(grids[0].settings, grid.settings)
    grid.differs = "; ".join(filter(None, [differs, other_labels]))
  return grids


def _grid_settings(own: SampleSet) -> dict[str, Any]:
  """Return what two grids must share to show the same indices drawn alike."""
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
  """Return the path of a set of samples; None if there is none."""
  if not (directory / "path.json").exists():
    return None
  stored = json.loads((directory / "path.json").read_text())
  steps, timesteps = (list(map(int, stored[field])) for field in ("steps", "timesteps"))
  with Image.open(directory / "path.png") as file:
    image = _data_url(np.asarray(file.convert("RGB")))
  return Path(stored["label"], steps, timesteps, as_dict(stored["ranks"]), image)


def _data_url(pixels: UInt8[np.ndarray, "H W 3"]) -> str:
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, format="PNG")
  return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
