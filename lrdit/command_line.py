"""What the command line may say."""

import re

from absl import flags
from ml_collections import config_flags

from lrdit.errors import UserError, as_user_error

# Each is a function in the module of its name, of the values of these flags.
MODES = dict.fromkeys(
  ("train", "sample", "evaluate", "analyze", "benchmark"), ("config", "workdir")
)
MODES |= {"encode": ("config", "output"), "report": ("workdirs", "output")}
SHARED_BY_PROCESSES = ("train", "sample", "evaluate")


def parse_flags(argv: list[str]) -> flags.FlagValues:
  """The flags of one command line.

  Raises:
    UserError: unknown, missing or malformed flags, or config fields.
  """
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, "FILE[:ARGUMENTS].", values, sys_argv=argv)
  flags.DEFINE_string("workdir", None, "Directory of the run.", flag_values=values)
  flags.DEFINE_list("workdirs", None, "Runs to compare (report).", flag_values=values)
  flags.DEFINE_string("output", None, "Directory to make (encode, report).", flag_values=values)
  flags.DEFINE_enum("mode", "train", list(MODES), "What to do.", flag_values=values)
  flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.", flag_values=values)
  flags.DEFINE_integer("num_processes", None, "1: alone, on any cluster.", flag_values=values)
  flags.DEFINE_integer("process_id", None, "From 0.", flag_values=values)
  flags.DEFINE_boolean("debug", False, "Show tracebacks.", flag_values=values)
  flags.DEFINE_boolean("help", False, "Show this help.", flag_values=values)
  try:
    unparsed = values(argv)[1:]
  except (AttributeError, KeyError) as error:  # a config field that does not exist
    overrides = [arg for arg in argv if arg.startswith("--config.")]
    words = re.findall(r"\w+", str(error))
    field = max(overrides, key=lambda arg: sum(f".{w}" in arg for w in words), default=str(error))
    raise UserError(f"{field}: no such config field; configs/common.py lists them", 2) from error
  except (OSError, SyntaxError) as error:  # of several attempts, the last line tells the path
    raise UserError(f"--config cannot be read: {str(error).splitlines()[-1]}", 2) from error
  except flags.Error as error:
    message = f"{str(error).splitlines()[0]} (see --help)"
    raise as_user_error(error) or UserError(message, 2) from error
  if unparsed:
    raise UserError(f"{unparsed[0]!r} is not a flag: write --name=value", 2)
  missing = [name for name in MODES[values.mode] if not values[name].value]
  if missing and not values.help:
    needed = " and ".join(f"--{name}" for name in MODES[values.mode])
    raise UserError(f"--{missing[0]} is missing: --mode={values.mode} needs {needed}", 2)
  others = ("config", "workdir") if values.mode == "report" else ("workdirs",)
  needless = [name for name in others if values[name].value]
  if needless and not values.help:
    raise UserError(f"--{needless[0]} is not used by --mode={values.mode}: leave it out", 2)
  return values
