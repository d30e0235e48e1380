"""Names of files and fields as messages show them."""

from collections.abc import Sequence

NAMED = 3  # A message lists at most this many names.


def printable(name: str) -> str:
  """Return a file name with escapes for what no terminal or log file can encode."""
  return name.encode("utf-8", "backslashreplace").decode()


def name_some(names: Sequence[str]) -> str:
  """Return the first three names and the number of the others, as in "a, b, c and 2 more"."""
  more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
  return ", ".join(map(printable, names[:NAMED])) + more
