"""The claim: adaptive keeps the full arm's quality at fewer MACs and beats arms of equal MACs."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from lrdit.report.arms import Arm
from lrdit.report.compare import ROUNDING, Comparison, Difference

# (baseline, row key without an extractor's name, label, how much worse than the baseline the arm
# may be, in % of a ratio or in points, and that target in words).
CHECKS = (
  ("full", "held_out_loss_ema", "held-out loss, EMA weights", 3.0, "at most 3 % more"),
  ("full", "recognition_accuracy", "recognition accuracy", 2.0, "at most 2 points less"),
  ("narrow", "held_out_loss_ema", "held-out loss, EMA weights", 0.0, "less"),
  ("narrow", "frechet_distance", "Frechet distance", 0.0, "less"),
  ("static", "held_out_loss_ema", "held-out loss, EMA weights", 0.0, "less"),
  ("static", "frechet_distance", "Frechet distance", 0.0, "less"),
)


@dataclasses.dataclass
class Check:
  """One target of an adaptive arm."""

  against: str  # the baseline's method
  key: str
  label: str
  target: str
  macs_ratio: float | None  # forward MACs of the arm over the baseline's
  settings: dict[str, Any] | None = None  # of the sample set
  outcome: str = "not measured"  # or "kept", or "missed by ..."
  reason: str = ""  # why it is not measured
  value: float | None = None  # the arm's excess over the baseline, in `unit`
  standard_error: float | None = None  # None for one seed
  unit: str = ""  # "%" or "points"
  better: str = ""  # the better method, or "neither"
  verdict: str = ""  # compares the difference with the seeds' spread
  better_seeds: str = ""  # such as "3 of 3", of the seeds that both arms have


@dataclasses.dataclass
class Claim:
  """The checks of an adaptive arm."""

  arm: int | None  # its index; None without an adaptive arm
  also: dict[str, list[str]]  # other config fields that differ, by baseline
  checks: list[Check]


def judge(arms: Sequence[Arm], comparisons: Sequence[Comparison]) -> list[Claim]:
  """Check each adaptive arm, or return one unmeasured claim if there is none."""
  adaptive: list[int | None] = [i for i, arm in enumerate(arms) if arm.method == "adaptive"]
  claims = []
  for number in adaptive or [None]:
    own = {arms[c.baseline].method: c for c in comparisons if c.arm == number}
    also = {method: comparison.also for method, comparison in own.items()}
    checks = [check for target in CHECKS for check in _checks(own.get(target[0]), *target)]
    claims.append(Claim(number, also, checks))
  return claims


def _checks(
  comparison: Comparison | None, against: str, key: str, label: str, worst: float, target: str
) -> Iterator[Check]:
  """Yield a check for each extractor and way of sampling, or one unmeasured check."""
  rows = comparison.rows if comparison else []
  macs = next((row.value for row in rows if row.key == "mean_forward_macs"), None)
  found = [row for row in rows if key in (row.key, row.key.partition("_")[2])]
  for row in found:
    outcome = judge_difference(row, against, worst)
    yield Check(against, row.key, row.label, target, macs, row.settings, **outcome)
  if not found:
    reason = "no such metric" if comparison else f"there is no pair of adaptive and {against}"
    yield Check(against, key, label, target, macs, reason=reason)


def judge_difference(row: Difference, against: str, worst: float) -> dict[str, Any]:
  """Return the measured fields of a `Check`."""
  value, error, unit = row.value, row.standard_error, "points"
  if value is None:
    return {"reason": row.missing}
  worse = -value
  better = sum(one > 0 if row.compare == "points" else one < 1 for one in row.by_seed)
  if row.compare == "ratio":  # losses and distances
    value, error, unit = 100 * (value - 1), None if error is None else 100 * error, "%"
    worse = value
  is_better, is_worse = worse < -100 * ROUNDING, worse > 100 * ROUNDING
  kept = worse < worst + 100 * ROUNDING if worst else is_better
  side = "adaptive" if is_better else against
  return {
    "outcome": "kept" if kept else f"missed by {max(0, round(worse - worst, 9)):.3g} {unit}",
    "value": value,
    "standard_error": error,
    "unit": unit,
    "better": side if is_better or is_worse else "neither",
    "verdict": row.verdict,
    "better_seeds": f"{better} of {len(row.by_seed)}",
  }
