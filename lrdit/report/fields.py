"""Differences between configs and settings."""

from collections.abc import Iterable
from typing import Any

from lrdit.runtime.store import flatten

MAX_SHOWN = 16  # characters of a value


def unique(values: Iterable[Any]) -> list[Any]:
  """Return the distinct values in order; they need not be hashable."""
  kept: list[Any] = []
  for value in values:
    if value not in kept:
      kept.append(value)
  return kept


def differing_fields(*settings: dict[str, Any]) -> list[str]:
  """Return the sorted fields whose values differ between flat or nested dicts."""
  flat = [flatten(one) for one in settings]
  fields = sorted(set().union(*flat))
  return [field for field in fields if len(unique(one.get(field) for one in flat)) > 1]


def describe_difference(first: dict[str, Any], other: dict[str, Any]) -> str:
  """Return "FIELD OTHER'S VALUE, not FIRST'S" for each field that differs, or ""."""
  ours, theirs = flatten(other), flatten(first)

  def short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 4] + "…"

  return "; ".join(
    f"{field} {short(ours.get(field))}, not {short(theirs.get(field))}"
    for field in differing_fields(first, other)
  )
