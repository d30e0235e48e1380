"""A run's directory: its data, and files that are whole or not there."""

import contextlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from lrdit.runtime.errors import UserError

log = logging.getLogger("lrdit")


@contextlib.contextmanager
def atomic_path(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary path beside `path`, renamed to it on success."""
  temporary = path.with_name(path.name + ".tmp")
  try:
    yield temporary
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def remove_directory(path: pathlib.Path) -> None:
  """Remove a directory, or what a link in its place points to and the link."""
  if path.is_symlink() and path.is_dir():
    for entry in path.iterdir():
      shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    path.unlink()
  elif path.exists():
    shutil.rmtree(path)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes indented JSON, on the disk and whole before it takes its name."""
  with atomic_path(path) as temporary, temporary.open("w") as file:
    file.write(json.dumps(value, indent=2) + "\n")
    file.flush()
    os.fsync(file.fileno())


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """{"group.field": value} of a nested config; tuples become lists, as JSON has them."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, dict):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = list(value) if isinstance(value, tuple) else value
  return flat


def changes(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
  """ "field (stored value there, given value asked for)" of fields that differ."""
  ours, theirs = flatten(ours), flatten(theirs)
  return [
    f"{field} ({theirs.get(field)!r} there, {ours.get(field)!r} asked for)"
    for field in sorted(ours.keys() | theirs.keys())
    if ours.get(field) != theirs.get(field)
  ]


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


def check_data(workdir: pathlib.Path, identity: dict[str, Any]) -> None:
  """Keeps a run to the data it began with.

  Args:
    workdir: of the run.
    identity: what its splits are made from, as JSON.

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
  if stored is not None and stored != identity:
    raise UserError(
      f"{workdir} holds a run on other data: {'; '.join(changes(identity, stored))}. Use "
      "another --workdir, or the data of that run"
    )
  write_json(path, identity)


def read_data(workdir: pathlib.Path) -> dict[str, Any]:
  """What `check_data` stored.

  Raises:
    UserError: it is missing or damaged.
  """
  path = workdir / "data.json"
  try:
    return json.loads(path.read_text())
  except (FileNotFoundError, ValueError) as error:
    raise UserError(
      f"{path} is missing or damaged: run --mode=train with the same --workdir, which writes it"
    ) from error
