"""The command lines that make a workdir again, from what it holds."""

import importlib
import pathlib
import shlex
from typing import Any

from lrdit.config.resolve import resolve
from lrdit.runtime.errors import UserError
from lrdit.runtime.store import flatten

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
# Filled in from the variant where a config has 0.
SIZES = ("model.hidden_size", "model.depth", "model.num_heads", "model.patch_size")


def _overrides(name: str, stored: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
  """(--config flag, fields to override) that turn a config file into a stored config.

  None where the file does not have the same fields.
  """
  method, variant = stored.get("method"), stored.get("model.variant")
  try:
    config = importlib.import_module(f"configs.{name}").get_config(
      f"method={method},variant={variant}"
    )
    ours = flatten(config.to_dict())
    filled = flatten(resolve(config).to_dict())
  except (ImportError, AttributeError, UserError):
    return None
  if ours.keys() != stored.keys():
    return None
  # A size that follows from the variant needs no override.
  ours |= {field: filled[field] for field in SIZES}
  changed = {field: value for field, value in stored.items() if ours[field] != value}
  return f"configs/{name}.py:method={method},variant={variant}", changed


def _flag(field: str, value: Any) -> str:
  text = repr(tuple(value)).replace(" ", "") if isinstance(value, list) else str(value)
  return f"--config.{field}={text}"


def _sampling_overrides(stored: dict[str, Any], export: str, metadata: dict[str, Any]) -> list[str]:
  """Flags that an export needs beyond those of its run."""
  drawn = {
    field: metadata[field.removeprefix("sampling.")]
    for field in stored
    if field.startswith("sampling.") and metadata.get(field.removeprefix("sampling.")) is not None
  }
  drawn["sampling.name"] = export
  if "weights" in metadata:
    drawn["sampling.use_ema"] = metadata["weights"] == "ema"
  return [_flag(field, value) for field, value in drawn.items() if stored.get(field) != value]


def _evaluation_overrides(stored: dict[str, Any], evaluation: dict[str, Any] | None) -> list[str]:
  """Flags that an evaluation needs beyond those of its run."""
  settings = (evaluation or {}).get("settings")
  measured = flatten({"evaluation": settings if isinstance(settings, dict) else {}})
  return [_flag(f, value) for f, value in measured.items() if f in stored and stored[f] != value]


def reproduce(run: dict[str, Any]) -> list[str]:
  """Command lines that train, sample and evaluate a run again.

  The config file is the one of configs/ that needs the fewest overrides.

  Args:
    run: of `report_runs.read_run`.

  Returns:
    one command for each mode and export, in order; empty if no config file of
    this version has the stored config's fields.
  """
  stored = flatten(run["config"])
  names = sorted(p.stem for p in CONFIGS.glob("*.py") if p.stem not in ("__init__", "common"))
  known = [found for name in names if (found := _overrides(name, stored))]
  if not known:
    return []
  config, changed = min(known, key=lambda found: len(found[1]))
  flags = [f"--config={config}", f"--workdir={run['workdir']}"]
  base = [_flag(field, value) for field, value in changed.items()]
  commands = [[*flags, "--mode=train", *base]]
  measured = _evaluation_overrides(stored, run["evaluation"])
  for export, drawn in run["exports"].items():
    own = _sampling_overrides(stored, export, drawn["metadata"])
    commands.append([*flags, "--mode=sample", *base, *own])
    if drawn.get("figures"):
      commands.append([*flags, "--mode=evaluate", *base, *own, *measured])
  if run["evaluation"] and not any("--mode=evaluate" in command for command in commands):
    commands.append([*flags, "--mode=evaluate", *base, *measured])
  return [shlex.join(["python", "main.py", *command]) for command in commands]
