"""The cache of compiled programs, in which an entry that cannot be read is replaced.

jax writes an entry in one piece to its final name and never overwrites one. What a full disk or a
kill has cut off would be reported, and compiled again, by every later process.
"""

import contextlib
import functools
import logging
import os
import pathlib
import re
import warnings
from collections.abc import Callable
from typing import Any

MIN_CACHED_SECONDS = 0.1  # Faster compilations are not worth a file.
UNREADABLE = re.compile(r"Error reading persistent compilation cache entry for '(.*?)'")

log = logging.getLogger("lrdit")


def use_compilation_cache() -> None:
  """Keep compiled programs in ~/.cache/lrdit, so that only new ones are compiled.

  XDG_CACHE_HOME or JAX_COMPILATION_CACHE_DIR names another directory.
  """
  import jax

  if not jax.config.jax_compilation_cache_dir:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    jax.config.update("jax_compilation_cache_dir", os.path.join(home, "lrdit"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_CACHED_SECONDS)
  directory = pathlib.Path(jax.config.jax_compilation_cache_dir)
  warnings.showwarning = functools.partial(_remove_unreadable, directory, warnings.showwarning)


def _remove_unreadable(
  directory: pathlib.Path,
  show: Callable[..., None],
  message: Warning | str,
  *args: Any,
  **kwargs: Any,
) -> None:
  """Remove the entries of the program that jax warns it cannot read; show any other warning.

  jax compiles the program next and writes its entry. The warning names no file, so entries of
  other programs of that name go too.
  """
  found = UNREADABLE.match(str(message))
  if not found:
    show(message, *args, **kwargs)
    return
  log.info("an entry of %s cannot be read, and is compiled again: %s", directory, found[1])
  for path in directory.glob("*-cache"):
    if path.name.startswith(f"{found[1]}-"):
      with contextlib.suppress(OSError):  # as in a directory that others own
        path.unlink()
