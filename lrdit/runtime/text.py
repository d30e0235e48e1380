"""Names and tables as messages and standard output show them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

NAMED = 3  # A message lists at most this many names.
LONGEST = 2000  # characters of a message, which may quote a file


def printable(name: str) -> str:
  """Return a file name with escapes for characters that cannot be encoded."""
  return name.encode("utf-8", "backslashreplace").decode()


def one_line(text: str) -> str:
  """Return a message in one line, with escapes for what a terminal would obey or cannot show.

  A long one is cut in the middle, as its cause is at the beginning and its fix at the end.
  """
  words = " ".join(text.split())
  if len(words) > LONGEST:
    words = f"{words[: LONGEST // 2]} ... {words[-LONGEST // 2 :]}"
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


def name_some(names: Sequence[str]) -> str:
  """Return the first names and the number of the others, as in "a, b, c and 2 more"."""
  more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
  return ", ".join(map(printable, names[:NAMED])) + more


def format_table(
  title: str,
  columns: Mapping[str, Callable[[Any], str]],
  entries: Mapping[str, Mapping[str, Any]],
) -> str:
  """Return aligned columns of plain text, one line per entry.

  `title` heads the entries' names, and `columns` maps each heading to its text of an entry.
  """
  rows = [[title, *columns]]
  rows += [[name, *(text(entry) for text in columns.values())] for name, entry in entries.items()]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for name, *cells in rows:
    cells = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
    lines.append("  ".join([f"{name:<{widths[0]}}", *cells]))
  return "\n".join(lines)
