"""A workdir's files as a report reads them; a missing or damaged piece becomes a note."""

import dataclasses
import math
import pathlib
from typing import Any

from lrdit.config import sample_settings
from lrdit.config.field import Role
from lrdit.config.run_config import Change, read_changes
from lrdit.config.schema import fields_of, upgrade
from lrdit.runtime.errors import UserError
from lrdit.runtime.paths import is_plain_name
from lrdit.runtime.store import DAMAGE, flatten, parse_json

# Exceptions from reading damaged or older files.
DAMAGED = (*DAMAGE, OSError)
# Fields that a run may change but that still define its arm.
DEFINING = ("training.num_steps", "model.dtype")


@dataclasses.dataclass
class SampleSet:
  """A finished sample set and its evaluation."""

  metadata: dict[str, Any]
  metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
  extractors: dict[str, Any] = dataclasses.field(default_factory=dict)
  reference: dict[str, Any] = dataclasses.field(default_factory=dict)
  settings: dict[str, Any] = dataclasses.field(init=False)  # metadata that comparable sets share

  def __post_init__(self):
    """Take the settings from the metadata: what affects metrics beside training and seed."""
    names = {*sample_settings.record_names(), "num_samples", "dtype"} - {"seed"}
    metadata = sample_settings.upgrade(self.metadata)
    self.settings = {name: value for name, value in metadata.items() if name in names}


@dataclasses.dataclass
class Run:
  """One workdir; `config`, `data` and `evaluation` are its JSON files, empty if missing."""

  workdir: str  # as given
  config: dict[str, Any]
  seed: Any
  data: dict[str, Any]
  changes: list[Change]  # of the config during training
  step: int  # the newest one known
  num_steps: int | float | None
  images: int  # used in training so far
  images_per_second: float | None  # None if no step was timed
  evaluation: dict[str, Any]
  sample_sets: dict[str, SampleSet]
  notes: list[str]  # what is missing, damaged or unfinished
  lines: list[dict[str, Any]]  # of metrics.jsonl
  curves: dict[str, tuple[list[int], list[float | None]]]  # (steps, losses) by the loss's name
  commands: list[str] = dataclasses.field(default_factory=list)  # that reproduce the workdir

  def held_out(self, weights: str) -> dict[str, Any]:
    """Return the held-out "loss" and "groups" of "ema" or "raw" weights, {} if not measured."""
    return as_dict(as_dict(self.evaluation.get("held_out")).get(weights))


def finite(value: Any) -> int | float | None:
  """Return the value if it is a finite number, else None."""
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  return value if is_number and math.isfinite(value) else None


def as_dict(value: Any) -> dict[str, Any]:
  """Return the value if it is a dict, else {}."""
  return value if isinstance(value, dict) else {}


def _read_object(path: pathlib.Path, notes: list[str]) -> dict[str, Any] | None:
  """Return a JSON object, or None, with a note, if the file is missing or damaged."""
  try:
    value = parse_json(path.read_bytes(), parse_constant=lambda _name: None)  # NaN is missing
    if isinstance(value, dict):
      return value
    notes.append(f"{path.name} is damaged: it is not a JSON object")
  except FileNotFoundError:
    notes.append(f"there is no {path.name}")
  except DAMAGED as error:
    notes.append(f"{path.name} is damaged ({error})")
  return None


def read_run(name: str) -> Run:
  """Read everything that a report shows of the workdir with this name.

  Raises:
    UserError: it has no readable config.json.
  """
  path, notes = pathlib.Path(name).expanduser(), []
  config = _read_object(path / "config.json", notes)
  if config is None:
    raise UserError(
      f"{path} is not the workdir of a run ({notes[0]}): name directories that --mode=train wrote "
      "in --workdirs"
    )
  lines = _read_lines(path, notes)
  evaluation = _read_object(path / "evaluation.json", notes) or {}
  _drop_damaged_groups(evaluation, notes)
  config = upgrade(config)
  sample_sets = _read_sample_sets(path, evaluation, notes)
  changes = read_changes(path)
  for change in changes:
    values = f"from {change.before!r} to {change.after!r}"
    notes.append(f"{change.field} changed {values} after step {change.step}")
  training = as_dict(config.get("training"))
  images, rate = training_speed(lines, finite(training.get("batch_size")) or 0)
  steps = [int(p.name) for p in (path / "checkpoints").glob("[0-9]*") if p.name.isdigit()]
  step = max([int(line["step"]) for line in lines[-1:]] + steps, default=0)
  num_steps = finite(training.get("num_steps"))
  if num_steps and step < num_steps:
    notes.append(f"unfinished: at step {step} of {num_steps}")
  curves = {}
  for loss in ("train/loss", "eval/loss"):
    own = [line for line in lines if loss in line]
    curves[loss] = ([line["step"] for line in own], [line[loss] for line in own])
  data, seed = _read_object(path / "data.json", []) or {}, config.get("seed")
  speed = (step, num_steps, images, rate)
  return Run(
    name, config, seed, data, changes, *speed, evaluation, sample_sets, notes, lines, curves
  )


