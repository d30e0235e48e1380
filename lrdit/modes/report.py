"""Compares workdirs in one page: arms, spread over seeds, what may not be compared.

Runs that differ in nothing but their seed are one arm. A figure is measured
under a protocol (a dict of settings); only figures of equal protocols are
averaged or compared, and every other one is marked with what differs.

Axes: N samples, H W image.
"""

import datetime
import importlib.metadata
import itertools
import logging
import math
import os
import pathlib
import platform
import shlex
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

from lrdit.report import claim, commands, compare
from lrdit.report import page as report_page
from lrdit.report import runs as report_runs
from lrdit.report.page import GRID_COLUMNS
from lrdit.report.runs import finite
from lrdit.runtime.errors import UserError
from lrdit.runtime.locks import owned
from lrdit.runtime.store import atomic_path, flatten, write_json

log = logging.getLogger("lrdit")

PACKAGES = ("lrdit", "jax", "flax", "numpy", "matplotlib")
MAX_IN_NAME = 24  # characters of a field's value in an arm's name, where others tell it apart
MAX_SAMPLES = 40  # of each arm's grid,
MAX_PIXELS = 1 << 19  # in at most so many pixels,
MIN_SAMPLES = GRID_COLUMNS  # but in no fewer samples
# Layers of a middle block whose r(t) is drawn, the first that an arm factorises.
DRAWN_LAYERS = ("mlp/fc1", "attn/qkv", "mlp/fc2", "adaln")
LAST_SHARE = 10  # the last tenth of a run's lines gives its training loss by timestep


