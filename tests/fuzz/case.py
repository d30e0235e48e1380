"""One target's directory: valid files, of which every input changes a few."""

import dataclasses
import fnmatch
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.fuzz import mutate
from tests.fuzz.judge import Verdict, judge


@dataclasses.dataclass(frozen=True)
class Target:
  """A reader of ours and the files that it reads.

  Attributes:
    make: writes valid files to an empty directory.
    read: reads the directory, as a mode does; it may write in it.
    leave: patterns of relative paths that stay as they are.
    needs: a module without which the target is left out.
  """

  make: Callable[[pathlib.Path], Any]
  read: Callable[[pathlib.Path], Any]
  leave: tuple[str, ...] = ()
  needs: str = "numpy"


class Case:
  """A target in a directory, ready for inputs by their number."""

  def __init__(self, name: str, target: Target, parent: pathlib.Path):
    """Write the valid files below `parent`, and read them once."""
    self.name, self.target, self.directory = name, target, parent / "files" / name
    self.directory.mkdir(parents=True)
    target.make(self.directory)
    self.files = self._contents()
    for outside in (parent, parent / "files"):
      (outside / mutate.BAIT).write_text("{}")
      (outside / mutate.BAITS).mkdir()
      for path, data in self.files.items():
        (outside / mutate.BAITS / os.path.basename(path)).write_bytes(data)
    self.names = sorted(name for name in self.files if not self._stays(name))
    target.read(self.directory)
    self._restore()

  def _stays(self, name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in self.target.leave)

  def _contents(self) -> dict[str, bytes]:
    paths = (path for path in self.directory.rglob("*") if path.is_file())
    return {str(path.relative_to(self.directory)): path.read_bytes() for path in paths}

  def _restore(self) -> None:
    """Bring the directory back to the valid files, each as a new file."""
    if self._contents() != self.files:
      shutil.rmtree(self.directory)
      for name, data in self.files.items():
        self._write(name, data)

  def _write(self, name: str, data: bytes) -> None:
    path = self.directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # a memory map of the old one stays valid
    path.write_bytes(data)

  def changed(self, seed: int, number: int) -> dict[str, bytes | None]:
    """Return the changed files of an input by name; None is a missing one."""
    rng = np.random.default_rng([seed, zlib.crc32(self.name.encode()), number])
    names = [mutate.pick(rng, self.names) for _ in range(1 if rng.random() < 0.8 else 2)]
    changed: dict[str, bytes | None] = {}
    for name in names:
      data = changed.get(name) or self.files[name]
      for _ in range(1 if rng.random() < 0.7 else 2):
        try:
          data = mutate.mutate(rng, name, data)
        except Exception:  # the first change left no structure for a second one
          data = mutate.mutate_bytes(rng, data)
      changed[name] = data
    if rng.random() < 0.02:
      changed[names[0]] = None
    return changed

  def run(self, changed: dict[str, bytes | None]) -> Verdict:
    """Read the directory with some files changed."""
    for name, data in changed.items():
      if data is None:
        (self.directory / name).unlink(missing_ok=True)
      else:
        self._write(name, data)
    verdict = judge(self.target.read, self.directory)
    self._restore()
    return verdict
