"""What is measured of every kept checkpoint of a run, against its step.

`rank_curves` returns the fields of `steps/ranks.json`:
  steps: ascending, S of them.
  groups: [[first, last]], the timesteps of each of G groups.
  weights, gradients: {kind: {measure: (S, G)}}, normalised ranks averaged over the kind's layers;
    of the gradients on data, at the largest batch size.
  overlap: {kind: {side: {between, within: (S,), random}}}, the mean `cross_half` of
    `gradient_spectra` over pairs of different groups, within a group, and of random subspaces.
Sections that were not analyzed are left out.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lrdit.analysis.gradient_spectra import SIDES
from lrdit.analysis.spectra import MEASURES
from lrdit.analysis.weight_spectra import mean_tables
from lrdit.runtime import cluster, store
from lrdit.train import run_files

SECTIONS = ("weights", "gradients")  # of an analysis, that are followed over the steps


def measure_kept(
  workdir: pathlib.Path, measure: Callable[[str], None], files: Sequence[str]
) -> tuple[list[int], list[list[dict[str, Any]]]]:
  """Measure every kept checkpoint; return (steps, the JSON that was written of each).

  `measure` takes a step as text and writes `files` below its directory. The steps ascend. Processes
  other than the first get no JSON.
  """
  steps = run_files.kept_steps(workdir)
  for step in steps:
    measure(str(step))
  if not cluster.is_first():
    return steps, []
  outputs = [run_files.choose_checkpoint(workdir, str(step)).output for step in steps]
  fix = "delete it to measure again"
  return steps, [[store.read_json(output / name, fix) for name in files] for output in outputs]


def rank_curves(steps: Sequence[int], sections: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
  """Return the curves of the module's docstring from each section's JSON of every step."""
  first = next(iter(sections.values()))[0]
  groups = [[group["t_first"], group["t_last"]] for group in first["groups"]]
  curves: dict[str, Any] = {"steps": list(steps), "groups": groups}
  if weights := sections.get("weights"):
    curves["weights"] = _by_kind([_weights_by_group(found) for found in weights])
  if gradients := sections.get("gradients"):
    curves["gradients"] = _by_kind([_gradients_by_group(found) for found in gradients])
    curves["overlap"] = _overlap_curves([found["overlap"]["data"]["kinds"] for found in gradients])
  return curves


def _weights_by_group(found: Mapping[str, Any]) -> dict[str, Any]:
  return {kind: entry["groups"] for kind, entry in found["kinds"].items()}


def _gradients_by_group(found: Mapping[str, Any]) -> dict[str, Any]:
  kinds = found["conditions"]["data"]["kinds"]
  return {kind: [sizes[-1] for sizes in by_group] for kind, by_group in kinds.items()}


def _by_kind(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Return {kind: {measure: (S, G)}} from each step's measures by kind and group."""
  return {
    kind: {m: [[group[m] for group in found[kind]] for found in steps] for m in MEASURES}
    for kind in steps[0]
  }


def _overlap_curves(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  curves: dict[str, Any] = {}
  for kind, first in steps[0].items():
    sides = curves[kind] = {}
    for side in SIDES:
      tables = [found[kind]["cross_half"][side] for found in steps]
      same = np.eye(len(tables[0]), dtype=bool)
      sides[side] = {
        "between": [_mean(table, ~same) for table in tables],
        "within": [_mean(table, same) for table in tables],
        "random": first[f"random_{side}"],
      }
  return curves


def _mean(table: Sequence[Sequence[float | None]], chosen: np.ndarray) -> float | None:
  """Return the mean of the chosen entries that are known, or None."""
  return mean_tables([table[i][j] for i, j in zip(*np.nonzero(chosen), strict=True)] or [None])
