"""Locks: one process at a time writes a directory, and the others learn which one.

The kernel, or on NFS the server, releases a lock when its process ends in any way.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import pathlib
import socket
import time
from collections.abc import Iterator

from lrdit.runtime.errors import UserError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of the file system

log = logging.getLogger("lrdit")


def lock_path(directory: pathlib.Path, use: str) -> pathlib.Path:
  """Return the lock file for one use of a directory, which exists while it is in use."""
  return directory / f".{use}.lock"


@contextlib.contextmanager
def owned(directory: pathlib.Path, use: str, wait: bool = False) -> Iterator[None]:
  """Hold the lock for one use of an existing directory, such as the mode that writes it.

  With `wait`, wait for another process that holds the lock instead of raising a UserError.
  """
  path = lock_path(directory, use)
  file = _take(path, wait)
  try:
    yield
  finally:
    try:  # remove the file before its release, so that waiting processes see that it is gone
      with contextlib.suppress(OSError):
        if _is_at(file, path):
          path.unlink()
    finally:
      os.close(file)


def _take(path: pathlib.Path, wait: bool) -> int:
  while True:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
      _lock(file, path, wait)
      if _is_at(file, path):
        _sign(file, path)
        return file
    except BaseException:
      os.close(file)
      raise
    os.close(file)  # the previous process removed it, and another may have created it again


def _lock(file: int, path: pathlib.Path, wait: bool) -> None:
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    holder = _describe(_read(file))
    if not wait:
      fix = "wait until that has ended, or name another directory"
      raise UserError(f"{path.parent} is in use by {holder}: {fix}") from error
    log.info("%s is in use by %s: waiting for it", path.parent, holder)
    fcntl.flock(file, fcntl.LOCK_EX)
  except OSError as error:
    if error.errno not in NO_LOCKS:
      raise
    log.warning("%s cannot be locked (%s): start nothing twice", path.parent, error.strerror)


def _is_at(file: int, path: pathlib.Path) -> bool:
  try:
    return os.path.samestat(os.fstat(file), os.stat(path))
  except FileNotFoundError:
    return False


def _sign(file: int, path: pathlib.Path) -> None:
  """Write who holds the lock, for other processes' messages."""
  if before := _read(file):
    log.info("%s was left by %s, which has ended", path.parent, _describe(before))
  now = time.strftime("%Y-%m-%d %H:%M:%S %z")
  holder = {"host": socket.gethostname(), "process": os.getpid(), "since": now}
  with contextlib.suppress(OSError):  # a full disk, which the first real write reports
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(holder).encode(), 0)


def _read(file: int) -> dict:
  """Return what the holder wrote, or {} if it has not written yet."""
  try:
    holder = json.loads(os.pread(file, 4096, 0))
  except (ValueError, OSError):
    return {}
  return holder if isinstance(holder, dict) else {}


def _describe(holder: dict) -> str:
  if not holder:
    return "another process"
  return f"process {holder.get('process')} on {holder.get('host')} since {holder.get('since')}"
