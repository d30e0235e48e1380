"""Write docs/configuration.md from the schema: python -m lrdit.config.docs."""

import itertools
import pathlib

from lrdit.config.schema import FIELDS, Field

PATH = pathlib.Path(__file__).resolve().parents[2] / "docs" / "configuration.md"

HEAD = """# Configuration

`python -m lrdit.config.docs` writes this page from `lrdit/config/schema.py`: do not edit it.

`--config=FILE[:KEY=VALUE,...]` names a recipe, a Python file whose `get_config` returns a
`ConfigDict`; those of `configs/` take `method` and `variant`. A recipe starts from
`lrdit.config.schema.get_default_config`, which makes all fields below with their defaults, and
changes what differs. `--config.GROUP.FIELD=VALUE` overrides one field; where None is allowed,
`None` is a value. `--dry_run` prints the resolved run and ends.

The role of a field says who may change it once a run has begun:

- **defines the run**: a workdir of another value is refused.
- **may change while training**: training goes on and notes the change in `changes.jsonl`; the
  other modes need the value that the run was trained with last.
- **choice of the process**: how a process computes; a difference is logged.
- **watches only** and **free**: may differ in every command.
"""


def _row(name: str, field: Field) -> str:
  allowed = {bool: "True, False", str: "text"}.get(type(field.default), "")
  allowed = field.allowed.words() if field.allowed else allowed
  allowed += f", or None: {field.none}" if field.none else ""
  default = "" if field.default is None and not field.none else f"`{field.default!r}`"
  cells = (f"`{name}`", default, field.meaning, allowed, field.role.value)
  return f"| {' | '.join(cells)} |"


def render() -> str:
  """Return the page."""
  parts = [HEAD]
  for group, names in itertools.groupby(FIELDS, lambda name: name.rpartition(".")[0]):
    title = f"## {group}" if group else "## The run"
    head = "| field | default | meaning | allowed | role |\n|---|---|---|---|---|"
    rows = [_row(name.rpartition(".")[2], FIELDS[name]) for name in names]
    parts.append("\n".join([title, "", head, *rows, ""]))
  return "\n".join(parts)


if __name__ == "__main__":
  PATH.write_text(render())
