"""Plain-text tables for standard output."""

from collections.abc import Callable, Mapping
from typing import Any


def format_table(
  title: str,
  columns: Mapping[str, Callable[[Any], str]],
  entries: Mapping[str, Mapping[str, Any]],
) -> str:
  """Return aligned columns, one line per entry.

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
