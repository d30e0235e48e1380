"""File and field names as messages show them."""

from collections.abc import Sequence

NAMED = 3  # A message lists at most this many names.


def printable(name: str) -> str:
  """Return a file name with escapes for characters that cannot be encoded."""
  return name.encode("utf-8", "backslashreplace").decode()


def name_some(names: Sequence[str]) -> str:
  """Return the first names and the number of the others, as in "a, b, c and 2 more"."""
  more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
  return ", ".join(map(printable, names[:NAMED])) + more
