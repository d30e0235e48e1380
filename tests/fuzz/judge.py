"""What may come of reading a damaged file: a result or one line, within bounds.

The bounds: 5 s of this process's CPU, 1 GiB of new address space, no file outside the directory,
no pickle, no other program. Time is CPU time, as a busy machine hangs nothing.
"""

import contextlib
import dataclasses
import os
import pathlib
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from lrdit.runtime.errors import as_user_error
from tests.tiny import ROOT

CPU_SECONDS = 5
MEMORY_BYTES = 1 << 30
MAX_MESSAGE = 4000  # characters
# Where a library may read from: itself, and the system.
PLACES = (
  *filter(None, sys.path),
  sys.prefix,
  sys.base_prefix,
  ROOT,
  "/usr",
  "/lib",
  "/proc",
  "/sys",
)
LIBRARIES = tuple({os.path.realpath(place) + os.sep for place in PLACES})
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Hung(BaseException):
  """No handler of the package may catch it."""


class Escaped(BaseException):
  """Nor this."""


class _Watch:
  """Sees every file that Python opens while one directory is read."""

  def __init__(self):
    self.directory: str | None = None  # None while nothing is watched
    self.found: list[str] = []

  def __call__(self, event: str, args: tuple[Any, ...]) -> None:
    """Be an audit hook of the interpreter."""
    if self.directory is None:
      return
    if event == "open":
      self._check(args[0], bool((args[2] or 0) & WRITES))
    elif event in CHANGES:
      if event in ("os.rename", "os.link"):
        paths, descriptors = args[:2], args[2:4]
      else:
        paths, descriptors = args[:1], [x for x in args[-1:] if isinstance(x, int)]
      for path, at in zip(paths, [*descriptors, -1], strict=False):
        self._check(path, writes=True, at=at)
    elif event == "pickle.find_class":
      self._refuse(f"unpickled {args[0]}.{args[1]}")
    elif event in PROGRAMS:
      self._refuse(f"{event} of {args[:1]}")

  def _check(self, path: Any, writes: bool, at: int = -1) -> None:
    if isinstance(path, int) or path is None:
      return
    # A path may be relative to an open directory.
    real = os.path.realpath(
      os.path.join(f"/proc/self/fd/{at}" if at >= 0 else "", os.fsdecode(path))
    )
    inside = real == self.directory or real.startswith(f"{self.directory}{os.sep}")
    is_cache = real.endswith(".pyc") or "__pycache__" in real or real == os.devnull
    if not (inside or is_cache or (real.startswith(LIBRARIES) and not writes)):
      self._refuse(f"{'wrote' if writes else 'read'} {real}")

  def _refuse(self, what: str) -> None:
    self.found.append(what)
    raise Escaped(what)


_watch = _Watch()
_hooked: list[_Watch] = []


@contextlib.contextmanager
def _watched(directory: pathlib.Path) -> Iterator[list[str]]:
  if not _hooked:
    sys.addaudithook(_watch)
    _hooked.append(_watch)
  _watch.found, _watch.directory = [], os.path.realpath(directory)
  try:
    yield _watch.found
  finally:
    _watch.directory = None


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
  def stop(*_: Any) -> None:
    raise Hung

  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
  soft, hard = resource.getrlimit(resource.RLIMIT_AS)
  handler = signal.signal(signal.SIGPROF, stop)
  resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, hard))
  signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    signal.signal(signal.SIGPROF, handler)


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What came of one input; `fault` is "" for a result or a proper refusal."""

  refused: bool
  fault: str = ""
  text: str = ""  # the traceback, or the one line


def _chain(error: BaseException | None) -> Iterator[BaseException]:
  seen: list[BaseException] = []
  while error is not None and error not in seen:
    yield error
    seen.append(error)
    error = error.__cause__ or error.__context__


def _place(error: BaseException) -> str:
  """Return the innermost line of the package, which tells findings apart."""
  frames = [
    f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}lrdit{os.sep}" in f[0]
  ]
  return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "?"


def _fault_of(error: BaseException) -> str:
  if isinstance(error, Hung):
    return f"hangs at {_place(error)}"
  for cause in _chain(error):
    if isinstance(cause, MemoryError) or "bad_alloc" in str(cause):
      return f"takes a gigabyte at {_place(cause)}"
  told = as_user_error(error) if isinstance(error, Exception) else None
  if told is None:
    return f"{type(error).__name__} at {_place(error)}"
  message = str(told)
  if not message.strip() or len(message) > MAX_MESSAGE:
    return f"a message of {len(message)} characters at {_place(error)}"
  if not message.isprintable():
    return f"an unprintable message at {_place(error)}"
  return ""


def judge(read: Callable[[pathlib.Path], Any], directory: pathlib.Path) -> Verdict:
  """Read a directory and say whether what came of it is right."""
  error: BaseException | None = None
  with _watched(directory) as found, _bounded():
    try:
      read(directory)
    except KeyboardInterrupt:
      raise
    except BaseException as raised:
      error = raised
  if found:
    return Verdict(error is not None, found[0], _text(error))
  if error is None:
    return Verdict(refused=False)
  fault = _fault_of(error)
  return Verdict(True, fault, _text(error) if fault else str(as_user_error(error)))


def _text(error: BaseException | None) -> str:
  return "".join(traceback.format_exception(error)) if error else ""
