"""A run's config.json and changes.jsonl, and which fields may change in its workdir.

Also the fields that must not differ between a run and parameters from elsewhere.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
from typing import Any

from ml_collections import ConfigDict

from lrdit.config.field import Role
from lrdit.config.schema import FIELDS, fields_of, get, upgrade
from lrdit.runtime import cluster
from lrdit.runtime.errors import UserError
from lrdit.runtime.store import (
  DAMAGE,
  atomic_path,
  changes,
  check_same,
  flatten,
  parse_json,
  write_json,
)
from lrdit.runtime.workdir import has_begun
from lrdit.train import run_files
from lrdit.train.checkpoints import Checkpoints
from lrdit.train.run_files import check_same_on_all

CHANGES = "changes.jsonl"
# Fields without which trained parameters mean something else; "lrdit" in an export's config.json.
TRAINED_WITH = (
  "model.num_heads",
  "model.frequency_shift",
  "diffusion.num_train_timesteps",
  "diffusion.noise_schedule",
  "diffusion.prediction",
)
VARIANCE_FLOOR = "diffusion.variance_floor"

log = logging.getLogger("lrdit")


@dataclasses.dataclass(frozen=True)
class Change:
  """A change of one field of a run's config."""

  step: int  # updates applied before it
  field: str
  before: Any
  after: Any

  def __str__(self) -> str:
    return f"config.{self.field} is {self.after!r}, and was {self.before!r}"


def open_trained(path: str, config: ConfigDict) -> pathlib.Path:
  """Return the path of a trained run's workdir, after the first process has checked it.

  Raises:
    UserError: it is no workdir or another run's, or the processes have different configs.
  """
  check_same_on_all("config", config.to_dict())
  if cluster.is_first():
    log_process_fields(open_workdir(path, config, create=False), config)
  return pathlib.Path(path)


def trained_with(config: ConfigDict) -> dict[str, Any]:
  """Return the fields of a run that its parameters depend on, by name."""
  names = (*TRAINED_WITH, VARIANCE_FLOOR) if config.model.learn_sigma else TRAINED_WITH
  return {name: get(config, name) for name in names}


def choose_checkpoint(
  workdir: str | pathlib.Path, config: ConfigDict, which: str
) -> run_files.ChosenCheckpoint:
  """Return the checkpoint that `which` names, as `run_files.choose_checkpoint` has it.

  The first process compares `trained_with` of another run's checkpoint with the config's.

  Raises:
    UserError: it names none, or is of a run with other fields.
  """
  chosen = run_files.choose_checkpoint(workdir, which)
  is_other = chosen.run.resolve() != pathlib.Path(workdir).resolve()
  if is_other and chosen.step is not None and cluster.is_first():
    ours, stored = trained_with(config), checkpoint_config(chosen.run, chosen.step)
    theirs = {name: get(stored, name) for name in ours}
    fix = "choose a checkpoint of such a model, or give --workdir and --config of that run"
    check_same(f"{which} is the checkpoint of another model", ours, theirs, fix)
  return chosen


def open_workdir(path: str, config: ConfigDict, create: bool) -> pathlib.Path:
  """Return the path of the config's workdir.

  With `create`, make a missing workdir and ignore the config of a run without a checkpoint.
  Otherwise the workdir must have a config.

  Raises:
    UserError: it is no workdir, or another run's.
  """
  if create:
    pathlib.Path(path).mkdir(parents=True, exist_ok=True)
  return check_workdir(path, config, create)


def check_workdir(path: str | pathlib.Path, config: ConfigDict, create: bool) -> pathlib.Path:
  """Run the checks of `open_workdir` without writing."""
  workdir = pathlib.Path(path)
  is_there, begun = (workdir / "config.json").exists(), has_begun(workdir)
  if not is_there and not create:
    fix = "train first, with the same --config and --workdir and --mode=train"
    raise UserError(f"{workdir} is not the workdir of a run (it has no config.json): {fix}")
  if is_there and (begun or not create):
    allowed = fields_of(*{*Role} - {Role.RUN, *([] if create else [Role.TUNABLE])})
    found = changes(config.to_dict(), read_config(workdir))
    differences = [change for change in found if change.split(" ")[0] not in allowed]
    if differences:
      fix = "Use another --workdir, or the config of that run"
      raise UserError(f"{workdir} holds another run: {'; '.join(differences)}. {fix}")
  return workdir


def log_process_fields(workdir: pathlib.Path, config: ConfigDict) -> None:
  """Log `Role.PROCESS` fields that differ from those that the run was trained with."""
  if (workdir / "config.json").exists():
    for change in changes(config.to_dict(), read_config(workdir)):
      if change.split(" ")[0] in fields_of(Role.PROCESS):
        log.info("this process computes differently than the run's training: %s", change)


