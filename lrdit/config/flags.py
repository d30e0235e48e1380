"""Parse the command line: its flags, and the config fields that it overrides."""

import difflib
import itertools
import re
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from lrdit.config import recipe
from lrdit.config.schema import FIELDS, get
from lrdit.runtime.errors import UserError
from lrdit.runtime.paths import local_path
from lrdit.runtime.store import flatten

# The function lrdit.modes.MODE.MODE takes the values of a mode's flags.
SHARED_BY_PROCESSES = ("train", "sample", "evaluate")
MODES = dict.fromkeys((*SHARED_BY_PROCESSES, "analyze", "benchmark"), ("config", "workdir"))
MODES |= {"encode": ("config", "output"), "report": ("workdirs", "output")}
MODES["export"] = ("config", "workdir", "output")
# Flags that a mode takes by keyword where they are given.
OPTIONAL = dict.fromkeys(("sample", "evaluate", "analyze"), ("checkpoint",))
OPTIONAL["export"] = ("checkpoint", "format")
FORMATS = ("safetensors", "diffusers")

LENGTHS = ("training.num_steps", "training.num_epochs")  # one on the command line unsets the other


def parse_flags(argv: list[str]) -> flags.FlagValues:
  """Return a command line's flags: `config` as a ConfigDict, paths with ~ filled in.

  Raises:
    UserError: a flag or config field is unknown, missing or malformed, or the config file cannot
      be read; the status is 2.
  """
  values = _define()
  try:
    rest = values(argv, known_only=True)[1:]
    if values.help:
      return values
    _check_needed(values)
    for name in ("workdir", "output"):
      if values[name].value is not None:
        values[name].value = local_path(f"--{name}", values[name].value, 2)
    if values.workdirs is not None:
      values.workdirs = [local_path("--workdirs", path, 2) for path in values.workdirs]
    config = None if values.config is None else recipe.load(values.config)
    _override(values, config, rest)
  except UnicodeDecodeError as error:
    raise UserError(f"--flagfile names no text file: {error}", 2) from error
  except (flags.Error, ValueError) as error:  # --noNAME=value raises the latter
    message = str(error).splitlines()[0].removeprefix("ERROR:: ")
    raise UserError(f"{message} (see --help)", 2) from error
  values["config"].value = config
  return values


def arguments_of(values: flags.FlagValues) -> tuple[list[Any], dict[str, Any]]:
  """Return the positional and keyword arguments of a mode's function."""
  given = {name: values[name].value for name in OPTIONAL.get(values.mode, ())}
  named = {name: value for name, value in given.items() if value is not None}
  return [values[name].value for name in MODES[values.mode]], named


def wants_tracebacks(argv: list[str]) -> bool:
  """Return whether --debug is given, even if the rest of the command line is wrong."""
  values = flags.FlagValues()
  values.set_gnu_getopt(True)
  flags.DEFINE_boolean("debug", False, "", values)
  try:
    values(argv, known_only=True)
  except (flags.Error, ValueError):
    return False
  return values.debug


def _define() -> flags.FlagValues:
  values = flags.FlagValues()
  values.set_gnu_getopt(True)  # flags may follow words, so that a stray word is reported as one
  # With two configs, it would be unclear which one the overrides change.
  flags.DEFINE_string("config", None, "FILE[:ARGUMENTS].", values, allow_overwrite=False)
  flags.DEFINE_string("workdir", None, "Directory of the run.", values)
  flags.DEFINE_list("workdirs", None, "Runs to compare (report).", values)
  flags.DEFINE_string("output", None, "Directory to create (encode, export, report).", values)
  chosen = "STEP, WORKDIR/checkpoints/STEP or, to evaluate or analyze, all; default: the newest."
  flags.DEFINE_string("checkpoint", None, chosen, values)
  flags.DEFINE_enum("format", None, FORMATS, "Layout of the files (export).", flag_values=values)
  flags.DEFINE_enum("mode", "train", list(MODES), "What to do.", values)
  flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.", values)
  flags.DEFINE_integer("num_processes", None, "1 runs alone on any cluster.", flag_values=values)
  flags.DEFINE_integer("process_id", None, "From 0.", flag_values=values)
  flags.DEFINE_boolean("dry_run", False, "Print the resolved run and end, without writing.", values)
  flags.DEFINE_boolean("debug", False, "Show tracebacks.", values)
  flags.DEFINE_boolean("help", False, "Show this help.", values)
  return values