def group_arms(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Runs that differ only in their seed, together, in order of appearance.

  Returns:
    arms: "name" (the method, and what else sets it apart from others of that
    method), "method", "key" (`report_runs.run_key`) and "runs" by seed.

  Raises:
    UserError: a run is named twice.
  """
  arms: list[dict[str, Any]] = []
  for run in runs:
    key = report_runs.run_key(run)
    arm = next((arm for arm in arms if arm["key"] == key), None)
    if arm is None:
      arms.append(arm := {"method": str(run["config"].get("method")), "key": key, "runs": []})
    same = [other["workdir"] for other in arm["runs"] if other["seed"] == run["seed"]]
    if same:
      raise UserError(
        f"{same[0]} and {run['workdir']} hold the same run (equal config and seed), which would "
        "count twice: leave one out of --workdirs"
      )
    arm["runs"].append(run)
  for arm in arms:
    arm["runs"].sort(key=_seed_order)
    alike = [other["key"] for other in arms if other["method"] == arm["method"]]
    own = ", ".join(f"{f.rpartition('.')[2]} {arm['key'].get(f)}" for f in _naming_fields(alike))
    arm["name"] = f"{arm['method']} ({own})" if own else arm["method"]
  return arms


def _naming_fields(keys: Sequence[dict[str, Any]]) -> list[str]:
  """Fields that tell arms apart; long ones (paths, measured ranks) only where no other does."""
  fields = compare.differing_fields(*keys)

  def longest(field: str) -> int:
    return max(len(str(key.get(field))) for key in keys)

  for field in sorted(fields, key=longest, reverse=True):
    rest = [other for other in fields if other != field]
    told = [[key.get(other) for other in rest] for key in keys]
    if longest(field) > MAX_IN_NAME and len(compare.unique(told)) == len(keys):
      fields = rest
  return fields


def _seed_order(run: dict[str, Any]) -> float:
  seed = finite(run["seed"])
  return math.inf if seed is None else seed  # a config without a seed comes last


def _measure(value: Any, run: dict[str, Any], protocol: dict[str, Any], **origin: Any) -> list:
  """One measurement, or none where the value is missing."""
  if (number := finite(value)) is None:
    return []
  return [
    {"value": number, "workdir": run["workdir"], "seed": run["seed"], "protocol": protocol} | origin
  ]


def _held_out_protocol(run: dict[str, Any]) -> dict[str, Any]:
  """What two held-out losses must share to be of one quantity."""
  evaluation = run["evaluation"]
  fields = ("data", "draws", "examples", "seed", "batch_size", "dtype")
  return {f"held_out.{field}": evaluation["held_out"].get(field) for field in fields} | {
    "checkpoint_step": evaluation.get("checkpoint_step"),
    "diffusion": run["config"].get("diffusion"),
  }


def held_out(run: dict[str, Any], weights: str) -> dict[str, Any]:
  """The held-out losses of "ema" or "raw" weights; empty where there are none."""
  losses = (run["evaluation"] or {}).get("held_out")
  own = losses.get(weights) if isinstance(losses, dict) else None
  return own if isinstance(own, dict) else {}


def _loss_measurements(run: dict[str, Any], weights: str) -> list:
  losses = held_out(run, weights)
  return _measure(losses["loss"], run, _held_out_protocol(run)) if "loss" in losses else []


def _final_loss(run: dict[str, Any]) -> list:
  lines = [line for line in run["metrics"] if line.get("train/loss") is not None]
  if not lines:
    return []
  window = lines[-1]["step"] - (lines[-2]["step"] if len(lines) > 1 else 0)
  protocol = {"step": lines[-1]["step"], "steps averaged": window}
  protocol["diffusion"] = run["config"].get("diffusion")
  return _measure(lines[-1]["train/loss"], run, protocol)


def _training_speed(run: dict[str, Any]) -> list:
  batch_size = flatten(run["config"]).get("training.batch_size")
  return _measure(run["speed"]["images_per_second"], run, {"batch_size": batch_size})


def _training_seconds(run: dict[str, Any]) -> list:
  return _measure(run["speed"]["seconds"], run, {"images": run["speed"]["images"]})


ROW = ("section", "key", "label", "format", "compare")
# What follows from an arm's shapes alone.
MODEL_ROWS = (
  ("Model", "parameters", "parameters", "count", None),
  ("Model", "mean_ratio", "active / dense parameters of factorised layers, mean", "ratio", None),
  ("Model", "mean_forward_macs", "MACs of a forward pass, mean over t", "macs", "ratio"),
  ("Model", "buckets", "each rank bucket: MACs of a forward pass, parameters", "buckets", None),
)
# What each run measured once, and how it is read.
RUN_ROWS = (
  (("Training", "training_images_per_second", "images/s", "rate", "ratio"), _training_speed),
  (("Training", "training_seconds", "time, steps only", "seconds", None), _training_seconds),
  (
    ("Loss", "held_out_loss_ema", "held-out, EMA weights", "loss", "ratio"),
    lambda run: _loss_measurements(run, "ema"),
  ),
  (
    ("Loss", "held_out_loss_raw", "held-out, raw weights", "loss", None),
    lambda run: _loss_measurements(run, "raw"),
  ),
  (("Loss", "final_training_loss", "training, last logged window", "loss", None), _final_loss),
)


def _row(described: Sequence[Any], cells: list[dict[str, Any]]) -> dict[str, Any]:
  return dict(zip(ROW, described, strict=True)) | {"cells": cells}


def _run_rows(arms: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  return [
    _row(row, [compare.summarise(map(measure, arm["runs"])) for arm in arms])
    for row, measure in RUN_ROWS
  ]


def _model_rows(arms: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  def cell(arm: dict[str, Any], key: str) -> dict[str, Any]:
    return {"exact": arm["model"][key]} if arm["model"] else {"groups": []}

  return [_row(row, [cell(arm, row[1]) for arm in arms]) for row in MODEL_ROWS]


def _export_protocol(run: dict[str, Any], drawn: dict[str, Any], figure: str) -> dict[str, Any]:
  """What must agree before one figure of two exports of equal settings is compared."""
  extractor = figure.partition("_")[0]
  used = drawn.get("extractors", {}).get(extractor)
  return {
    "checkpoint_step": drawn["metadata"].get("checkpoint_step"),
    "extractor digest": used.get("digest") if isinstance(used, dict) else None,
    "reference": drawn.get("reference"),
  }


def _sampling_speed(run: dict[str, Any], export: str, drawn: dict[str, Any]) -> list:
  metadata = drawn["metadata"]
  # Not num_samples: an export that was cut or went on drew more than it holds.
  count, seconds = finite(metadata.get("num_drawn")), finite(metadata.get("wall_clock_seconds"))
  protocol = {field: metadata.get(field) for field in ("backend", "num_devices", "jax")}
  protocol["compilation"] = "not counted" if "compile_seconds" in metadata else "counted"
  rate = count / seconds if count and seconds else None
  return _measure(rate, run, protocol, export=export, sampling_seed=metadata.get("seed"))


def _export_figure(run: dict[str, Any], export: str, drawn: dict[str, Any], figure: str) -> list:
  origin = {"export": export, "sampling_seed": drawn["metadata"].get("seed")}
  value = drawn.get("figures", {}).get(figure)
  return _measure(value, run, _export_protocol(run, drawn, figure), **origin)


def _exports(arm: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, dict[str, Any]]]:
  """(run, name of the export, the export) of every export of an arm."""
  return ((run, name, drawn) for run in arm["runs"] for name, drawn in run["exports"].items())


def _settings(run: dict[str, Any], drawn: dict[str, Any]) -> dict[str, Any]:
  return report_runs.export_settings(run, drawn["metadata"])


def _sample_rows(arms: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Rows of exports: a section for each way of drawing them, whatever the seed."""
  exports = [list(_exports(arm)) for arm in arms]
  rows = []
  for settings in compare.unique(
    _settings(run, drawn) for of_arm in exports for run, _, drawn in of_arm
  ):
    alike = [[e for e in of_arm if _settings(e[0], e[2]) == settings] for of_arm in exports]
    macs = [_macs_cell(of_arm, settings) for of_arm in alike]
    own = [_row(("Samples", "sampling_macs", "MACs of an image", "macs", "ratio"), macs)]
    rows += [row | {"settings": settings} for row in own + _rows_of_settings(alike)]
  return rows


def _macs_cell(exports: Sequence[tuple], settings: dict[str, Any]) -> dict[str, Any]:
  """What drawing an image so takes; missing in an arm that has no such export."""
  macs = report_runs.sampling_macs(exports[0][0]["config"], settings) if exports else None
  return {"groups": []} if macs is None else {"exact": macs}


def _rows_of_settings(exports: list[list[tuple]]) -> list[dict[str, Any]]:
  """Rows of the exports of each arm that were drawn alike: their speed, then their figures."""
  speed = ("sampling_images_per_second", "images/s, without compilation", "rate", "ratio")
  rows = [
    _row(
      ("Samples", *speed),
      [compare.summarise(_sampling_speed(*e) for e in of_arm) for of_arm in exports],
    )
  ]
  names = (drawn.get("figures", {}) for of_arm in exports for _, _, drawn in of_arm)
  for figure in dict.fromkeys(itertools.chain(*names)):
    cells = [compare.summarise(_export_figure(*e, figure) for e in of) for of in exports]
    rows.append(_row(("Samples", figure, *compare.describe(figure)), cells))
  return rows


def choose_layer(arms: Sequence[dict[str, Any]]) -> str:
  """The layer whose r(t) is drawn: one that the first low-rank arm factorises, or any."""
  models = [arm["model"]["rank"] for arm in arms if arm["model"]]
  if not models:
    return ""
  first = next((ranks for ranks in models if ranks["factorised"]), models[0])
  names = first["factorised"] or list(first["active_rank"])
  for end in DRAWN_LAYERS:
    if alike := [name for name in names if name.endswith(end)]:
      return alike[len(alike) // 2]
  return names[0]


def losses_by_timestep(arms: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Loss of each group of timesteps, mean and spread over each arm's runs.

  Returns:
    of each arm: "held_out" (EMA weights, of the runs that were measured like
    the first evaluated one of all arms) and "training" (last tenth of the
    metric lines): groups "t_first", "t_last", "mean", "std" (None of one run)
    and "n", ascending; and "left_out", {what differs: number of runs}.
  """
  evaluated = [run for arm in arms for run in arm["runs"] if held_out(run, "ema").get("groups")]
  protocol = _held_out_protocol(evaluated[0]) if evaluated else {}
  return [_losses_of_arm(arm["runs"], protocol) for arm in arms]


def _losses_of_arm(runs: Sequence[dict[str, Any]], protocol: dict[str, Any]) -> dict[str, Any]:
  held: list[tuple[int, int, float]] = []
  left_out: dict[str, int] = {}
  for run in runs:
    if not held_out(run, "ema").get("groups"):
      continue
    differs = compare.tell_difference(protocol, _held_out_protocol(run))
    if differs:
      left_out[differs] = left_out.get(differs, 0) + 1
    else:
      held += _held_out_groups(run)
  training = itertools.chain(*map(_training_groups, runs))
  means = {"held_out": _group_means(held), "training": _group_means(training)}
  return means | {"left_out": left_out}


def _held_out_groups(run: dict[str, Any]) -> list[tuple[int, int, float]]:
  """(t_first, t_last, loss) of the EMA weights; groups without examples are left out."""
  return [
    (group["t_first"], group["t_last"], group["loss"])
    for group in held_out(run, "ema")["groups"]
    if finite(group.get("loss")) is not None
  ]


def _training_groups(run: dict[str, Any]) -> list[tuple[int, int, float]]:
  """(t_first, t_last, mean training loss of the last lines) of the groups that were drawn."""
  last = run["metrics"][-max(1, len(run["metrics"]) // LAST_SHARE) :]
  names = sorted({key for line in last for key in line if key.startswith("train/loss_t")})
  groups = []
  for name in names:
    values = [line[name] for line in last if line.get(name) is not None]
    first, _, final = name.removeprefix("train/loss_t").partition("-")
    if values and first.isdigit() and final.isdigit():
      groups.append((int(first), int(final), statistics.fmean(values)))
  return groups


def _group_means(groups: Iterable[tuple[int, int, float]]) -> list[dict[str, Any]]:
  losses: dict[tuple[int, int], list[float]] = {}
  for first, last, loss in groups:
    losses.setdefault((first, last), []).append(loss)
  return [
    {"t_first": first, "t_last": last, "n": len(values), "mean": statistics.fmean(values)}
    | {"std": statistics.stdev(values) if len(values) > 1 else None}
    for (first, last), values in sorted(losses.items())
  ]


def curves(run: dict[str, Any]) -> dict[str, list[list[float | None]]]:
  """[[steps], [losses]] of "train/loss" and "eval/loss"; a loss that was not finite is None."""
  points = {}
  for name in ("train/loss", "eval/loss"):
    lines = [line for line in run["metrics"] if name in line]
    points[name] = [[line["step"] for line in lines], [line[name] for line in lines]]
  return points


def choose_grids(arms: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """An export of each arm, drawn as much alike as there are, and its first samples.

  Returns:
    of each arm that has one: "arm" (its number), "workdir", "export",
    "settings" (with the seed), "differs" (from the first arm's grid; "" where
    indices, labels, seed and settings agree), "labels" (or None) and "images".
  """
  grids: list[dict[str, Any]] = []
  for number, arm in enumerate(arms):
    drawn = [
      (run, name, _grid_settings(run, export["metadata"])) for run, name, export in _exports(arm)
    ]
    first = grids[0]["settings"] if grids else None
    if first is None:
      drawn.sort(key=lambda item: item[1] != "default")
    else:
      drawn.sort(key=lambda item: len(compare.differing_fields(first, item[2])))
    for run, name, settings in drawn:
      if (read := report_runs.read_samples(run, name, MAX_SAMPLES)) is not None:
        images, labels = read
        grids.append({"arm": number, "workdir": run["workdir"], "export": name})
        grids[-1] |= {"settings": settings, "images": images, "labels": labels}
        break
  return _cut_alike(grids)


def _grid_settings(run: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
  """What two grids must share to show the same indices drawn alike; not how many there are."""
  settings = report_runs.export_settings(run, metadata)
  settings.pop("num_samples", None)
  more = {f: metadata[f] for f in ("seed", "checkpoint_step") if f in metadata}
  return settings | more


def _cut_alike(grids: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """The same number of samples in each grid, and what differs from the first."""
  if not grids:
    return []
  area = max(int(np.prod(grid["images"].shape[1:3])) for grid in grids)
  fitting = max(MIN_SAMPLES, MAX_PIXELS // area // GRID_COLUMNS * GRID_COLUMNS)
  count = min(fitting, *(len(grid["images"]) for grid in grids))
  for grid in grids:
    labels = grid["labels"]
    grid["images"] = grid["images"][:count]
    grid["labels"] = None if labels is None else [int(label) for label in labels[:count]]
  for grid in grids:
    differs = compare.tell_difference(grids[0]["settings"], grid["settings"])
    if grid["labels"] != grids[0]["labels"]:
      differs = "; ".join(filter(None, [differs, "other labels"]))
    grid["differs"] = differs
  return grids


def versions() -> dict[str, str | None]:
  """Of Python and the packages that matter; None of one that is not installed."""
  found: dict[str, str | None] = {"python": platform.python_version()}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = None
  return found


def make_report(workdirs: Sequence[str], output: str) -> dict[str, Any]:
  """Everything the page shows.

  Args:
    workdirs: as the user wrote them.
    output: where the report goes; for the command it is made again by.

  Returns:
    "made" (command, time, versions), "claim" (of `report_claim.judge`), "arms",
    "rows", "comparisons" and "grids"; JSON but for the grids' "images".

  Raises:
    UserError: none or no workdirs, or one named twice.
  """
  runs = [report_runs.read_run(name) for name in workdirs]
  arms = group_arms(runs)
  for arm in arms:
    notes: list[str] = []
    arm["model"] = report_runs.describe_model(arm["runs"][0]["config"], notes)
    arm["runs"][0]["notes"].extend(notes)
  for arm, losses in zip(arms, losses_by_timestep(arms), strict=True):
    arm["loss_by_timestep"] = losses
  rows = [*_model_rows(arms), *_run_rows(arms), *_sample_rows(arms)]
  for row in rows:
    compare.mark_protocols(row)
  grids = choose_grids(arms)
  for run in runs:
    run["commands"] = commands.reproduce(run)
    run["curves"] = curves(run)
    del run["metrics"]
  comparisons = compare.compare(arms, rows)
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  names = flags.CsvListSerializer(",").serialize(list(workdirs))
  own = [f"--workdirs={names}", f"--output={output}"]
  command = shlex.join(["python", "main.py", "--mode=report", *own])
  return {
    "made": {"command": command, "time": now, "versions": versions()},
    "claim": claim.judge(arms, comparisons),
    "arms": arms,
    "layer": choose_layer(arms),
    "rows": rows,
    "comparisons": comparisons,
    "grids": grids,
  }


def report(workdirs: Sequence[str], output: str) -> None:
  """Runs `--mode=report`: writes report.html and report.json.

  Args:
    workdirs: of the runs to compare; those that differ only in their seed are
      one arm.
    output: directory for both files; made if it is not there.

  Raises:
    UserError: what is named is no workdir, or one run is named twice.
  """
  made = make_report(workdirs, output)
  page = report_page.render(made)
  directory = pathlib.Path(os.path.expanduser(output))
  directory.mkdir(parents=True, exist_ok=True)
  stored = [{k: v for k, v in grid.items() if k != "images"} for grid in made["grids"]]
  with owned(directory, "report", wait=True):
    with atomic_path(directory / "report.html") as temporary:
      temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    write_json(directory / "report.json", made | {"grids": stored})
  log.info("%d arms compared: %s", len(made["arms"]), directory / "report.html")
