"""Files of an analysis: the rank truncation, and the finished units of a section under way."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from lrdit.runtime import store
from lrdit.runtime.errors import UserError
from lrdit.runtime.workdir import has_begun

RECORD = "record.json"  # of a unit, beside its arrays
FIX = "it is made again"


def read_truncation(path: str) -> dict[str, Any]:
  """Return what `--mode=analyze` found by rank truncation.

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
  """Return the (K, G) rises, NaN for what was not measured.

  Raises:
    ValueError, KeyError, TypeError: it is not the result of a rank truncation.
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
  """Return (shares, boundaries) of the r(t) that a begun run took from an analysis, or None.

  Args:
    workdir: of the run.
    analysis: the path that the config names; another one asks for another run.
  """
  path = pathlib.Path(workdir)
  try:
    rank = json.loads((path / "config.json").read_text())["rank"]
    if has_begun(path) and rank["analysis"] == analysis:
      return tuple(rank["measured_shares"]), tuple(rank["measured_boundaries"])
  except (OSError, ValueError, KeyError, TypeError):
    pass  # no run, or one that cannot be read, which its mode will report
  return None


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
