"""A run's directory: its config, and files that are whole or not there."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from lrdit.errors import UserError

# A mode may differ from the workdir's config only in these...
FREE_FIELDS = (
  "sampling",
  "evaluation",
  "analysis",
  "rank.analysis",
  "checkpoint",
  "benchmark",
  "data.data_dir",
  "data.cache_gib",
  "vae.path",
  "vae.latents_dir",
  "vae.batch_size",
)
# ...and training may be prolonged or watched differently as well.
FREE_IN_TRAINING = (
  "training.num_steps",
  "training.log_every_steps",
  "training.eval_every_steps",
  "training.sample_every_steps",
  "training.tensorboard",
)


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


def _is_free(change: str) -> bool:
  field = change.split(" ")[0]
  return any(f == field or field.startswith(f + ".") for f in FREE_FIELDS + FREE_IN_TRAINING)


def open_workdir(path: str, config: ConfigDict, create: bool) -> pathlib.Path:
  """Checks that a workdir belongs to the config.

  Args:
    path: the workdir.
    config: resolved.
    create: make the workdir where there is none, and let go of the config of
      a run that never came to its first checkpoint (training); otherwise the
      workdir and its config must be there.

  Returns:
    The workdir's path.

  Raises:
    UserError: another run's workdir, no workdir, or one that cannot be used.
  """
  workdir = pathlib.Path(path)
  stored = workdir / "config.json"
  if create:
    workdir.mkdir(parents=True, exist_ok=True)
  begun = any((workdir / "checkpoints").glob("[0-9]*"))
  if stored.exists() and (begun or not create):
    _check_same_run(stored, config)
  if not stored.exists() and not create:
    raise UserError(
      f"{workdir} is not the workdir of a run (it has no config.json): train first, with the "
      "same --config and --workdir and --mode=train"
    )
  return workdir


def store_config(workdir: pathlib.Path, config: ConfigDict) -> None:
  """Writes the config that later modes are checked against."""
  write_json(workdir / "config.json", config.to_dict())


def check_data(workdir: pathlib.Path, identity: dict[str, Any]) -> None:
  """Keeps a run to the data it began with.

  Args:
    workdir: of the run.
    identity: what its splits are made from, as JSON.

  Raises:
    UserError: checkpoints are there, and were trained on other data.
  """
  path = workdir / "data.json"
  begun = any((workdir / "checkpoints").glob("[0-9]*"))
  if begun and path.exists() and (stored := read_data(workdir)) != identity:
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


def _check_same_run(stored: pathlib.Path, config: ConfigDict) -> None:
  try:
    theirs = json.loads(stored.read_text())
    differences = [c for c in changes(config.to_dict(), theirs) if not _is_free(c)]
  except (ValueError, AttributeError) as error:
    raise UserError(
      f"{stored} is damaged ({error}): restore it, or use another --workdir"
    ) from error
  if differences:
    raise UserError(
      f"{stored.parent} holds another run: {'; '.join(differences)}. Use another --workdir, or "
      "the config of that run"
    )
