"""A run's directory: whether training has begun, and on which data."""

import logging
import os
import pathlib
from typing import Any

from lrdit.runtime.errors import UserError
from lrdit.runtime.store import changes, read_json, write_json

log = logging.getLogger("lrdit")


def has_begun(workdir: pathlib.Path) -> bool:
  """Return whether the workdir has a checkpoint, intact or not."""
  checkpoints = workdir / "checkpoints"
  if checkpoints.is_symlink() and not checkpoints.exists():
    fix = "mount it, or remove the link to start again"
    target = os.readlink(checkpoints)
    raise UserError(f"{checkpoints} is a link to {target}, which is not there: {fix}")
  # An unfinished save is a directory with more behind its step.
  return any(path.name.isdecimal() for path in checkpoints.glob("[0-9]*"))


def check_data(workdir: pathlib.Path, fingerprint: dict[str, Any]) -> None:
  """Store the JSON fingerprint of what a run learns from, its splits and perhaps a teacher.

  Raise a UserError if the run has another.
  """
  path, stored = workdir / "data.json", fingerprint
  if has_begun(workdir) and path.exists():
    try:
      stored = fingerprint | read_data(workdir)  # earlier versions did not store the teacher's
    except UserError:
      log.warning("%s is damaged and is written again: the data cannot be compared", path)
  if stored != fingerprint:
    found = "; ".join(changes(fingerprint, stored))
    fix = "Use another --workdir, or the data of that run"
    raise UserError(f"{workdir} holds a run on other data: {found}. {fix}")
  write_json(path, fingerprint)


def read_data(workdir: pathlib.Path) -> dict[str, Any]:
  """Return the fingerprint that `check_data` stored."""
  fix = "run --mode=train with the same --workdir, which writes it"
  return read_json(workdir / "data.json", fix)