def begin_config(workdir: pathlib.Path, config: ConfigDict, first_step: int) -> None:
  """Store a run's config when it starts or resumes after `first_step` updates.

  changes.jsonl gets a line for every change of a `Role.PROCESS` or `Role.TUNABLE` field since then.
  A finished run keeps its `Role.PROCESS` fields, as it was not trained with others.

  Raises:
    UserError: it is another run's workdir, or tunable fields of a finished run have changed.
  """
  check_workdir(workdir, config, create=True)  # again, now that the workdir is locked
  history = [change for change in read_changes(workdir) if change.step < first_step]
  new = _changes_since(workdir, config, first_step)
  finished = first_step >= config.training.num_steps
  tuned = [change for change in new if change.field in fields_of(Role.TUNABLE)]
  if finished and tuned:
    raise UserError(
      f"{workdir} holds a run that is finished, after {first_step} steps, with "
      f"{'; '.join(map(str, tuned))}. Raise config.training.num_steps to go on, or use another "
      "--workdir"
    )
  stored = ConfigDict(config.to_dict())
  if finished:
    stored.update_from_flattened_dict({change.field: change.before for change in new})
    new = []
  for change in new:
    log.info("from step %d on: %s", first_step, change)
  if history or new or (workdir / CHANGES).exists():
    with atomic_path(workdir / CHANGES) as temporary:
      lines = [json.dumps(dataclasses.asdict(change)) + "\n" for change in history + new]
      temporary.write_text("".join(lines))
  store_config(workdir, stored)


def read_changes(workdir: pathlib.Path) -> list[Change]:
  """Return the changes of a run's config, in order; damaged lines are skipped."""
  found = []
  with contextlib.suppress(FileNotFoundError):
    for line in (workdir / CHANGES).read_text(errors="replace").splitlines():
      with contextlib.suppress(*DAMAGE):
        record = parse_json(line)
        values = (record[name] for name in ("before", "after"))
        found.append(Change(int(record["step"]), str(record["field"]), *values))
  return found


def _changes_since(workdir: pathlib.Path, config: ConfigDict, first_step: int) -> list[Change]:
  """Return the differences from the config that the last step before `first_step` had."""
  if first_step == 0 or not (workdir / "config.json").exists():
    return []
  before, after = flatten(read_config(workdir)), flatten(config.to_dict())
  # Changes at steps that were lost do not count.
  for change in reversed(read_changes(workdir)):
    if change.step >= first_step:
      before[change.field] = change.before
  noted = fields_of(Role.PROCESS, Role.TUNABLE)
  return [
    Change(first_step, field, before.get(field), value)
    for field, value in after.items()
    if field in noted and before.get(field) != value
  ]


def store_config(workdir: pathlib.Path, config: ConfigDict) -> None:
  """Write config.json, which later modes are checked against."""
  write_json(workdir / "config.json", config.to_dict())


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
  """Return the fields of config.json, upgraded to this version."""
  path = workdir / "config.json"
  try:
    stored = parse_json(path.read_bytes())
    if isinstance(stored, dict):
      return upgrade(stored)
    error = "it is not a JSON object"
  except ValueError as damage:
    error = damage
  copies = (workdir / "checkpoints").glob("[0-9]*/config/metadata")
  copy = max(copies, key=os.path.getmtime, default=None)
  fix = f"copy {copy} over it" if copy else f"delete {workdir / 'checkpoints'} to start again"
  raise UserError(f"{path} is damaged ({error}): {fix}, or use another --workdir")


def as_config(stored: dict[str, Any]) -> ConfigDict:
  """Return the fields of config.json as a config, with tuples for JSON's lists.

  Raises:
    UserError: a group is missing, or a name is none that a field can have.
  """

  def tuples(value: Any) -> Any:
    if isinstance(value, dict):
      return {key: tuples(item) for key, item in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value

  fix = "restore its config.json"
  for group in sorted({name.rpartition(".")[0] for name in FIELDS} - {""}):
    if not isinstance(stored.get(group), dict):
      raise UserError(f"the config of the run is damaged (it has no group {group}): {fix}")
  try:
    return ConfigDict(tuples(stored))
  except DAMAGE as error:
    raise UserError(f"the config of the run is damaged ({error}): {fix}") from error


def checkpoint_config(workdir: pathlib.Path, step: int) -> ConfigDict:
  """Return the config that a run had at its checkpoint of `step`."""
  with contextlib.closing(Checkpoints(workdir)) as checkpoints:
    return as_config(upgrade(checkpoints.read_config(step)))


def stored_config(workdir: pathlib.Path) -> ConfigDict:
  """Return the config of a run's workdir."""
  if not (workdir / "config.json").exists():
    raise UserError(f"{workdir} is not the workdir of a run (it has no config.json)")
  return as_config(read_config(workdir))
