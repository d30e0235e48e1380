"""Means, spreads and comparisons of quantities over several runs.

A quantity is measured under a protocol, a dict of settings. Only values with equal protocols are
averaged or compared; the others are marked with the difference.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from lrdit.report.arms import Arm, deviation
from lrdit.report.fields import describe_difference, differing_fields, unique

BASELINES = ("full", "narrow", "static")
ROUNDING = 1e-9  # relative difference of means that rounding alone may cause


@dataclasses.dataclass
class Measurement:
  """One value of one run, perhaps measured on a sample set."""

  value: int | float
  workdir: str
  seed: Any
  protocol: dict[str, Any]
  sample_set: str | None = None
  sampling_seed: int | None = None


@dataclasses.dataclass
class Summary:
  """Mean and spread of an arm's n values with one protocol."""

  protocol: dict[str, Any]
  n: int
  num_runs: int
  mean: float
  std: float | None  # with n - 1 in the denominator; None for one value
  run_mean: float  # mean of the runs' means
  run_std: float | None  # None for one run
  values: list[Measurement]
  differs: str = ""  # how the protocol differs from the row's first summary


@dataclasses.dataclass
class Cell:
  """One quantity of one arm: an exact value, a summary for each protocol, or neither."""

  exact: Any = None
  summaries: list[Summary] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Quantity:
  """What a row of a table shows."""

  section: str
  key: str
  label: str
  format: str  # of `page.format_value`
  compare: str | None  # "ratio" (arm / baseline), "points" (100 times arm - baseline) or None
  settings: dict[str, Any] | None = None  # of the sample sets that it was measured on


@dataclasses.dataclass
class Row(Quantity):
  """One quantity of every arm."""

  cells: list[Cell] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Difference(Quantity):
  """One quantity of an arm against a baseline's."""

  value: float | None = None  # the ratio or the points
  standard_error: float | None = None  # of `by_seed` if seeds agree, else to first order, or None
  spread: float | None = None  # the larger of both arms' standard deviations over runs
  verdict: str = ""  # whether the difference is larger than the spread
  by_seed: list[float] = dataclasses.field(default_factory=list)  # `value` of each common seed
  missing: str = ""  # why there is no value


@dataclasses.dataclass
class Comparison:
  """An arm against a baseline, both by index."""

  arm: int
  baseline: int
  also: list[str]  # differing config fields beside the method and its ranks
  rows: list[Difference]


def summarize(measured: Iterable[Measurement]) -> Cell:
  """Return a cell with the summary of an arm's values for each protocol."""
  values, summaries = list(measured), []
  for protocol in unique(value.protocol for value in values):
    kept = [value for value in values if value.protocol == protocol]
    by_run: dict[str, list[float]] = {}
    for value in kept:
      by_run.setdefault(value.workdir, []).append(value.value)
    numbers, means = [value.value for value in kept], [*map(statistics.fmean, by_run.values())]
    spreads = [f(x) for x in (numbers, means) for f in (statistics.fmean, deviation)]
    summaries.append(Summary(protocol, len(numbers), len(means), *spreads, kept))
  return Cell(summaries=summaries)


def mark_protocols(row: Row) -> None:
  """Set every summary's `differs` by comparison with the row's first one."""
  summaries = [summary for cell in row.cells for summary in cell.summaries]
  for summary in summaries:
    summary.differs = describe_difference(summaries[0].protocol, summary.protocol)


def compare(arms: Sequence[Arm], rows: Sequence[Row]) -> list[Comparison]:
  """Compare every arm with one of each of `BASELINES`, and with the first arm of another method.

  An arm is compared with baselines before its own method. Among several arms of a baseline's method
  the one whose config differs least is taken.
  """
  pairs = []
  for i, method in enumerate(BASELINES):
    candidates = [number for number, arm in enumerate(arms) if arm.method == method]
    for number, arm in enumerate(arms):
      if candidates and arm.method not in BASELINES[: i + 1]:
        apart = {c: len(differing_fields(arms[c].key, arm.key)) for c in candidates}
        pairs.append((number, min(candidates, key=apart.get)))
  rest = [i for i, arm in enumerate(arms) if arm.method not in BASELINES]
  pairs += [(number, rest[0]) for number in rest[1:]]
  return [_compare_arms(arms, rows, *pair) for pair in pairs]


def _compare_arms(arms: Sequence[Arm], rows: Sequence[Row], arm: int, baseline: int) -> Comparison:
  apart = differing_fields(arms[baseline].key, arms[arm].key)
  also = [field for field in apart if field != "method" and not field.startswith("rank.")]
  compared = [row for row in rows if row.compare]
  differences = [compare_cells(row, row.cells[arm], row.cells[baseline]) for row in compared]
  return Comparison(arm, baseline, also, differences)


def compare_cells(quantity: Quantity, cell: Cell, baseline: Cell) -> Difference:
  """Compare the largest summaries with equal protocols."""
  fields = {field.name: getattr(quantity, field.name) for field in dataclasses.fields(Quantity)}
  difference = functools.partial(Difference, **fields)
  if cell.exact is not None and baseline.exact is not None:
    return difference(value=cell.exact / baseline.exact, verdict="exact")
  pairs = [(a, b) for a in cell.summaries for b in baseline.summaries]
  if not pairs:
    return difference(missing="not measured in both arms")
  equal = [(a, b) for a, b in pairs if a.protocol == b.protocol]
  if not equal:
    a, b = pairs[0]
    return difference(missing=f"not compared: {describe_difference(b.protocol, a.protocol)}")
  a, b = max(equal, key=lambda pair: pair[0].n + pair[1].n)
  if quantity.compare == "points":
    value, scales = 100 * (a.run_mean - b.run_mean), (100.0, 100.0)
  elif not b.run_mean:
    return difference(missing="the baseline's value is 0")
  else:  # d(a/b) = da/b - (a/b) db/b
    value = a.run_mean / b.run_mean
    scales = (1 / b.run_mean, value / b.run_mean)
  by_seed = _compare_seeds(a, b, quantity.compare)
  difference = functools.partial(difference, value=value, by_seed=by_seed)
  if a.run_std is None or b.run_std is None:
    return difference(verdict="one seed: no spread to judge by")
  errors = (
    scale * own.run_std / math.sqrt(own.num_runs) for scale, own in zip(scales, (a, b), strict=True)
  )
  spread = max(a.run_std, b.run_std)
  larger = abs(a.run_mean - b.run_mean) > spread + ROUNDING * abs(b.run_mean)
  verdict = f"{'larger than' if larger else 'within'} the seeds' spread"
  error = math.hypot(*errors)
  if len(by_seed) == a.num_runs == b.num_runs:
    error = deviation(by_seed) / math.sqrt(len(by_seed))
  return difference(standard_error=error, spread=spread, verdict=verdict)


def _compare_seeds(a: Summary, b: Summary, how: str) -> list[float]:
  """Return the ratio, or the difference in points, of the means of each seed of both arms."""
  means = []
  for values in (a.values, b.values):
    seeds = unique(value.seed for value in values)
    own = {seed: [v.value for v in values if v.seed == seed] for seed in seeds}
    means.append({seed: statistics.fmean(values) for seed, values in own.items()})
  pairs = [(mean, means[1][seed]) for seed, mean in means[0].items() if seed in means[1]]
  if how == "points":
    return [100 * (x - y) for x, y in pairs]
  return [x / y for x, y in pairs if y]
