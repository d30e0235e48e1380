"""An analysis' files: finished units of work, kept until their section is whole."""

import json
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from lrdit.runtime.workdir import atomic_path, remove_directory, write_json

RECORD = "record.json"  # of a unit, beside its arrays


class Parts:
  """The finished units of one section, a file each: what is there is not done again."""

  def __init__(self, directory: pathlib.Path, key: dict[str, Any]):
    """Opens the directory, and empties it if it is of something else.

    Args:
      directory: of the section; made where there is none.
      key: as JSON, all that the units depend on.
    """
    self.directory, path = directory, directory / "key.json"
    key = json.loads(json.dumps(key))
    try:
      same = json.loads(path.read_text()) == key
    except (FileNotFoundError, ValueError):
      same = False
    if not same:
      remove_directory(directory)
      directory.mkdir(parents=True)
      write_json(path, key)

  def _path(self, unit: str) -> pathlib.Path:
    return self.directory / f"{unit.replace('/', '.')}.npz"

  def load(self, unit: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """(record, arrays) of a finished unit, or None.

    Args:
      unit: its name.
    """
    try:
      # Opened here, as numpy leaves the file of a damaged archive open.
      with self._path(unit).open("rb") as file, np.load(file) as arrays:
        loaded = {name: arrays[name] for name in arrays.files}
      return json.loads(bytes(loaded.pop(RECORD))), loaded
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
      return None  # missing, or damaged: it is made again

  def save(
    self, unit: str, record: dict[str, Any], arrays: Mapping[str, np.ndarray] | None = None
  ) -> None:
    """Keeps a unit, whole or not at all.

    Args:
      unit: its name, which files may bear once '/' is replaced.
      record: as JSON.
      arrays: what does not belong into JSON, by name.
    """
    text = np.frombuffer(json.dumps(record).encode(), np.uint8)
    with atomic_path(self._path(unit)) as temporary, temporary.open("wb") as file:
      np.savez(file, **{RECORD: text}, **(arrays or {}))
      file.flush()
      os.fsync(file.fileno())

  def remove(self) -> None:
    """Deletes all units, once the section's own file is written."""
    remove_directory(self.directory)
    if self.directory.parent.exists() and not any(self.directory.parent.iterdir()):
      self.directory.parent.rmdir()
