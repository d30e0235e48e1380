"""Figures of several runs: mean and spread, what may be compared, and the comparison."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from lrdit.runtime.store import flatten

BASELINES = ("full", "static")
ROUNDING = 1e-9  # relative: means that are no further apart are equal but for rounding
# The last part of a figure's name: (label, format, how it is compared).
FIGURES = {
  "frechet_distance": ("Frechet distance", "loss", "ratio"),
  "kernel_distance": ("kernel distance", "loss", None),
  "kernel_distance_std": ("kernel distance, deviation over its subsets", "loss", None),
  "precision": ("precision", "share", None),
  "recall": ("recall", "share", None),
  "recognition_accuracy": ("recognition accuracy", "share", "points"),
  "recognition_accuracy_of_held_out_images": (
    "recognition accuracy of real held-out images",
    "share",
    None,
  ),
  "num_samples": ("images compared", "count", None),
  "num_subset_samples": ("images of kernel distance, precision and recall", "count", None),
}
# What is the same for every arm, and told once.
SHARED_FIGURES = ("recognition_accuracy_of_held_out_images", "num_samples", "num_subset_samples")


def describe(figure: str) -> tuple[str, str, str | None]:
  """(label, format, comparison) of a figure named EXTRACTOR_FIGURE.

  The label keeps the extractor; only a Frechet distance over Inception's
  features is the FID.
  """
  extractor, _, name = figure.partition("_")
  label, form, comparison = FIGURES.get(name, (name.replace("_", " "), "loss", None))
  if figure == "inception_frechet_distance":
    label = "FID"
  return f"{label} ({extractor})", form, comparison


def is_shared(row: dict[str, Any]) -> bool:
  """Whether a row tells how samples were measured and not how good an arm's are."""
  return row["section"] == "Samples" and row["key"].partition("_")[2] in SHARED_FIGURES


def unique(values: Iterable[Any]) -> list[Any]:
  """Values without repetitions, in order; they need no hash."""
  kept: list[Any] = []
  for value in values:
    if value not in kept:
      kept.append(value)
  return kept


def differing_fields(*settings: dict[str, Any]) -> list[str]:
  """Fields whose values are not the same in all of some flat or nested dicts, sorted."""
  flat = [flatten(one) for one in settings]
  fields = sorted(set().union(*flat))
  return [field for field in fields if len(unique(one.get(field) for one in flat)) > 1]


def tell_difference(first: dict[str, Any], other: dict[str, Any]) -> str:
  """ "field: this, not that" of every field that differs from the first; "" if none does."""
  mine, theirs = flatten(other), flatten(first)

  def short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 16 else text[:12] + "…"

  return "; ".join(
    f"{field} {short(mine.get(field))}, not {short(theirs.get(field))}"
    for field in differing_fields(first, other)
  )


def summarise(measured: Iterable[list[dict[str, Any]]]) -> dict[str, Any]:
  """Mean and spread of an arm's measurements of one quantity.

  Args:
    measured: lists of measurements: "value", "workdir", "protocol" and more.

  Returns:
    {"groups": [...]}, one for each protocol in order of appearance: "protocol",
    "n" values of "num_runs" runs, "mean", "std" (n-1 in the denominator; None
    of one value), "run_mean" and "run_std" (of the runs' means; None of one
    run) and "values".
  """
  values = [measurement for several in measured for measurement in several]
  groups = []
  for protocol in unique(value["protocol"] for value in values):
    kept = [
      {k: v for k, v in value.items() if k != "protocol"}
      for value in values
      if value["protocol"] == protocol
    ]
    numbers = [value["value"] for value in kept]
    of_run: dict[str, list[float]] = {}
    for value in kept:
      of_run.setdefault(value["workdir"], []).append(value["value"])
    run_means = [statistics.fmean(own) for own in of_run.values()]
    groups.append(
      {
        "protocol": protocol,
        "n": len(numbers),
        "num_runs": len(run_means),
        "mean": statistics.fmean(numbers),
        "std": _deviation(numbers),
        "run_mean": statistics.fmean(run_means),
        "run_std": _deviation(run_means),
        "values": kept,
      }
    )
  return {"groups": groups}


def _deviation(values: Sequence[float]) -> float | None:
  return statistics.stdev(values) if len(values) > 1 else None


