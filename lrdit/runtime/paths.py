"""Paths that a user names."""

import os
import re

from lrdit.runtime.errors import UserError

# gs://bucket/run, s3://..., hf://..., and file:/run as well as file:///run.
URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://|file:/")


def is_plain_name(name: str) -> bool:
  """Return whether a name is that of an entry of a directory, and leads nowhere else."""
  return name not in ("", ".", "..") and not {"/", "\0"} & set(name)


def local_path(name: str, path: str, exit_status: int = 1) -> str:
  """Return a path with the home directory filled in; "" stays "".

  Raises:
    UserError: the path is an address such as gs://bucket/run, holds a zero byte, or begins with
      the name of a user without a home directory. The message begins with `name`.
  """
  if URL.match(path):  # opened as a path, it would make a directory named "gs:"
    local = re.sub(r"^file:/+", "/", path)
    fix = f"write {local}" if local != path else "mount it and name the directory"
    raise UserError(f"{name}={path} is an address, not a path on this machine: {fix}", exit_status)
  if "\0" in path:
    raise UserError(f"{name}={path!r} holds a zero byte, which no path can", exit_status)
  expanded = os.path.expanduser(path)
  if path.startswith("~") and expanded == path:
    user = path.split("/")[0]
    raise UserError(f"{name}={path}: {user} has no home directory; write ./{path}", exit_status)
  return expanded
