"""Files of an analysis: the rank truncation, and the finished units of a section under way."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from lrdit.runtime import store

RECORD = "record.json"  # of a unit, beside its arrays
FIX = "it is made again"


class UnitCache:
  """The finished units of one section, a file each, which a later start does not make again."""

  def __init__(self, directory: pathlib.Path, key: dict[str, Any]):
    """Open the directory, and empty it if it is of something else.

    Args:
      directory: of the section; made where there is none.
      key: as JSON, all that the units depend on.
    """
    self.directory, path = directory, directory / "key.json"
    try:
      store.check_same(f"{directory} is of something else", key, store.read_json(path, FIX), FIX)
    except store.StoreError:
      store.remove_directory(directory)
      directory.mkdir(parents=True)
      store.write_json(path, key)

  def _path(self, unit: str) -> pathlib.Path:
    return self.directory / f"{unit.replace('/', '.')}.npz"

  def load(self, unit: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Return (record, arrays) of a finished unit; None where it is missing or damaged."""
    path = self._path(unit)
    try:
      arrays = store.load_arrays(path, FIX)
      with store.damage_of(path, FIX):
        return json.loads(bytes(arrays.pop(RECORD))), arrays
    except store.StoreError:
      return None

  def save(
    self, unit: str, record: dict[str, Any], arrays: Mapping[str, np.ndarray] | None = None
  ) -> None:
    """Keep a unit, whole or not at all.

    Args:
      unit: its name, which must be a file's name once '/' is replaced.
      record: as JSON.
      arrays: what does not belong into JSON, by name.
    """
    text = np.frombuffer(json.dumps(record).encode(), np.uint8)
    store.save_arrays(self._path(unit), {RECORD: text} | dict(arrays or {}))

  def remove(self) -> None:
    """Delete all units, once the section's own file is written."""
    store.remove_directory(self.directory)
    if self.directory.parent.exists() and not any(self.directory.parent.iterdir()):
      self.directory.parent.rmdir()
