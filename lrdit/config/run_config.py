"""A run's config.json and changes.jsonl, and which fields a workdir lets change."""

import contextlib
import json
import logging
import os
import pathlib
from typing import Any

from ml_collections import ConfigDict

from lrdit.config.schema import Role, fields_of, upgrade
from lrdit.runtime import cluster
from lrdit.runtime.errors import UserError
from lrdit.runtime.store import atomic_path, changes, flatten, write_json
from lrdit.runtime.workdir import has_begun
from lrdit.train.run_files import check_same

CHANGES = "changes.jsonl"

log = logging.getLogger("lrdit")


def open_trained(path: str, config: ConfigDict) -> pathlib.Path:
  """Return the path of a trained run's workdir, which the first process checks.

  Raises:
    UserError: no workdir, another run's, or processes with different configs.
  """
  check_same("config", config.to_dict())
  if cluster.is_first():
    log_process_fields(open_workdir(path, config, create=False), config)
  return pathlib.Path(path)


def open_workdir(path: str, config: ConfigDict, create: bool) -> pathlib.Path:
  """Check that a workdir belongs to the config, and make it where training begins.

  Args:
    path: the workdir.
    config: resolved.
    create: make the workdir where there is none, and ignore the config of a run that never
      came to its first checkpoint (training); otherwise the workdir and its config must be
      there.

  Returns:
    The workdir's path.

  Raises:
    UserError: another run's workdir, no workdir, or one that cannot be used.
  """
  if create:
    pathlib.Path(path).mkdir(parents=True, exist_ok=True)
  return check_workdir(path, config, create)


def check_workdir(path: str | pathlib.Path, config: ConfigDict, create: bool) -> pathlib.Path:
  """As `open_workdir`, but write nothing."""
  workdir = pathlib.Path(path)
  is_there, begun = (workdir / "config.json").exists(), has_begun(workdir)
  if not is_there and not create:
    raise UserError(
      f"{workdir} is not the workdir of a run (it has no config.json): train first, with the "
      "same --config and --workdir and --mode=train"
    )
  if is_there and (begun or not create):
    allowed = fields_of(Role.PROCESS, Role.WATCH, Role.FREE, *([Role.TUNABLE] if create else []))
    found = changes(config.to_dict(), read_config(workdir))
    differences = [change for change in found if change.split(" ")[0] not in allowed]
    if differences:
      raise UserError(
        f"{workdir} holds another run: {'; '.join(differences)}. Use another --workdir, or "
        "the config of that run"
      )
  return workdir


def log_process_fields(workdir: pathlib.Path, config: ConfigDict) -> None:
  """Log how a process computes otherwise than the run that it looks at was trained."""
  if (workdir / "config.json").exists():
    for change in changes(config.to_dict(), read_config(workdir)):
      if change.split(" ")[0] in fields_of(Role.PROCESS):
        log.info("computed otherwise than the run was trained: %s", change)


def begin_config(workdir: pathlib.Path, config: ConfigDict, first_step: int) -> None:
  """Store the config that later modes are checked against, and note what a resumed run changes.

  A finished run was not trained with other `Role.PROCESS` fields, so it keeps its own.

  Args:
    workdir: of the run.
    config: resolved.
    first_step: updates applied before; changes.jsonl has a line for every change of
      `Role.PROCESS` and `Role.TUNABLE` fields after some steps.

  Raises:
    UserError: fields have changed that nothing will be trained with.
  """
  check_workdir(workdir, config, create=True)  # again, as only now nobody else writes there
  history = [record for record in read_changes(workdir) if record["step"] < first_step]
  new = _changes_since(workdir, config, first_step)
  finished = first_step >= config.training.num_steps
  tuned = [record for record in new if record["field"] in fields_of(Role.TUNABLE)]
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
    "step" (updates applied before), "field", "before" and "after"; nothing for a damaged line.
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
  before, after = flatten(read_config(workdir)), flatten(config.to_dict())
  # Changes whose steps were lost do not count.
  for record in reversed(read_changes(workdir)):
    if record["step"] >= first_step:
      before[record["field"]] = record["before"]
  noted = fields_of(Role.PROCESS, Role.TUNABLE)
  return [
    {"step": first_step, "field": field, "before": before.get(field), "after": value}
    for field, value in after.items()
    if field in noted and before.get(field) != value
  ]


def _describe(record: dict[str, Any]) -> str:
  return f"config.{record['field']} is {record['after']!r}, and was {record['before']!r}"


def store_config(workdir: pathlib.Path, config: ConfigDict) -> None:
  """Write the config that later modes are checked against."""
  write_json(workdir / "config.json", config.to_dict())


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
  """Return what config.json holds, with the fields of this version.

  Raises:
    UserError: it is damaged.
  """
  path = workdir / "config.json"
  try:
    stored = json.loads(path.read_text())
    if isinstance(stored, dict):
      return upgrade(stored)
    error = "it is no JSON object"
  except ValueError as damage:
    error = damage
  copies = (workdir / "checkpoints").glob("[0-9]*/config/metadata")
  copy = max(copies, key=os.path.getmtime, default=None)
  fix = f"copy {copy} over it" if copy else f"delete {workdir / 'checkpoints'} to start again"
  raise UserError(f"{path} is damaged ({error}): {fix}, or use another --workdir")


def as_config(stored: dict[str, Any]) -> ConfigDict:
  """Return what config.json holds as a config, with tuples for JSON's lists."""

  def tuples(value: Any) -> Any:
    if isinstance(value, dict):
      return {key: tuples(item) for key, item in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value

  return ConfigDict(tuples(stored))


def stored_config(workdir: pathlib.Path) -> ConfigDict:
  """Return the config of a run.

  Raises:
    UserError: the directory is not a workdir, or config.json is damaged.
  """
  if not (workdir / "config.json").exists():
    raise UserError(f"{workdir} is not the workdir of a run (it has no config.json)")
  return as_config(read_config(workdir))
