"""No import cycle: packages import only those that tests/packages.py lets them."""

import ast
import itertools
import re

import pytest

from tests.packages import MAY_IMPORT
from tests.tiny import ROOT

# A string that names a module of ours, as for importlib, or the beginning of such a name.
MODULE = re.compile(r"lrdit(\.\w+)+|configs\.[\w.]*")


def imported(path):
  """The names of our modules that a file imports or has in a string."""
  for node in ast.walk(ast.parse(path.read_text())):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path} imports relatively"
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
      names = [node.value] if MODULE.fullmatch(node.value) else []
    yield from (name for name in names if name.split(".")[0] in ("lrdit", "configs"))


def package_of(name):
  """The package or module below lrdit that a module's name begins with; None for recipes."""
  top, *parts = name.split(".")
  return (parts or ["__init__"])[0] if top == "lrdit" else None


def wrong_imports(package, root=ROOT):
  paths = [*root.glob(f"lrdit/{package}/*.py"), *root.glob(f"lrdit/{package}.py")]
  assert paths
  allowed = {*MAY_IMPORT[package], package}
  return [
    (path.name, name)
    for path in paths
    for name in imported(path)
    if package_of(name) not in allowed
  ]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_lies_below(package):
  assert not wrong_imports(package)


@pytest.mark.parametrize(
  "line",
  [
    "import lrdit",
    "import lrdit.train.step",
    "from lrdit import train",
    "from lrdit.train import step",
    "from configs import digits",
    "importlib.import_module('lrdit.train.step')",
    "importlib.import_module('configs.digits')",
    "importlib.import_module(f'configs.{name}')",
    "HOMES = {'step': 'lrdit.train'}",
  ],
)
def test_a_wrong_import_is_seen(line, tmp_path):
  (tmp_path / "lrdit/rank").mkdir(parents=True)
  (tmp_path / "lrdit/rank/x.py").write_text(f"import lrdit.runtime\n{line}\n")
  assert len(wrong_imports("rank", tmp_path)) == 1


def test_every_package_and_module_is_in_the_table():
  packages = {path.parent.name for path in ROOT.glob("lrdit/*/__init__.py")}
  assert packages | {path.stem for path in ROOT.glob("lrdit/*.py")} == set(MAY_IMPORT)


def test_the_table_has_no_cycle():
  """Each entry names only entries above it."""
  names = list(MAY_IMPORT)
  for i, name in enumerate(names):
    assert set(MAY_IMPORT[name]) <= set(names[:i]), name


def test_what_the_table_lists_one_by_one_is_imported():
  explicit = itertools.takewhile(lambda name: name != "config", MAY_IMPORT)
  for package in explicit:
    paths = ROOT.glob(f"lrdit/{package}/*.py")
    found = {package_of(name) for path in paths for name in imported(path)}
    assert found - {package} == set(MAY_IMPORT[package]), package


def test_modes_do_not_import_each_other():
  for path in ROOT.glob("lrdit/modes/*.py"):
    assert not [name for name in imported(path) if package_of(name) == "modes"], path.name
