"""The claim: adaptive keeps the full arm's quality at fewer MACs and beats arms of equal MACs."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from lrdit.report.arms import Arm
from lrdit.report.compare import ROUNDING, Comparison, Difference


@dataclasses.dataclass(frozen=True)
class Target:
  """What an adaptive arm must reach against a baseline."""

  against: str  # the baseline's method
  key: str  # of the row, without an extractor's name
  label: str
  worst: float  # how much worse than the baseline the arm may be, in % of a ratio or in points
  words: str  # the same in words


_LOSS = ("held_out_loss_ema", "held-out loss, EMA weights")
_DISTANCE = ("frechet_distance", "Frechet distance")
TARGETS = (
  Target("full", *_LOSS, 3.0, "at most 3 % more"),
  Target("full", "recognition_accuracy", "recognition accuracy", 2.0, "at most 2 points less"),
  *(Target(arm, *row, 0.0, "less") for arm in ("narrow", "static") for row in (_LOSS, _DISTANCE)),
)


@dataclasses.dataclass
class Check:
  """One target of an adaptive arm, for one extractor and way of sampling."""

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
    checks = [check for target in TARGETS for check in _checks(own.get(target.against), target)]
    claims.append(Claim(number, also, checks))
  return claims


def _checks(comparison: Comparison | None, target: Target) -> Iterator[Check]:
  """Yield a check for each row that the target is about, or one unmeasured check."""
  rows = comparison.rows if comparison else []
  macs = next((row.value for row in rows if row.key == "mean_forward_macs"), None)
  found = [row for row in rows if target.key in (row.key, row.key.partition("_")[2])]
  for row in found:
    yield judge_difference(row, target, macs)
  if not found:
    missing = f"there is no pair of adaptive and {target.against}"
    reason = "no such metric" if comparison else missing
    yield Check(target.against, target.key, target.label, target.words, macs, reason=reason)


def judge_difference(row: Difference, target: Target, macs_ratio: float | None = None) -> Check:
  """Return the check of a target on a measured difference."""
  check = Check(target.against, row.key, row.label, target.words, macs_ratio, row.settings)
  value, error = row.value, row.standard_error
  if value is None:
    return dataclasses.replace(check, reason=row.missing)
  if row.compare == "ratio":  # losses and distances
    value, unit, sign = 100 * (value - 1), "%", 1
    error = None if error is None else 100 * error
    better = sum(one < 1 for one in row.by_seed)
  else:
    unit, sign, better = "points", -1, sum(one > 0 for one in row.by_seed)
  worse, rounding = sign * value, 100 * ROUNDING
  kept = worse < target.worst + rounding if target.worst else worse < -rounding
  missed = max(0, round(worse - target.worst, 9))
  side = "adaptive" if worse < 0 else target.against
  return dataclasses.replace(
    check,
    outcome="kept" if kept else f"missed by {missed:.3g} {unit}",
    value=value,
    standard_error=error,
    unit=unit,
    better="neither" if abs(worse) <= rounding else side,
    verdict=row.verdict,
    better_seeds=f"{better} of {len(row.by_seed)}",
  )