def mark_protocols(row: dict[str, Any]) -> None:
  """Adds "differs" to the groups of a row that may not be compared with its first one."""
  groups = [group for cell in row["cells"] for group in cell.get("groups", ())]
  for group in groups:
    group["differs"] = tell_difference(groups[0]["protocol"], group["protocol"])


def compare(arms: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Each arm against the full one, the adaptive ones against the static and the first adaptive one.

  Of several full or static arms, each arm is compared with the one that shares most of its
  config.

  Returns:
    of each arm and baseline: "arm" and "baseline" (numbers of arms), "also"
    (fields that differ besides the method and its ranks) and "rows" as
    `compare_cells` gives, with the "key", "label", "section" and "format".
  """
  found = []
  for method in BASELINES:
    candidates = [i for i, arm in enumerate(arms) if arm["method"] == method]
    for number, arm in enumerate(arms):
      wanted = arm["method"] not in BASELINES[: BASELINES.index(method) + 1]
      if not candidates or not wanted:
        continue
      apart = {i: differing_fields(arms[i]["key"], arm["key"]) for i in candidates}
      nearest = min(candidates, key=lambda i: len(apart[i]))
      found.append(_compare_arms(arms, rows, number, nearest))
  rest = [i for i, arm in enumerate(arms) if arm["method"] not in BASELINES]
  return found + [_compare_arms(arms, rows, number, rest[0]) for number in rest[1:]]


def _compare_arms(
  arms: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], number: int, baseline: int
) -> dict[str, Any]:
  """One entry of `compare`."""
  apart = differing_fields(arms[baseline]["key"], arms[number]["key"])
  compared = [
    {k: row.get(k) for k in ("key", "label", "section", "settings", "compare")}
    | compare_cells(row["cells"][number], row["cells"][baseline], row["compare"])
    for row in rows
    if row["compare"]
  ]
  also = [f for f in apart if f != "method" and not f.startswith("rank.")]
  return {"arm": number, "baseline": baseline, "also": also, "rows": compared}


def compare_cells(cell: dict[str, Any], baseline: dict[str, Any], how: str) -> dict[str, Any]:
  """One quantity of an arm against the baseline's, under the same protocol.

  Args:
    cell: of the arm, {"exact": value} or {"groups": ...} of `summarise`.
    baseline: likewise.
    how: "ratio" (arm / baseline) or "points" (100 times arm - baseline).

  Returns:
    "value" with "standard_error" (None where either has one run; for a ratio to
    first order) and "verdict"; or "missing", the reason why there is no value.
  """
  if "exact" in cell and "exact" in baseline:
    value = cell["exact"] / baseline["exact"]
    return {"value": value, "standard_error": None, "verdict": "exact"}
  if not cell.get("groups") or not baseline.get("groups"):
    return {"missing": "not measured in both arms"}
  pairs = [(a, b) for a in cell["groups"] for b in baseline["groups"]]
  equal = [(a, b) for a, b in pairs if a["protocol"] == b["protocol"]]
  if not equal:
    a, b = pairs[0]
    difference = tell_difference(b["protocol"], a["protocol"])
    return {"missing": f"not compared: {difference}"}
  return _compare_groups(*max(equal, key=lambda pair: pair[0]["n"] + pair[1]["n"]), how)


def _compare_groups(a: dict[str, Any], b: dict[str, Any], how: str) -> dict[str, Any]:
  if how == "ratio" and not b["run_mean"]:
    return {"missing": "the baseline's value is 0"}
  ratio = a["run_mean"] / b["run_mean"] if how == "ratio" else None
  value = 100 * (a["run_mean"] - b["run_mean"]) if ratio is None else ratio
  if a["run_std"] is None or b["run_std"] is None:
    verdict = "one seed: no spread to judge by"
    return {"value": value, "standard_error": None, "verdict": verdict}
  # Of each mean: d(a/b) = da/b - (a/b) db/b.
  scales = (100.0, 100.0) if ratio is None else (1 / b["run_mean"], ratio / b["run_mean"])
  error = math.hypot(
    *(s * g["run_std"] / math.sqrt(g["num_runs"]) for s, g in zip(scales, (a, b), strict=True))
  )
  spread = max(a["run_std"], b["run_std"])
  difference = abs(a["run_mean"] - b["run_mean"])
  larger = difference > spread + ROUNDING * abs(b["run_mean"])
  verdict = f"{'larger than' if larger else 'within'} the seeds' spread"
  return {"value": value, "standard_error": error, "spread": spread, "verdict": verdict}
