"""The command lines that reproduce a workdir."""

import pathlib
import shlex
from typing import Any

from lrdit.config import recipe
from lrdit.config.sample_settings import from_record
from lrdit.model import dit
from lrdit.report.runs import Run, as_dict
from lrdit.runtime.errors import UserError
from lrdit.runtime.store import flatten

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"


def _overrides(name: str, stored: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
  """Return the --config flag and overrides for a stored config, or None if its fields differ."""
  arguments = f"method={stored.get('method')},variant={stored.get('model.variant')}"
  try:
    config = recipe.load_file(str(CONFIGS / f"{name}.py"), arguments)
    ours, sizes = flatten(config.to_dict()), dit.decode_variant(config.model.variant)
  except UserError:
    return None
  if ours.keys() != stored.keys():
    return None
  ours |= {f"model.{key}": ours[f"model.{key}"] or size for key, size in sizes.items()}
  changed = {field: value for field, value in stored.items() if ours[field] != value}
  return f"--config=configs/{name}.py:{arguments}", changed


def _flag(field: str, value: Any) -> str:
  text = repr(tuple(value)).replace(" ", "") if isinstance(value, list) else str(value)
  return f"--config.{field}={text}"


def reproduce(run: Run) -> list[str]:
  """Return the command lines that train, sample and evaluate a run again, in order.

  They use the config file that needs the fewest overrides. The list is empty if no config file of
  this version has the stored config's fields.
  """
  stored = flatten(run.config)
  names = sorted(p.stem for p in CONFIGS.glob("*.py") if p.stem != "__init__")
  known = [found for name in names if (found := _overrides(name, stored))]
  if not known:
    return []
  config, changed = min(known, key=lambda found: len(found[1]))

  def flags(fields: dict[str, Any]) -> list[str]:
    """Return the flags for values that differ from the stored config."""
    return [_flag(f, value) for f, value in fields.items() if f in stored and stored[f] != value]

  evaluated = flags(flatten({"evaluation": as_dict(run.evaluation.get("settings"))}))
  commands = [["--mode=train"]]
  for name, own in run.sample_sets.items():
    sampled = flags(flatten({"sampling": from_record(own.metadata) | {"name": name}}))
    commands.append(["--mode=sample", *sampled])
    if own.metrics:
      commands.append(["--mode=evaluate", *sampled, *evaluated])
  if run.evaluation and not any(mode == "--mode=evaluate" for mode, *_ in commands):
    commands.append(["--mode=evaluate", *evaluated])
  start = ["python", "main.py", config, f"--workdir={run.workdir}"]
  changes = [_flag(field, value) for field, value in changed.items()]
  return [shlex.join([*start, mode, *changes, *own]) for mode, *own in commands]
