"""Logging and progress: a bar on a terminal, plain lines in a log file."""

import contextlib
import logging
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import absl.logging
import jax
import tqdm

from lrdit.runtime import cluster

log = logging.getLogger("lrdit")


class _BarHandler(logging.Handler):
  """Prints log lines above a progress bar instead of through it."""

  def emit(self, record: logging.LogRecord) -> None:
    tqdm.tqdm.write(self.format(record), file=sys.stderr)


def start_logging(debug: bool, who: str, is_first: bool) -> None:
  """Send the first process's log lines to standard error, each with the prefix `who`.

  `who` is "" for a process on its own. The libraries log only with `debug`, and the other processes
  log only errors.
  """
  if not debug:
    # After a failed write, orbax and tensorstore print tracebacks from their own threads. The error
    # itself reaches the main thread, which reports it.
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logging.raiseExceptions = False  # as on a full disk under the log file
    sys.unraisablehook = _ignore_closed_event_loop
    if who:  # XLA logs several lines about a lost process, before the error that is printed
      jax.config.update("jax_logging_level", "CRITICAL")
  for handler in [handler for handler in log.handlers if isinstance(handler, _BarHandler)]:
    log.removeHandler(handler)  # from before the processes met
  handler = _BarHandler()
  handler.setFormatter(logging.Formatter(who + "%(message)s"))
  # Progress lines are DEBUG, as a terminal shows the bar instead.
  level = logging.INFO if sys.stderr.isatty() else logging.DEBUG
  handler.setLevel(level if is_first else logging.ERROR)
  log.addHandler(handler)
  log.setLevel(logging.DEBUG)
  log.propagate = False


def _ignore_closed_event_loop(unraisable: Any) -> None:
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def log_to_file(path: pathlib.Path) -> Iterator[None]:
  """Append the package's log lines to `path`, with times."""
  handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
  handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
  log.addHandler(handler)
  try:
    yield
  finally:
    log.removeHandler(handler)
    handler.close()


def make_bar(total: int, done: int, unit: str) -> tqdm.tqdm:
  """Return a progress bar that only the first process's terminal shows.

  `done` of the `total` items were finished before this process started.
  """
  hidden = not (cluster.is_first() and sys.stderr.isatty())
  return tqdm.tqdm(total=total, initial=done, unit=unit, dynamic_ncols=True, disable=hidden)