def _read_lines(path: pathlib.Path, notes: list[str]) -> list[dict[str, Any]]:
  """Return the lines of metrics.jsonl before any damage, with None for non-finite numbers."""
  lines: list[dict[str, Any]] = []
  try:
    for line in (path / "metrics.jsonl").read_text().splitlines():
      scalars = {key: finite(value) for key, value in parse_json(line).items()}
      if scalars["step"] is None:
        raise ValueError("a line without a step")
      lines.append(scalars)
  except FileNotFoundError:
    notes.append("there is no metrics.jsonl")
  except DAMAGED:
    notes.append(f"metrics.jsonl is damaged after {len(lines)} lines; the report shows those")
  return lines


def training_speed(
  lines: list[dict[str, Any]], batch_size: int | float
) -> tuple[int, float | None]:
  """Return the number of training images, and their rate over the timed windows, or None.

  A window's seconds are its images over its images/s, which leaves out compilation, evaluation,
  grids, checkpoints and interruptions.
  """
  images = timed_images = seconds = before = 0
  for line in lines:
    if line.get("train/loss") is None:  # the line holds an evaluation only
      continue
    window, before = (line["step"] - before) * batch_size, line["step"]
    images += window
    if rate := line.get("train/images_per_second"):
      timed_images += window
      seconds += window / rate
  return images, timed_images / seconds if timed_images else None


def _read_sample_sets(
  path: pathlib.Path, evaluation: dict[str, Any], notes: list[str]
) -> dict[str, SampleSet]:
  found = {}
  for file in sorted((path / "samples").glob("*/metadata.json")):
    if (metadata := _read_object(file, notes)) is not None:
      found[file.parent.name] = SampleSet(metadata)
  if not found:
    notes.append("there is no finished set of samples")
  for name, evaluated in as_dict(evaluation.get("samples")).items():
    if not is_plain_name(name):
      notes.append(f"evaluation.json describes samples {name!r}, which no directory is named")
      continue
    metadata = as_dict(evaluated).get("metadata")
    if not isinstance(metadata, dict):
      notes.append(f"evaluation.json describes samples {name!r} in another format: evaluate again")
      continue
    own = found.setdefault(name, SampleSet(metadata))
    if own.metadata != metadata:
      notes.append(f"the samples {name!r} are newer than their metrics, which are not shown")
      continue
    parts = (as_dict(evaluated.get(part)) for part in ("figures", "extractors", "reference"))
    own.metrics, own.extractors, own.reference = parts
  return found


def _drop_damaged_groups(evaluation: dict[str, Any], notes: list[str]) -> None:
  """Drop timestep groups without valid bounds, with a note."""

  def is_valid(group: Any) -> bool:
    return None not in [finite(as_dict(group).get(end)) for end in ("t_first", "t_last")]

  if evaluation and not isinstance(evaluation.get("held_out"), dict):
    notes.append("evaluation.json describes held-out losses in another format: evaluate again")
  for weights, own in as_dict(evaluation.get("held_out")).items():
    if not (isinstance(own, dict) and "groups" in own):
      continue
    groups = own["groups"] if isinstance(own["groups"], list) else [None]
    own["groups"] = [group for group in groups if is_valid(group)]
    if damaged := len(groups) - len(own["groups"]):
      notes.append(
        f"evaluation.json: {damaged} of {len(groups)} timestep groups ({weights} weights) are "
        "damaged and left out: evaluate again"
      )


def run_key(run: Run) -> dict[str, Any]:
  """Return what the runs of one arm share: the flat config fields that define the run.

  They exclude the seed and fields that a workdir may change, such as paths, sampling and logging.
  They include the number of training steps, the dtype, and changes during training.
  """
  free = fields_of(*{*Role} - {Role.RUN, Role.TUNABLE}) - set(DEFINING) | {"seed"}
  kept = {field: value for field, value in flatten(run.config).items() if field not in free}
  for change in run.changes:
    if change.field not in free:
      name = f"changes.jsonl: {change.field} at step {change.step}"
      kept[name] = f"{change.before} to {change.after}"
  return kept | {f"data.json: {split}": value for split, value in run.data.items()}
