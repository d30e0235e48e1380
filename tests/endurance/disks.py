"""Disks that are full or become read-only at random moments, on a file system of their own.

It is an ext4 image of a few megabytes. A ballast file fills it. A remount with the option `abort`
makes it read-only as the kernel does after an error, while files are open for writing; an ordinary
`remount,ro` is refused then. Whatever was not on the disk yet is lost.
"""

import errno
import os
import pathlib
import subprocess
from collections.abc import Callable

from tests.endurance import targets
from tests.endurance.jobs import Job
from tests.endurance.killing import Disturbance

DISK_BYTES = 64 << 20


class NotGrantedError(Exception):
  """The machine grants no mounts; the message says why."""


def _run(*command: object) -> None:
  try:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
  except FileNotFoundError as error:
    raise NotGrantedError(f"there is no {command[0]}") from error
  if done.returncode:
    says = " ".join(done.stderr.split())
    raise NotGrantedError(f"{' '.join(map(str, command))}: {says}")


class Disk:
  """A mounted file system that can be filled and aborted; a context that ends with its unmount."""

  def __init__(self, output: pathlib.Path):
    """Make and mount it; raise NotGrantedError where that is not possible."""
    self._image, self.path = output / "disk.img", output / "disk"
    self._ballast = self.path / "ballast"
    self.path.mkdir()
    with self._image.open("wb") as file:
      file.truncate(DISK_BYTES)
    _run("mkfs.ext4", "-q", "-F", "-m", "0", self._image)
    self._mount()

  def _mount(self) -> None:
    _run("mount", "-o", "loop", self._image, self.path)

  def __enter__(self) -> "Disk":
    return self

  def __exit__(self, *_: object) -> None:
    _run("umount", self.path)
    self._image.unlink()

  def fill(self) -> None:
    """Leave no free block."""
    with self._ballast.open("ab") as file:
      for size in (1 << 20, 1 << 16, 1 << 12):
        while _allocate(file.fileno(), size):
          pass

  def free(self) -> None:
    """Remove the ballast."""
    self._ballast.unlink()

  def abort(self) -> None:
    """Make it read-only at once, and lose what is not on the disk."""
    _run("mount", "-o", "remount,abort", self.path)

  def repair(self) -> None:
    """Mount it again as after a restart of the machine."""
    _run("umount", self.path)
    self._mount()


def _allocate(file: int, size: int) -> bool:
  try:
    os.posix_fallocate(file, os.fstat(file).st_size, size)
  except OSError as error:
    if error.errno != errno.ENOSPC:
      raise
    return False
  return True


def refused(job: Job) -> bool:
  """Wait for a command whose disk failed; return whether it was refused, which takes one line."""
  statuses, lines = job.wait(), job.text.splitlines()
  assert set(statuses) <= {0, 1}, f"status {statuses}:\n{job.text[-2000:]}"
  assert "Traceback" not in job.text, job.text[-4000:]
  errors = [line for line in lines if line.startswith("error: ")]
  assert len(errors) == (1 in statuses), job.text[-2000:]
  return 1 in statuses


def disks(output: pathlib.Path, count: int, aborts: int, seed: int) -> int:
  """Fill the disk `count` times and abort it `aborts` times; return the number of findings."""
  try:
    opened = Disk(output)
  except NotGrantedError as error:
    print(f"skipped, as no file system can be mounted: {error}", flush=True)
    return 0
  made = {"training": targets.training(), "samples": targets.sampling(output)}
  found = 0
  with opened as disk:

    def full(job: Job) -> bool:
      disk.fill()
      try:
        return refused(job)
      finally:
        disk.free()

    def read_only(job: Job) -> bool:
      disk.abort()
      try:
        return refused(job)
      finally:
        disk.repair()

    acts: dict[str, tuple[Callable[[Job], bool], int]] = {
      "full disks": (full, count),
      "disks that became read-only": (read_only, aborts),
    }
    for what, (act, number) in acts.items():
      for i, (name, target) in enumerate(made.items()):
        own = (number + i) // len(made)
        if own:
          disturbance = Disturbance(f"{name}-{act.__name__}", target, output, seed, disk.path)
          disturbance.run(own, act)
          disturbance.report(what)
          found += len(disturbance.findings)
  print(f"{count} full disks and {aborts} that became read-only, at random moments", flush=True)
  return found
