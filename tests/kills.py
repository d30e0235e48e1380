"""Disks that fill or become read-only, and a process that is killed in its work on one."""

import errno
import os
import pathlib
import shutil

from lrdit.runtime import store

CHANGES = (
  (os, "replace"),
  (os, "unlink"),
  (os, "truncate"),
  (pathlib.Path, "unlink"),
  (pathlib.Path, "mkdir"),
  (pathlib.Path, "touch"),
  (shutil, "rmtree"),
)


class Killed(BaseException):
  """No handler of the package may catch it."""


GROWING = ((pathlib.Path, "mkdir"), (pathlib.Path, "touch"))


class KilledProcess:
  """Raises `Killed` before change number `moment` on the disk, or in the middle of a write."""

  changes = CHANGES

  def __init__(self, monkeypatch, moment):
    self.left = moment
    for owner, name in self.changes:
      monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))
    monkeypatch.setattr(os, "fsync", self._counted(lambda _: None))
    write_all = store._write_all

    def torn(file, data):
      if self.left <= 0:
        file.write(data.tobytes()[: data.nbytes // 2 + 1])
      self._count()
      write_all(file, data)

    monkeypatch.setattr(store, "_write_all", torn)

  def _count(self):
    self.left -= 1
    if self.left < 0:  # every later change fails too: a dead process cleans nothing up
      self._fail()

  def _fail(self):
    raise Killed

  def _counted(self, function):
    def wrapped(*args, **kwargs):
      self._count()
      return function(*args, **kwargs)

    return wrapped


class FullDisk(KilledProcess):
  """Raises an OSError for everything that takes space, from change number `moment` on."""

  changes, code = GROWING, errno.ENOSPC

  def _fail(self):
    raise OSError(self.code, os.strerror(self.code))


class ReadOnlyDisk(FullDisk):
  """Raises an OSError for every change from number `moment` on, as after a remount."""

  changes, code = CHANGES, errno.EROFS
