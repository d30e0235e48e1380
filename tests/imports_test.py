"""Which package may import which: an import points down, and there is no cycle."""

import ast

import pytest

from tests.tiny import ROOT

# Package or module: those below it that it may import beside its own.
MAY_IMPORT = {
  "runtime": (),
  "rank": ("runtime",),
  "diffusion": ("runtime",),
  "model": ("rank", "runtime"),
  "data": ("model", "runtime"),
  "train": ("data", "model", "rank", "diffusion", "runtime"),
  "sampling": ("data", "model", "diffusion", "runtime"),
  "evaluation": ("train", "data", "runtime"),
}
MAY_IMPORT["config"] = tuple(MAY_IMPORT)
MAY_IMPORT["experiment"] = tuple(MAY_IMPORT)
MAY_IMPORT["benchmark"] = tuple(MAY_IMPORT)
MAY_IMPORT["run"] = tuple(MAY_IMPORT)
MAY_IMPORT["analysis"] = tuple(MAY_IMPORT)
MAY_IMPORT["report"] = tuple(MAY_IMPORT)
MAY_IMPORT["modes"] = tuple(MAY_IMPORT)


def imported(path):
  """The parts of the names of our modules that a file imports, each as a list."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path} imports relatively"
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
      continue
    yield from (name.split(".")[1:] for name in names if name.split(".")[0] in ("lrdit", "configs"))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_lies_below(package):
  paths = [*ROOT.glob(f"lrdit/{package}/*.py"), *ROOT.glob(f"lrdit/{package}.py")]
  assert paths
  allowed = {*MAY_IMPORT[package], package}
  wrong = [
    (path.name, ".".join(parts))
    for path in paths
    for parts in imported(path)
    if parts[0] not in allowed
  ]
  assert not wrong


def test_every_package_is_in_the_table():
  found = {path.parent.name for path in ROOT.glob("lrdit/*/__init__.py")}
  assert found <= set(MAY_IMPORT)


def test_modes_do_not_import_each_other():
  for path in ROOT.glob("lrdit/modes/*.py"):
    assert not [parts for parts in imported(path) if parts[0] == "modes"], path.name
