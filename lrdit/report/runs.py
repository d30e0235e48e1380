"""What a workdir holds, as a report needs it; a missing piece becomes a note.

Axes: N samples, H W image.
"""

import json
import math
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict

from lrdit.config import run_config
from lrdit.config.resolve import resolve
from lrdit.config.schema import Role, fields_of, upgrade
from lrdit.experiment import Experiment
from lrdit.model import dit, flops
from lrdit.rank import plan as rank_schedule
from lrdit.runtime.errors import UserError
from lrdit.runtime.store import flatten
from lrdit.sampling import sample_set

# Whatever a damaged or older file of a workdir can raise when it is read.
DAMAGED = (ValueError, KeyError, TypeError, AttributeError, OSError)

# What an export's figures depend on besides the weights' training and the seed.
SETTINGS = (
  "weights",
  "num_samples",
  "solver",
  "num_steps",
  "eta",
  "guidance_scale",
  "clip_x_0",
  "labels",
  "dtype",
)


# What a run may change, and is another arm's if it does.
DEFINING = ("training.num_steps", "model.dtype")


def finite(value: Any) -> int | float | None:
  """A finite number, or None."""
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  return value if is_number and math.isfinite(value) else None


def _tuples(value: Any) -> Any:
  """JSON's lists as the tuples that configs have."""
  if isinstance(value, dict):
    return {key: _tuples(item) for key, item in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _read_object(path: pathlib.Path, notes: list[str]) -> dict[str, Any] | None:
  """A JSON object; None and a note where it is missing or damaged."""
  try:
    value = json.loads(path.read_text(), parse_constant=lambda _name: None)  # NaN is missing
    if isinstance(value, dict):
      return value
    notes.append(f"{path.name} is damaged: it is no JSON object")
  except FileNotFoundError:
    notes.append(f"there is no {path.name}")
  except DAMAGED as error:
    notes.append(f"{path.name} is damaged ({error})")
  return None


def read_config(path: pathlib.Path) -> dict[str, Any]:
  """The config.json of a workdir.

  Raises:
    UserError: it is missing or damaged: the directory is no workdir.
  """
  notes: list[str] = []
  config = _read_object(path / "config.json", notes)
  if config is None:
    raise UserError(
      f"{path} is not the workdir of a run ({notes[0]}): name directories that --mode=train wrote "
      "in --workdirs"
    )
  return upgrade(config)


def read_metrics(path: pathlib.Path, notes: list[str]) -> list[dict[str, float | None]]:
  """The lines of metrics.jsonl in order of `step`; a torn last line is left out."""
  lines: list[dict[str, float | None]] = []
  try:
    for line in (path / "metrics.jsonl").read_text().splitlines():
      scalars = {key: finite(value) for key, value in json.loads(line).items()}
      if scalars["step"] is None:
        raise ValueError("a line without a step")
      lines.append(scalars)
  except FileNotFoundError:
    notes.append("there is no metrics.jsonl")
  except DAMAGED:
    notes.append(f"metrics.jsonl is damaged after {len(lines)} lines, which are shown")
  return lines


def training_speed(
  metrics: list[dict[str, float | None]], batch_size: int
) -> dict[str, float | int | None]:
  """How fast a run trained, and for how long.

  Seconds of a window of steps are its images over its images/s, so compilation,
  evaluation, grids, checkpoints and interruptions are not among them. Windows
  without a speed are taken to have had the mean of the others.

  Args:
    metrics: lines of metrics.jsonl.
    batch_size: images a step.

  Returns:
    "images_per_second" and "seconds" (None where no window was timed), and
    "images".
  """
  images = timed_images = seconds = before = 0
  for line in metrics:
    if line.get("train/loss") is None:  # a line of evaluation alone
      continue
    window, before = (line["step"] - before) * batch_size, line["step"]
    images += window
    if rate := line.get("train/images_per_second"):
      timed_images += window
      seconds += window / rate
  if not timed_images:
    return {"images": images, "images_per_second": None, "seconds": None}
  rate = timed_images / seconds
  return {"images": images, "images_per_second": rate, "seconds": images / rate}


def _read_exports(
  path: pathlib.Path, evaluation: dict[str, Any], notes: list[str]
) -> dict[str, dict[str, Any]]:
  """Metadata of each export by name, and "figures" and the like where it was evaluated."""
  exports = {}
  for file in sorted((path / "samples").glob("*/metadata.json")):
    metadata = _read_object(file, notes)
    if metadata is not None:
      exports[file.parent.name] = {"metadata": metadata}
  if not exports:
    notes.append("there is no finished export of samples")
  samples = evaluation.get("samples")
  for name, evaluated in (samples if isinstance(samples, dict) else {}).items():
    if not (isinstance(evaluated, dict) and isinstance(evaluated.get("metadata"), dict)):
      notes.append(f"evaluation.json has no export {name!r} of the known layout: evaluate again")
      continue
    drawn = exports.setdefault(name, {"metadata": evaluated["metadata"]})
    if drawn["metadata"] != evaluated["metadata"]:
      notes.append(
        f"the export {name!r} was drawn again after its evaluation, whose figures are not shown"
      )
      continue
    for part in ("figures", "extractors", "reference"):
      drawn[part] = evaluated[part] if isinstance(evaluated.get(part), dict) else {}
  return exports


def _drop_damaged_groups(evaluation: dict[str, Any] | None, notes: list[str]) -> None:
  """Leaves the timestep groups that can be placed on an axis; a note tells of others."""
  losses = (evaluation or {}).get("held_out")
  for weights in ("raw", "ema"):
    own = losses.get(weights) if isinstance(losses, dict) else None
    if not isinstance(own, dict) or "groups" not in own:
      continue
    groups = own["groups"] if isinstance(own["groups"], list) else [None]
    own["groups"] = [group for group in groups if _is_group(group)]
    if damaged := len(groups) - len(own["groups"]):
      notes.append(
        f"evaluation.json: {damaged} of {len(groups)} timestep groups ({weights} weights) are "
        "damaged and left out: evaluate again"
      )


def _is_group(group: Any) -> bool:
  if not isinstance(group, dict):
    return False
  return all(finite(group.get(field)) is not None for field in ("t_first", "t_last"))


def describe_model(config: dict[str, Any], notes: list[str]) -> dict[str, Any] | None:
  """Sizes, MACs and ranks of a stored config's model; None and a note if it does not fit."""
  try:
    resolved = resolve(ConfigDict(_tuples(config)))
    shape, plan = Experiment(resolved).shape, Experiment(resolved).plan
  except (UserError, *DAMAGED) as error:
    notes.append(f"config.json does not fit this version of lrdit ({error})")
    return None
  ranks = _describe_ranks(shape, plan)
  return {
    "parameters": flops.num_parameters(shape, plan),
    "mean_forward_macs": flops.mean_forward_macs(shape, plan),
    "mean_ratio": ranks["mean_ratio"],
    "buckets": flops.describe_buckets(shape, plan),
    "rank": ranks,
  }


def sampling_macs(config: dict[str, Any], settings: dict[str, Any]) -> int | None:
  """MACs of drawing one image of a stored config's model; None where they cannot be known.

  Args:
    config: as in config.json.
    settings: of an export: "solver", "num_steps", "eta" and "guidance_scale" count.
  """
  drawn = ConfigDict(_tuples(config))
  try:
    for field in ("solver", "num_steps", "eta", "guidance_scale"):
      drawn.sampling[field] = settings[field]
    resolved = resolve(drawn)
    return flops.sampling_macs(
      Experiment(resolved).shape,
      Experiment(resolved).plan,
      Experiment(resolved).solver_table.t,
      batch_size=1,
      guidance_scale=resolved.sampling.guidance_scale,
    )
  except (UserError, *DAMAGED):
    return None  # describe_model's notes tell of a config that does not fit


def _describe_ranks(shape: dit.DiTShape, plan: rank_schedule.RankPlan) -> dict[str, Any]:
  """Active ranks by bucket of every layer, and the factors' share of the dense kernels.

  A dense layer has one rank, the largest that its kernel can have.
  """
  shapes = dit.layer_shapes(shape)
  dense = sum(math.prod(shapes[name]) for name, _ in plan.layers)

  def share(bucket: int) -> float:
    active = sum(ranks.active[bucket] * sum(shapes[name]) for name, ranks in plan.layers)
    return active / dense if dense else 1.0

  ratio = [share(bucket) for bucket in range(plan.num_buckets)]
  return {
    "num_train_timesteps": plan.num_train_timesteps,
    "segments": [list(segment) for segment in plan.segments],
    "factorised": [name for name, _ in plan.layers],
    "active_rank": {
      name: list(plan.by_name[name].active if name in plan.by_name else [min(dims)] * len(ratio))
      for name, dims in shapes.items()
    },
    "ratio": ratio,
    "mean_ratio": float(np.asarray(ratio)[plan.bucket_of_timestep].mean()),
  }


def read_run(name: str) -> dict[str, Any]:
  """Everything a report shows of one workdir.

  Args:
    name: the workdir as the user wrote it.

  Returns:
    "workdir", "config", "seed", "data" (what data.json holds), "changes" (of its
    config on the way), "step" (the newest that is known), "num_steps", "metrics", "speed",
    "evaluation" (or None), "exports" and "notes" on what is missing.

  Raises:
    UserError: it is no workdir.
  """
  path, notes = pathlib.Path(name).expanduser(), []
  config = read_config(path)
  metrics = read_metrics(path, notes)
  evaluation = _read_object(path / "evaluation.json", notes)
  exports = _read_exports(path, evaluation or {}, notes)
  if evaluation and not isinstance(evaluation.get("held_out"), dict):
    notes.append("evaluation.json has no held_out losses of the known layout: evaluate again")
  _drop_damaged_groups(evaluation, notes)
  data = _read_object(path / "data.json", [])
  training = config.get("training")
  training = training if isinstance(training, dict) else {}
  changes = run_config.read_changes(path)
  for change in changes:
    notes.append(
      f"from step {change['step']} on {change['field']} is {change['after']!r}, and was "
      f"{change['before']!r}"
    )
  steps = [int(p.name) for p in (path / "checkpoints").glob("[0-9]*") if p.name.isdigit()]
  step = max([int(line["step"]) for line in metrics[-1:]] + steps, default=0)
  num_steps = finite(training.get("num_steps"))
  if num_steps and step < num_steps:
    notes.append(f"unfinished: at step {step} of {num_steps}")
  return {
    "workdir": name,
    "config": config,
    "seed": config.get("seed"),
    "data": data,
    "changes": changes,
    "step": step,
    "num_steps": num_steps,
    "metrics": metrics,
    "speed": training_speed(metrics, finite(training.get("batch_size")) or 0),
    "evaluation": evaluation,
    "exports": exports,
    "notes": notes,
  }


def run_key(run: dict[str, Any]) -> dict[str, Any]:
  """What makes a run another arm: flat config fields that define it, all but its seed.

  Fields that a mode may change in a workdir (paths, sampling, how often is
  logged) do not, but the number of training steps, the dtype and changes on the way do.
  """
  free = fields_of(Role.PROCESS, Role.WATCH, Role.FREE) - set(DEFINING) | {"seed"}
  kept = {field: value for field, value in flatten(run["config"]).items() if field not in free}
  for change in run["changes"]:
    if change["field"] not in free:
      name = f"changes.jsonl: {change['field']} at step {change['step']}"
      kept[name] = f"{change['before']} to {change['after']}"
  return kept | {f"data.json: {split}": value for split, value in (run["data"] or {}).items()}


def export_settings(run: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
  """What two exports must share so that their figures may be compared, the seed apart."""
  sampling = run["config"].get("sampling")
  fields = dict.fromkeys([*SETTINGS, *(sampling if isinstance(sampling, dict) else ())])
  left_out = ("seed", "name", "batch_size", "png_files")
  return {f: metadata[f] for f in fields if f in metadata and f not in left_out}


def read_samples(
  run: dict[str, Any], name: str, count: int
) -> tuple[UInt8[np.ndarray, "n H W 3"], Int[np.ndarray, " n"] | None] | None:
  """(first images, their labels or None) of an export; None and a note if damaged."""
  directory = pathlib.Path(run["workdir"]).expanduser() / "samples" / name
  try:
    _, batches = sample_set.read_sample_set(directory, count)
    return next(batches)
  except (UserError, OSError, StopIteration) as error:
    run["notes"].append(f"the export {name!r} cannot be shown: {error or 'it is empty'}")
    return None
