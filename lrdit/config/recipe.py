"""Load the Python file that --config names, whose get_config returns a ConfigDict."""

import inspect
import os
import pathlib
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from lrdit.runtime.errors import UserError
from lrdit.runtime.paths import local_path

MODULE = "lrdit_config_file"  # The file becomes this module, which dataclasses look up.


def load(flag: str) -> ConfigDict:
  """Return the config of --config=FILE[:ARGUMENT]; ARGUMENT is passed to get_config.

  Raises:
    UserError: anything is wrong with the flag or the file; the message has the line at fault.
  """
  local_path("--config", flag, 2)  # an address is not FILE:ARGUMENT
  path, colon, argument = flag.partition(":")
  if ":" in argument:
    fix = "write FILE:KEY=VALUE,KEY=VALUE, with one colon"
    raise UserError(f"--config={flag} has a colon too many: {fix}", 2)
  if not path:
    raise UserError(f"--config={flag} names no file: write FILE or FILE:KEY=VALUE,...", 2)
  return load_file(local_path("--config", path, 2), *([argument] if colon else []))


def load_file(path: str, *arguments: str) -> ConfigDict:
  """Return the config of a file, with at most one argument; errors are as in `load`."""
  module = _run(path)
  get_config = getattr(module, "get_config", None)
  if not callable(get_config):
    raise UserError(f"--config: {path} defines no function get_config, which gives the config", 2)
  try:
    inspect.signature(get_config).bind(*arguments)
  except TypeError as error:
    fix = "leave out what follows the colon" if arguments else "write FILE:ARGUMENT"
    raise UserError(f"--config: get_config of {path}: {error}: {fix}", 2) from error
  config = _call(path, get_config, *arguments)
  if not isinstance(config, ConfigDict):
    found = f"{type(config).__name__}, not a ConfigDict: end it with 'return config'"
    raise UserError(f"--config: get_config of {path} returns {found}", 2)
  return config.lock()


def _run(path: str) -> types.ModuleType:
  try:
    text = pathlib.Path(path).read_bytes()
  except OSError as error:
    where = "" if os.path.isabs(path) else f" (looked for in {os.getcwd()})"
    raise UserError(f"--config={path} cannot be read: {error.strerror}{where}", 2) from error
  module = types.ModuleType(MODULE)
  module.__file__ = path
  sys.modules[MODULE] = module
  _call(path, lambda: exec(compile(text, path, "exec"), module.__dict__))
  return module


def _call(path: str, call: Callable, *arguments: str) -> Any:
  """Call a function of the file; raise its errors as a UserError of one line."""
  try:
    return call(*arguments)
  except UserError:  # the file's own, about its argument
    raise
  except (Exception, SystemExit) as error:
    where, message = path, str(error)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename:  # in the file, or in one it imports
      where, lines, message = error.filename, [error.lineno], error.msg
    where += f":{lines[-1]}" if lines and lines[-1] else ""
    what = type(error).__name__ + (f": {message}" if message else "")
    raise UserError(f"--config cannot be read: {where}: {what}", 2) from error
