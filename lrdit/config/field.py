"""What a config field is: its default, meaning, allowed values and role."""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

from lrdit.config.checks import PATH, Check, require
from lrdit.runtime.paths import local_path


class Role(enum.Enum):
  """Whether a field may change once a run has begun."""

  RUN = "defines the run"
  TUNABLE = "may change while training"
  PROCESS = "choice of the process"
  WATCH = "watches only"
  SAMPLES = "defines a sample set"
  FREE = "free"


@dataclasses.dataclass(frozen=True)
class Field:
  """One field of the config."""

  default: Any
  meaning: str
  allowed: Check | None = None  # None where the default's type is the only limit
  none: str = ""  # what None stands for; "" where the field may not be None
  role: Role | None = None  # None for the role of its group

  def _fits(self, value: Any) -> bool:
    if self.allowed is None:
      kinds = (tuple, list) if isinstance(self.default, tuple) else type(self.default)
      return isinstance(value, kinds)
    try:
      return bool(self.allowed.accepts(value))
    except TypeError:  # a config.json may hold any value
      return False

  def check(self, name: str, value: Any) -> None:
    """Raise a UserError unless the field may have this value."""
    if not (self.none and value is None):
      kind = type(self.default)
      words = self.allowed.words() if self.allowed else f"of type {kind.__name__}"
      rule = f"must be {words}" + (f", or None ({self.none})" if self.none else "")
      require(self._fits(value), name, value, rule)
    if self.allowed is PATH:
      local_path(f"config.{name}", value)


def group(name: str, role: Role) -> Callable[..., dict[str, Field]]:
  """Return a function that names the fields of a group and gives them the group's role."""
  prefix = f"{name}." if name else ""

  def fields_by_name(**fields: Field) -> dict[str, Field]:
    return {prefix + k: dataclasses.replace(f, role=f.role or role) for k, f in fields.items()}

  return fields_by_name
