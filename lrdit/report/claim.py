"""The claim: adaptive keeps the full arm's quality at fewer MACs, and beats the static control."""

from collections.abc import Iterator, Sequence
from typing import Any

from lrdit.report.compare import ROUNDING

# (baseline, key of the row or its end behind an extractor's name, label, worst that keeps it:
# how much worse than the baseline, in % of a ratio or in points; the target in words).
CHECKS = (
  ("full", "held_out_loss_ema", "held-out loss, EMA weights", 3.0, "at most 3 % more"),
  ("full", "recognition_accuracy", "recognition accuracy", 2.0, "at most 2 points less"),
  ("static", "held_out_loss_ema", "held-out loss, EMA weights", 0.0, "less"),
  ("static", "frechet_distance", "Frechet distance", 0.0, "less"),
)


def judge(
  arms: Sequence[dict[str, Any]], comparisons: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
  """The checks of each adaptive arm, or of none where there is none.

  Args:
    arms: of `report.group_arms`.
    comparisons: of `report_compare.compare`.

  Returns:
    of each adaptive arm: "arm" (its number, or None), "also" (by baseline, what
    else its config differs in) and "checks". A check has "against" (method),
    "key", "label", "settings" (of samples, else None), "target", "macs_ratio"
    (arm / baseline, or None) and "outcome": "kept", "missed by ..." or "not
    measured", with the "reason". A measured one has "value" (arm above
    baseline, in "unit": % or points), "standard_error" (None of one seed),
    "better" (a method, or "neither") and "verdict" (against the seeds' spread).
  """
  numbers: list[int | None] = [i for i, arm in enumerate(arms) if arm["method"] == "adaptive"]
  judged = []
  for number in numbers or [None]:
    own = {arms[c["baseline"]]["method"]: c for c in comparisons if c["arm"] == number}
    checks = [check for described in CHECKS for check in _checks(own.get(described[0]), *described)]
    also = {method: compared["also"] for method, compared in own.items()}
    judged.append({"arm": number, "also": also, "checks": checks})
  return judged


def _checks(
  compared: dict[str, Any] | None, against: str, key: str, label: str, worst: float, target: str
) -> Iterator[dict[str, Any]]:
  """One check for each extractor and way of sampling; one that is not measured if there is none."""
  rows = compared["rows"] if compared else []
  macs = next((row.get("value") for row in rows if row["key"] == "mean_forward_macs"), None)
  check = {"against": against, "key": key, "label": label, "settings": None, "target": target}
  check["macs_ratio"] = macs
  found = [row for row in rows if key in (row["key"], row["key"].partition("_")[2])]
  for row in found:
    told = {"key": row["key"], "settings": row.get("settings")}
    if row["section"] == "Samples":  # where the label names the extractor
      told["label"] = row["label"]
    yield check | told | _outcome(row, against, worst)
  if not found:
    reason = "no such figure" if compared else f"there is no pair of adaptive and {against}"
    yield check | {"outcome": "not measured", "reason": reason}


def _outcome(row: dict[str, Any], against: str, worst: float) -> dict[str, Any]:
  if "missing" in row:
    return {"outcome": "not measured", "reason": row["missing"]}
  is_ratio = row["compare"] == "ratio"
  value, error = row["value"], row["standard_error"]
  if is_ratio:
    value, error = 100 * (value - 1), None if error is None else 100 * error
  worse, unit = (value, "%") if is_ratio else (-value, "points")  # losses and distances are ratios
  is_better, is_worse = worse < -100 * ROUNDING, worse > 100 * ROUNDING
  kept = worse < worst + 100 * ROUNDING if worst else is_better
  side = "adaptive" if is_better else against
  return {
    "value": value,
    "standard_error": error,
    "unit": unit,
    "outcome": "kept" if kept else f"missed by {max(0, round(worse - worst, 9)):.3g} {unit}",
    "better": side if is_better or is_worse else "neither",
    "verdict": row["verdict"],
  }
