"""What a person sees of a run: a bar on a terminal, plain lines in a log file."""

import contextlib
import logging
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import absl.logging
import tqdm

from lrdit.runtime import cluster

log = logging.getLogger("lrdit")


class _BarHandler(logging.Handler):
  """Prints log lines above a progress bar instead of through it."""

  def emit(self, record: logging.LogRecord) -> None:
    tqdm.tqdm.write(self.format(record), file=sys.stderr)


def start_logging(debug: bool, who: str, is_first: bool) -> None:
  """Sends the package's log lines, and no library's, to standard error.

  Of several processes the first one speaks for all, which do the same.

  A failed write makes orbax and tensorstore print tracebacks from their own
  threads; the error itself reaches the main thread and is told there.

  Args:
    debug: let the libraries speak too.
    who: what lines begin with.
    is_first: this process is alone, or the first of several.
  """
  if not debug:
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logging.raiseExceptions = False  # a full disk under the log file, say
    sys.unraisablehook = _ignore_closed_event_loop
  for handler in [handler for handler in log.handlers if isinstance(handler, _BarHandler)]:
    log.removeHandler(handler)  # of before the processes met
  handler = _BarHandler()
  handler.setFormatter(logging.Formatter(who + "%(message)s"))
  # Lines of progress are DEBUG: a terminal shows the bar instead.
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
  """A bar with rate and time left on the first process's terminal, nothing elsewhere.

  Args:
    total: steps or items in all.
    done: how many were done before this process.
    unit: what is counted.
  """
  return tqdm.tqdm(
    total=total,
    initial=done,
    unit=unit,
    dynamic_ncols=True,
    disable=not (cluster.is_first() and sys.stderr.isatty()),
  )
