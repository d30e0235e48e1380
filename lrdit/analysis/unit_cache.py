"""A cache for the finished units of an analysis section, so that an interrupted run resumes."""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lrdit.runtime import store
from lrdit.runtime.progress import make_bar

RECORD = "record.json"  # a unit's JSON, stored beside its arrays
FIX = "it is made again"


class UnitCache:
  """The finished units of one section, one file each."""

  def __init__(self, directory: pathlib.Path, key: dict[str, Any]):
    """Open or make the directory, and empty it unless its key, as JSON, is the same."""
    self.directory, path = directory, directory / "key.json"
    try:
      stored = store.read_json(path, FIX)
      store.check_same(f"{directory} holds another analysis", key, stored, FIX)
    except store.StoreError:
      store.remove_directory(directory)
      directory.mkdir(parents=True)
      store.write_json(path, key)

  def _path(self, unit: str) -> pathlib.Path:
    return self.directory / f"{unit.replace('/', '.')}.npz"

  def load(self, unit: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Return a unit's (record, arrays), or None if it is missing or damaged."""
    path = self._path(unit)
    try:
      arrays = store.load_arrays(path, FIX)
      with store.damage_of(path, FIX):
        return store.parse_json(bytes(arrays.pop(RECORD))), arrays
    except store.StoreError:
      return None

  def save(
    self, unit: str, record: dict[str, Any], arrays: Mapping[str, np.ndarray] | None = None
  ) -> None:
    """Save a unit atomically: a JSON record, and arrays by name."""
    text = np.frombuffer(json.dumps(record).encode(), np.uint8)
    store.save_arrays(self._path(unit), {RECORD: text} | dict(arrays or {}))

  def fill(self, units: Sequence[str], noun: str, make: Callable[[str], tuple]) -> None:
    """Save `make(unit)`, a record and optional arrays, for each missing unit; show progress."""
    missing = [unit for unit in units if self.load(unit) is None]
    with make_bar(len(units), len(units) - len(missing), noun) as bar:
      for unit in missing:
        self.save(unit, *make(unit))
        bar.update()

  def remove(self) -> None:
    """Delete all units, after the section's own file has been written."""
    store.remove_directory(self.directory)
    if self.directory.parent.exists() and not any(self.directory.parent.iterdir()):
      self.directory.parent.rmdir()
