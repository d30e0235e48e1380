"""Write docs/configuration.md from the schema: python -m lrdit.config.docs."""

import itertools
import pathlib

from lrdit.config.field import Field
from lrdit.config.schema import FIELDS

PATH = pathlib.Path(__file__).resolve().parents[2] / "docs" / "configuration.md"

HEAD = """# Configuration

`python -m lrdit.config.docs` writes this page from `lrdit/config/schema.py`: do not edit it.

`--config=FILE[:KEY=VALUE,...]` names a recipe, a Python file whose `get_config` returns a
`ConfigDict`. Those of `configs/` take `method` and `variant`; digits and cifar10 take `recipe`
(`muon` or `dissertation`), and imagenet128 takes `classes`, their number. A recipe starts from
`lrdit.config.schema.get_default_config`, which creates all fields below with their defaults, and
changes some of them. `--config.GROUP.FIELD=VALUE` overrides one field. Where None is allowed,
`None` is a value. `--dry_run` prints the resolved run and ends.

The role of a field says whether it may change once a run has begun:

- **defines the run**: it may not; a workdir with another value is refused.
- **may change while training**: training continues and records the change in `changes.jsonl`. The
  other modes need the value that the run was last trained with.
- **choice of the process**: it decides how a process computes; a difference is logged.
- **defines a sample set**: it may differ in every command. `metadata.json` keeps the value; with
  another one the set is sampled anew, and the report does not compare the two.
- **watches only** and **free**: it may differ in every command.
"""


def _row(name: str, field: Field) -> str:
  of_type = {bool: "True, False", str: "text"}.get(type(field.default), "")
  allowed = field.allowed.words() if field.allowed else of_type
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
