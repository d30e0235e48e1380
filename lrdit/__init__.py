"""Timestep-adaptive low-rank diffusion transformers; names are imported at their first use."""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {"open_run": "lrdit.run", "Run": "lrdit.run", "LowRankDense": "lrdit.model.low_rank"}


def __getattr__(name: str) -> Any:
  if name not in _HOMES:
    raise AttributeError(f"module 'lrdit' has no attribute {name!r}")
  return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
  return sorted([*globals(), *_HOMES])