def _check_needed(values: flags.FlagValues) -> None:
  mode = values.mode
  missing = [name for name in MODES[mode] if not values[name].value]
  if missing:
    needed = " and ".join(f"--{name}" for name in MODES[mode])
    raise UserError(f"--{missing[0]} is missing: --mode={mode} needs {needed}", 2)
  # Every mode but report accepts a config and a workdir, though encode ignores the latter.
  others = ("config", "workdir") if mode == "report" else ("workdirs",)
  others += () if "output" in MODES[mode] else ("output",)
  others += tuple({"checkpoint", "format"} - {*OPTIONAL.get(mode, ())})
  others += () if "config" in MODES[mode] else ("dry_run",)
  needless = [name for name in others if values[name].value]
  if needless:
    raise UserError(f"--{needless[0]} is not used by --mode={mode}: leave it out", 2)
  if "" in (values.workdirs or ()):
    given = ",".join(values.workdirs)
    raise UserError(f"--workdirs={given} names a directory without a name: leave out a comma", 2)


def _override(values: flags.FlagValues, config: ConfigDict | None, rest: list[str]) -> None:
  """Set the config's fields from the arguments that set none of the flags `values`."""
  names = [] if config is None else list(flatten(config.to_dict()))
  for argument in rest:
    field = re.match(r"--?(?:no)?config\.([^=]*)", argument)
    if field and config is None:
      raise UserError(f"{argument} is a config field, which this mode does not take: remove it", 2)
    if field and field[1] not in names:
      raise UserError(_no_such_field(argument, field[1], names), 2)
  rest = _last_values(rest)
  fields = flags.FlagValues()
  if config is not None:
    config_flags.DEFINE_config_dict("config", config, flag_values=fields, sys_argv=rest)
    for name in (f"config.{name}" for name, field in FIELDS.items() if field.none):
      if name in fields:
        fields[name].parser = _OrNone(fields[name].parser)
  try:
    words = fields(["", *rest])[1:]
  except flags.UnrecognizedFlagError as error:
    near = _nearest(error.flagname, [*values, *(f"config.{name}" for name in names)])
    message = f"Unknown command line flag {error.flagname!r}{near} (see --help)"
    raise UserError(message, 2) from error
  if words:
    raise UserError(f"{words[0]!r} is not a flag: write --name=value", 2)
  lengths = [name for name in LENGTHS if f"config.{name}" in fields]
  if len(lengths) == 1 and get(config, lengths[0]) is not None:
    (other,) = {*LENGTHS} - {*lengths}
    config.update_from_flattened_dict({other: None})


def _last_values(arguments: list[str]) -> list[str]:
  """Return the arguments with only the last --config.FIELD=VALUE of each field.

  absl would join the values of a repeated tuple.
  """
  fields = [re.match(r"--?config\.([^=]+)=", argument) for argument in arguments]
  last = {field[1]: i for i, field in enumerate(fields) if field}
  kept = [not field or last[field[1]] == i for i, field in enumerate(fields)]
  return list(itertools.compress(arguments, kept))


class _OrNone(flags.ArgumentParser):
  """Parses "None", and leaves everything else to a field's own parser."""

  def __init__(self, parser: flags.ArgumentParser):
    self._parser = parser

  def parse(self, argument: Any) -> Any:
    return None if argument == "None" else self._parser.parse(argument)


def _no_such_field(argument: str, field: str, names: list[str]) -> str:
  below = [name for name in names if name.startswith(f"{field}.")]
  if below:
    return f"{argument}: {field} is a group of fields: set one of them, such as --config.{below[0]}"
  near = _nearest(field, names, "--config.")
  return f"{argument}: no such config field{near}; docs/configuration.md lists them"


def _nearest(name: str, names: list[str], prefix: str = "--") -> str:
  found = difflib.get_close_matches(name, names, 1)
  return f"; did you mean {prefix}{found[0]}?" if found else ""
