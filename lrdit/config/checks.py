"""Checks of a config field's value; each one's `str` documents it.

Like the schema, the module imports neither numpy nor jax.
"""

import dataclasses
import functools
import importlib
import itertools
from collections.abc import Callable
from typing import Any

from lrdit.runtime.errors import UserError
from lrdit.runtime.paths import local_path

MOST = 2**31 - 1  # steps, examples and sizes are counted in int32


def require(condition: bool, field: str, value: Any, rule: str) -> None:
  """Raise a UserError that names the field, its value and the rule, unless it is met."""
  if not condition:
    raise UserError(f"config.{field}={value!r} {rule}")


@dataclasses.dataclass(frozen=True)
class Whole:
  """A whole number in [low, high]."""

  low: int = 1
  high: int = MOST
  kind = int

  def check(self, field: str, value: Any, otherwise: str) -> None:
    """Raise a UserError unless the value fits; `otherwise` names what else does."""
    require(type(value) is int, field, value, f"must be a whole number{otherwise}")
    bound = str(self) if value < self.low or self.high < MOST else f"at most {self.high}"
    require(self.low <= value <= self.high, field, value, f"must be {bound}{otherwise}")

  def __str__(self) -> str:
    return f"at least {self.low}" if self.high == MOST else f"in [{self.low}, {self.high}]"


@dataclasses.dataclass(frozen=True)
class Number:
  """A number in an interval such as "(0, 1]"; NaN lies in none."""

  interval: str
  kind = float

  def check(self, field: str, value: Any, otherwise: str) -> None:
    """As `Whole.check`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    require(is_number, field, value, f"must be a number{otherwise}")
    low, high = map(float, self.interval[1:-1].split(","))
    above = low < value if self.interval[0] == "(" else low <= value
    below = value < high if self.interval[-1] == ")" else value <= high
    require(above and below, field, value, f"must lie in {self.interval}{otherwise}")

  def __str__(self) -> str:
    return f"in {self.interval}"


class Choice:
  """One of a few words."""

  kind = str

  def __init__(self, *words: str, names: str = ""):
    """Take the words, and those of a constant of a lower package.

    Args:
      *words: words of the schema's own.
      names: "package.module.CONSTANT" below lrdit, imported when the words are first needed.
    """
    self._own, self._names = words, names

  @functools.cached_property
  def words(self) -> tuple[str, ...]:
    """All allowed words."""
    module, _, constant = self._names.rpartition(".")
    found = getattr(importlib.import_module(f"lrdit.{module}"), constant) if module else ()
    return (*found, *self._own)

  def check(self, field: str, value: Any, otherwise: str) -> None:
    """As `Whole.check`."""
    known = ", ".join(self.words)
    require(value in self.words, field, value, f"is unknown: use one of {known}{otherwise}")

  def __str__(self) -> str:
    return ", ".join(f"`{word}`" for word in self.words)


class Several(Choice):
  """A tuple of words, each one of a few."""

  def check(self, field: str, value: Any, otherwise: str) -> None:
    """As `Whole.check`."""
    for word in value:
      rule = f"has {word!r}, which is unknown: use some of {', '.join(self.words)}{otherwise}"
      require(word in self.words, field, value, rule)

  def __str__(self) -> str:
    return f"some of {super().__str__()}"


class LocalPath:
  """A path on this machine, or ""."""

  kind = str

  def check(self, field: str, value: Any, otherwise: str) -> None:
    """As `Whole.check`."""
    local_path(f"config.{field}", value)

  def __str__(self) -> str:
    return "a path"


@dataclasses.dataclass(frozen=True)
class Rising:
  """A tuple of rising whole numbers from `low` on, of one of the `lengths` if there are any."""

  low: int = 1
  lengths: tuple[int, ...] = ()
  kind = tuple

  def check(self, field: str, value: Any, otherwise: str) -> None:
    """As `Whole.check`."""
    whole = all(type(x) is int and self.low <= x <= MOST for x in value)
    rises = whole and all(x < y for x, y in itertools.pairwise(value))
    fits = not self.lengths or len(value) in self.lengths
    require(rises and fits, field, value, f"must be {self}{otherwise}")

  def __str__(self) -> str:
    count = f"{' or '.join(map(str, self.lengths))} " if self.lengths else ""
    return f"{count}rising numbers from {self.low} up to {MOST}"


@dataclasses.dataclass(frozen=True)
class Rule:
  """What a predicate accepts, in words that follow "must be"."""

  accepts: Callable[[Any], bool]
  words: str

  def check(self, field: str, value: Any, otherwise: str) -> None:
    """As `Whole.check`."""
    require(self.accepts(value), field, value, f"must be {self.words}{otherwise}")

  def __str__(self) -> str:
    return self.words
