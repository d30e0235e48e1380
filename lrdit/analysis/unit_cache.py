"""An analysis' files: finished units of work, kept until their section is whole."""

import json
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from lrdit.runtime.errors import UserError
from lrdit.runtime.workdir import atomic_path, has_begun, remove_directory, write_json

RECORD = "record.json"  # of a unit, beside its arrays


def read_truncation(path: str) -> dict[str, Any]:
  """What `--mode=analyze` found in the causal test.

  Raises:
    UserError: there is no such file, or it is something else or has gaps.
  """
  try:
    found = json.loads(pathlib.Path(path).expanduser().read_text())
    rise = _check_truncation(found)
    if np.isfinite(rise).all():
      return found
    cause = "has timestep groups without a measurement: raise config.evaluation.draws there"
    if any(None not in row for row in found["rise"]):
      cause = "has losses that are not finite: analyze an intact run"
  except (FileNotFoundError, IsADirectoryError):
    cause = "is not there: it is analysis/truncation.json of a workdir after --mode=analyze"
  except (ValueError, KeyError, TypeError):
    cause = "is not an analysis: give analysis/truncation.json of a workdir"
  raise UserError(f"config.rank.analysis={path!r} {cause}")


def _check_truncation(found: dict[str, Any]) -> np.ndarray:
  """(K, G) rises, NaN for what was not measured.

  Raises:
    ValueError, KeyError, TypeError: it is no causal test's result.
  """
  ranks = np.array([*found["ranks"], found["largest_rank"]], np.int64)
  boundaries = np.array(found["boundaries"], np.int64)
  rise = np.array(found["rise"], np.float64)  # None becomes NaN
  rising = (np.diff(ranks) > 0).all() and (np.diff(boundaries) > 0).all() and ranks[0] > 0
  if len(ranks) < 2 or not rising or rise.shape != (len(ranks) - 1, len(boundaries) - 1):
    raise ValueError
  if not isinstance(found["layers"], list):
    raise TypeError
  return rise


def read_kept_schedule(workdir: str, analysis: str) -> tuple[tuple, tuple] | None:
  """(shares, boundaries) of the r(t) that a run which has begun took from an analysis, or None.

  Args:
    workdir: of the run.
    analysis: the path it was named by; another one asks for another run.
  """
  path = pathlib.Path(workdir)
  try:
    rank = json.loads((path / "config.json").read_text())["rank"]
    if has_begun(path) and rank["analysis"] == analysis:
      return tuple(rank["measured_shares"]), tuple(rank["measured_boundaries"])
  except (OSError, ValueError, KeyError, TypeError):
    pass  # no run, or one that cannot be read, which its mode will say
  return None


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
