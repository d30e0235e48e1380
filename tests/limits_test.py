"""How long a file and a function may be (docs/contributing.md)."""

import ast

from tests.tiny import ROOT

LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 450, 60
FILES = [
  path
  for pattern in ("*.py", "*/*.py", "*/*/*.py")
  for path in ROOT.glob(pattern)
  if path.is_file()
]


def test_files_are_short():
  own = [path for path in FILES if ".venv" not in path.parts]
  assert len(own) > 100
  lengths = {str(path): len(path.read_text().splitlines()) for path in own}
  assert {name: n for name, n in lengths.items() if n > LINES_OF_A_FILE} == {}


def test_functions_are_short():
  long = []
  for path in (*ROOT.glob("lrdit/**/*.py"), *ROOT.glob("tests/**/*.py")):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.FunctionDef):
        lines = node.end_lineno - node.lineno + 1
        long += [(path.name, node.name, lines)] if lines > LINES_OF_A_FUNCTION else []
  assert not long
