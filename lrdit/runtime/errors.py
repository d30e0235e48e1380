"""Errors that a user can fix, each reported in one line."""

import errno
import os
import resource
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import NoReturn

from ml_collections import ConfigDict

from lrdit.runtime.text import one_line

# jax raises errors with these words in the other processes when one of several ends.
OTHERS_ARE_GONE = ("Connection closed by peer", "Connection reset by peer", "Gloo ", "NCCL")
OTHERS_ARE_GONE += ("coordination service", "Coordination service")
RESTART_STATUS = 75  # EX_TEMPFAIL: a launcher starts all processes again
# With one of these set, jax raises at the first such value.
DEBUG_VARIABLES = ("JAX_DEBUG_NANS", "JAX_DEBUG_INFS")


class UserError(Exception):
  """A problem that the user can fix; the message is one line that names the cause and the fix.

  `main.py` prints it without a traceback and exits with `exit_status`.
  """

  def __init__(self, message: str, exit_status: int = 1):
    super().__init__(one_line(message))
    self.exit_status = exit_status


def _causes(error: BaseException | None) -> Iterator[BaseException]:
  while error is not None:
    yield error
    error = error.__cause__


def system_limit(error: BaseException) -> UserError | None:
  """Return the `UserError` for a system limit, or None for any other error.

  Code that treats errors as damaged files checks this first, as the files are intact then.
  """
  code = error.errno if isinstance(error, OSError) else None
  if code in (errno.EMFILE, errno.ENFILE) or os.strerror(errno.EMFILE) in str(error):
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return UserError(
      f"too many open files: the limit of this process is {soft}; raise it by 'ulimit -n NUMBER'"
    )
  if code == errno.ENOMEM or isinstance(error, MemoryError):
    return UserError(
      f"out of memory ({str(error) or 'the machine gives no more'}): lower the batch sizes or "
      "config.data.cache_gib, raise 'ulimit -v' where one is set, or use a larger machine"
    )
  if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
    return UserError(
      "no more threads can be started: raise 'ulimit -u NUMBER', or the pids limit of the container"
    )
  return None


def others_are_gone(cause: str) -> UserError:
  """Return the `UserError` of a process that has lost another one."""
  return UserError(
    f"another process has ended or does not answer ({cause}): start all again; they go on from the "
    "last checkpoint",
    RESTART_STATUS,
  )


def as_user_error(error: Exception) -> UserError | None:
  """Return the `UserError` for an error, or None where it is a bug in this package."""
  for cause in _causes(error):
    if isinstance(cause, UserError):
      return cause
    if (limit := system_limit(cause)) is not None:
      return limit
    if isinstance(cause, AttributeError) and isinstance(getattr(cause, "obj", None), ConfigDict):
      return UserError(
        f"the config has no field {cause.name!r}: begin get_config with "
        "lrdit.config.schema.get_default_config, which makes all fields",
        2,
      )
    if isinstance(cause.__context__, UserError):  # a library failed while ours was handled
      return cause.__context__
    asked = [name for name in DEBUG_VARIABLES if os.environ.get(name)]
    if isinstance(cause, FloatingPointError) and asked:
      return UserError(
        f"{str(cause).splitlines()[0]}, raised because {' and '.join(asked)} is set: use --debug "
        "to locate it, or unset the variable to continue"
      )
    if isinstance(cause, OSError) and cause.errno and cause.filename:
      return UserError(
        f"{cause.filename}: {os.strerror(cause.errno)}: check that the path exists, is writable "
        "and has space left"
      )
  if isinstance(error, OSError) and error.errno:
    return UserError(f"{os.strerror(error.errno)} while writing: make space, or write elsewhere")
  if any(words in str(error) for words in OTHERS_ARE_GONE):
    return others_are_gone(str(error).splitlines()[0][:200])
  if "RESOURCE_EXHAUSTED" in str(error):
    return UserError(
      "the device is out of memory: use config.model.remat=True or config.model.dtype=bfloat16, "
      "lower config.sampling.batch_size, or begin a run with a lower config.training.batch_size"
    )
  return None


def print_error(error: BaseException, with_traceback: bool, who: str = "") -> int:
  """Print the error that ended a command and return the exit status.

  The error is one line if the user can fix it, after its traceback with `with_traceback`. `who`
  is the line's prefix, which names one of several processes.
  """
  if isinstance(error, KeyboardInterrupt):
    print(f"{who}interrupted", file=sys.stderr)
    return 130
  user_error = as_user_error(error)
  if user_error is None or with_traceback:
    traceback.print_exception(error)
  if user_error is None:
    if who:
      print(f"{who}failed", file=sys.stderr)
    return 70
  print(f"{who}error: {user_error}", file=sys.stderr)
  return user_error.exit_status


_ending = threading.Lock()


def end_process(error: BaseException, with_traceback: bool, who: str) -> NoReturn:
  """End one of several processes with `print_error`'s line and status, from any thread.

  Nothing is cleaned up: at a normal exit, jax would wait for the other processes, which wait for
  this one.
  """
  _ending.acquire()  # for ever: where two threads see the end, only the first reports it
  os._exit(print_error(error, with_traceback, who))
