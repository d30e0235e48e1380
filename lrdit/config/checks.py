"""Checks of a config field's value, with wording that errors and the documentation share.

Like the schema, the module imports neither numpy nor jax.
"""

import dataclasses
import functools
import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from lrdit.runtime.errors import UserError

INT32_MAX = 2**31 - 1  # the largest step, number of examples or size


def require(condition: bool, field: str, value: Any, rule: str) -> None:
  """Raise a UserError that names the field, its value and the rule, unless the condition holds."""
  if not condition:
    raise UserError(f"config.{field}={value!r} {rule}")


@dataclasses.dataclass(frozen=True)
class Check:
  """The values that a field may have."""

  accepts: Callable[[Any], bool]
  words: Callable[[], str]  # completes "must be ..."
  kind: type = str  # the field's type where its default is None


def rule(accepts: Callable[[Any], bool], words: str) -> Check:
  """Return a check that is a predicate."""
  return Check(accepts, lambda: words)


def whole(low: int = 1, high: int = INT32_MAX) -> Check:
  """Return the check for a whole number."""
  words = f"a whole number from {low} to {'2**31 - 1' if high == INT32_MAX else high}"
  return Check(lambda value: type(value) is int and low <= value <= high, lambda: words, int)


def number(interval: str) -> Check:
  """Return the check for a finite number in an interval such as "(0, 1]"."""
  low, high = map(float, interval[1:-1].split(","))

  def accepts(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
      return False
    above = low < value if interval[0] == "(" else low <= value
    return above and (value < high if interval[-1] == ")" else value <= high)

  return Check(accepts, lambda: f"a number in {interval}", float)


@functools.cache
def _words(own: tuple[str, ...], names: str) -> Sequence[str]:
  module, _, constant = names.rpartition(".")
  found = getattr(importlib.import_module(f"lrdit.{module}"), constant) if module else ()
  return (*found, *own)


def choice(*own: str, names: str = "") -> Check:
  """Return the check for one of a few words: `own` and those in `names`.

  `names` is a "package.module.CONSTANT" below lrdit, imported when the field is first checked.
  """
  words = functools.partial(_words, own, names)
  return Check(lambda value: value in words(), lambda: f"one of {', '.join(words())}")


def several(*own: str, names: str = "") -> Check:
  """Return the check for a tuple of words, each as in `choice`."""
  words = functools.partial(_words, own, names)
  return Check(lambda value: set(value) <= {*words()}, lambda: f"some of {', '.join(words())}")


def rising(low: int) -> Check:
  """Return the check for rising whole numbers from `low`."""

  def accepts(value: Any) -> bool:
    fits = all(whole(low).accepts(x) for x in value)
    return fits and all(x < y for x, y in itertools.pairwise(value))

  return Check(accepts, lambda: f"rising numbers from {low} to 2**31 - 1")


def span(low: int) -> Check:
  """Return the check for () or (first, last), both included, of whole numbers from `low`."""

  def accepts(value: Any) -> bool:
    fits = len(value) in (0, 2) and all(whole(low).accepts(x) for x in value)
    return fits and list(value) == sorted(value)

  return Check(accepts, lambda: f"() or (first, last), {low} <= first <= last <= 2**31 - 1")


# The check for a file or directory; `Field.check` also checks the path itself.
PATH = rule(lambda value: isinstance(value, str), "a path on this machine, or empty")
