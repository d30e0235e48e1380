"""A run's directory: whether it has begun, and the data that it was trained on."""

import logging
import os
import pathlib
from typing import Any

from lrdit.runtime.errors import UserError
from lrdit.runtime.store import changes, read_json, write_json

log = logging.getLogger("lrdit")


def has_begun(workdir: pathlib.Path) -> bool:
  """Return whether there is something like a checkpoint.

  Raises:
    UserError: `checkpoints` is a link to what is not there.
  """
  checkpoints = workdir / "checkpoints"
  if checkpoints.is_symlink() and not checkpoints.exists():
    raise UserError(
      f"{checkpoints} is a link to {os.readlink(checkpoints)}, which is not there: mount it, or "
      "remove the link to start again"
    )
  return any(checkpoints.glob("[0-9]*"))


def check_data(workdir: pathlib.Path, fingerprint: dict[str, Any]) -> None:
  """Keeps a run to the data it began with.

  Args:
    workdir: of the run.
    fingerprint: what its splits are made from, as JSON.

  Raises:
    UserError: checkpoints are there, and were trained on other data.
  """
  path = workdir / "data.json"
  stored = None
  if has_begun(workdir) and path.exists():
    try:
      stored = read_data(workdir)
    except UserError:  # it says to train, which is this
      log.warning("%s is damaged, and made again: the data cannot be compared", path)
  if stored is not None and stored != fingerprint:
    raise UserError(
      f"{workdir} holds a run on other data: {'; '.join(changes(fingerprint, stored))}. Use "
      "another --workdir, or the data of that run"
    )
  write_json(path, fingerprint)


def read_data(workdir: pathlib.Path) -> dict[str, Any]:
  """What `check_data` stored.

  Raises:
    UserError: it is missing or damaged.
  """
  fix = "run --mode=train with the same --workdir, which writes it"
  return read_json(workdir / "data.json", fix)
