"""A run's directory: its config, and files that are whole or not there."""

import contextlib
import json
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from lrdit.runtime.errors import UserError
from lrdit.runtime.store import atomic_path, changes, flatten, read_json, write_json

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
# ...in how its process computes, which is told...
PROCESS_FIELDS = ("model.dtype", "model.remat", "model.scan_blocks", "rank.compute")
# ...and training may be prolonged or watched differently as well...
FREE_IN_TRAINING = (
  "training.num_steps",
  "training.log_every_steps",
  "training.eval_every_steps",
  "training.sample_every_steps",
  "training.tensorboard",
)
# ...or go on at another rate, which is noted. All of these leave the train state's layout alone.
TUNABLE_FIELDS = (
  "optimizer.learning_rate",
  "optimizer.decay",
  "optimizer.warmup_steps",
  "optimizer.weight_decay",
  "optimizer.grad_clip_norm",
  "optimizer.ema_decay",
  "curriculum.patience",
  "curriculum.check_every_steps",
)

CHANGES = "changes.jsonl"

log = logging.getLogger("lrdit")


def is_one_of(field: str, fields: Sequence[str]) -> bool:
  """Return whether a field, or a group that it is in, is among `fields`."""
  return any(field == f or field.startswith(f + ".") for f in fields)


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
  begun = has_begun(workdir)
  if stored.exists() and (begun or not create):
    allowed = FREE_FIELDS + PROCESS_FIELDS + FREE_IN_TRAINING
    _check_same_run(workdir, config, allowed + TUNABLE_FIELDS if create else allowed)
  if not stored.exists() and not create:
    raise UserError(
      f"{workdir} is not the workdir of a run (it has no config.json): train first, with the "
      "same --config and --workdir and --mode=train"
    )
  return workdir


def tell_process_fields(workdir: pathlib.Path, config: ConfigDict) -> None:
  """Log in which of `PROCESS_FIELDS` a process differs from the run that it looks at."""
  if (workdir / "config.json").exists():
    for change in changes(config.to_dict(), _read_config(workdir)):
      if change.split(" ")[0] in PROCESS_FIELDS:
        log.info("computed otherwise than the run was trained: %s", change)


def begin_config(workdir: pathlib.Path, config: ConfigDict, first_step: int) -> None:
  """Store the config that later modes are checked against, and note what a resumed run changes.

  A finished run was not trained with other `PROCESS_FIELDS`, so it keeps its own.

  Args:
    workdir: of the run.
    config: resolved.
    first_step: updates applied before; changes.jsonl has a line for every change of
      `PROCESS_FIELDS` and `TUNABLE_FIELDS` after some steps.

  Raises:
    UserError: fields have changed that nothing will be trained with.
  """
  history = [record for record in read_changes(workdir) if record["step"] < first_step]
  new = _changes_since(workdir, config, first_step)
  finished = first_step >= config.training.num_steps
  tuned = [record for record in new if record["field"] in TUNABLE_FIELDS]
  if finished and tuned:
    raise UserError(
      f"{workdir} holds a run that is finished, after {first_step} steps, with "
      f"{'; '.join(_describe(record) for record in tuned)}. Raise config.training.num_steps to go "
      "on, or use another --workdir"
    )
  stored = ConfigDict(config.to_dict())
  if finished:
    stored.update_from_flattened_dict({record["field"]: record["before"] for record in new})
    new = []
  for record in new:
    log.info("from step %d on: %s", first_step, _describe(record))
  if history or new or (workdir / CHANGES).exists():
    with atomic_path(workdir / CHANGES) as temporary:
      temporary.write_text("".join(json.dumps(record) + "\n" for record in history + new))
  store_config(workdir, stored)


def read_changes(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Return the changes of a run's config after some of its steps, in order.

  Returns:
    "step" (updates applied before), "field", "before" and "after"; none of a damaged line.
  """
  records = []
  with contextlib.suppress(FileNotFoundError):
    for line in (workdir / CHANGES).read_text(errors="replace").splitlines():
      with contextlib.suppress(ValueError, KeyError, TypeError):
        record = json.loads(line)
        fields = {name: record[name] for name in ("field", "before", "after")}
        records.append({"step": int(record["step"])} | fields)
  return records


def _changes_since(
  workdir: pathlib.Path, config: ConfigDict, first_step: int
) -> list[dict[str, Any]]:
  """Return what differs from how the steps up to `first_step` were trained."""
  if first_step == 0 or not (workdir / "config.json").exists():
    return []
  before, after = flatten(_read_config(workdir)), flatten(config.to_dict())
  # Changes whose steps were lost have not been.
  for record in reversed(read_changes(workdir)):
    if record["step"] >= first_step:
      before[record["field"]] = record["before"]
  return [
    {"step": first_step, "field": field, "before": before[field], "after": after[field]}
    for field in PROCESS_FIELDS + TUNABLE_FIELDS
    if before.get(field) != after[field]
  ]


def _describe(record: dict[str, Any]) -> str:
  return f"config.{record['field']} is {record['after']!r}, and was {record['before']!r}"


def store_config(workdir: pathlib.Path, config: ConfigDict) -> None:
  """Writes the config that later modes are checked against."""
  write_json(workdir / "config.json", config.to_dict())


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


def _read_config(workdir: pathlib.Path) -> dict[str, Any]:
  """Return what config.json holds.

  Raises:
    UserError: it is damaged.
  """
  path = workdir / "config.json"
  try:
    stored = json.loads(path.read_text())
    if isinstance(stored, dict):
      return stored
    error = "it is no JSON object"
  except ValueError as damage:
    error = damage
  copies = (workdir / "checkpoints").glob("[0-9]*/config/metadata")
  copy = max(copies, key=os.path.getmtime, default=None)
  mend = f"copy {copy} over it" if copy else f"delete {workdir / 'checkpoints'} to start again"
  raise UserError(f"{path} is damaged ({error}): {mend}, or use another --workdir")


def _check_same_run(workdir: pathlib.Path, config: ConfigDict, allowed: Sequence[str]) -> None:
  found = changes(config.to_dict(), _read_config(workdir))
  differences = [change for change in found if not is_one_of(change.split(" ")[0], allowed)]
  if differences:
    raise UserError(
      f"{workdir} holds another run: {'; '.join(differences)}. Use another --workdir, or "
      "the config of that run"
    )
