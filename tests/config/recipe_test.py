"""Config files: one's own are used, and what is wrong with one is named in one line."""

import pytest

from lrdit.config import flags as command_line
from tests import tiny
from tests.command_line import assert_mistake, assert_one_line, run_in_process

# id: (text of a config file, ARGUMENT with its colon, words that name the cause). The words
# begin after the path of the file.
CONFIG_FILES = {
  "a syntax error": ("x = 1\ndef get_config(:\n", "", ":2: SyntaxError"),
  "a wrong indent": ("def get_config():\n  x = 1\n    y = 2\n", "", ":3: IndentationError"),
  "a zero byte": ("x = '\0'\n", "", ": SyntaxError: source code"),
  "another encoding": (b"x = '\xff'\n", "", ":1: SyntaxError: (unicode error)"),
  "nothing in it": ("", "", " defines no function get_config"),
  "get_config is no function": ("get_config = 3\n", "", " defines no function get_config"),
  "an error while it is read": (
    "\n\nraise RuntimeError('no\\nno')\n",
    "",
    ":3: RuntimeError: no no",
  ),
  "an error of get_config": (
    "def get_config(arg=''):\n  fields = {}\n  return fields['size']\n",
    "",
    ":3: KeyError: 'size'",
  ),
  "an import that fails": ("import no_such_module\n", "", ":1: ModuleNotFoundError: No module"),
  "a name that the schema has not": (
    "from lrdit.config.schema import get_config\n",
    "",
    ":1: ImportError: cannot import name",
  ),
  "an end of the process": ("import sys\nsys.exit(3)\n", "", ":2: SystemExit: 3"),
  "no end": ("def get_config():\n  return get_config()\n", "", ":2: RecursionError"),
  "no return": ("def get_config():\n  pass\n", "", " returns NoneType, not a ConfigDict"),
  "a dict": ("def get_config():\n  return {}\n", "", " returns dict, not a ConfigDict"),
  "no room for an argument": (
    "def get_config():\n  return {}\n",
    ":method=full",
    ": too many positional arguments: leave out what follows the colon",
  ),
  "an argument that is missing": (
    "def get_config(arg):\n  return {}\n",
    "",
    ": missing a required argument: 'arg': write FILE:ARGUMENT",
  ),
  "a field that does not exist": (
    (
      "from configs import digits\n\n"
      "def get_config(arg=''):\n"
      "  config = digits.get_config(arg)\n"
      "  config.data.num_clases = 3\n"
      "  return config\n"
    ),
    "",
    ':5: AttributeError: \'Key "num_clases" does not exist',
  ),
  "a value of another type": (
    (
      "from configs import digits\n\n"
      "def get_config(arg=''):\n"
      "  config = digits.get_config(arg)\n"
      "  config.training.batch_size = 'many'\n"
      "  return config\n"
    ),
    "",
    ":5: TypeError: Could not override field 'batch_size'",
  ),
}


@pytest.mark.parametrize(
  ("text", "argument", "words"), CONFIG_FILES.values(), ids=CONFIG_FILES.keys()
)
@pytest.mark.parametrize("where", ["absolute", "relative"])
def test_a_broken_config_file_is_named(text, argument, words, where, tmp_path, capsys, monkeypatch):
  (tmp_path / "mine").write_bytes(text if isinstance(text, bytes) else text.encode())
  path = tmp_path / "mine"
  if where == "relative":  # to a directory that is not the checkout
    monkeypatch.setattr(tiny, "ROOT", tmp_path)
    path = "mine"
  argv = [f"--config={path}{argument}", f"--workdir={tmp_path}/run"]
  assert_mistake(capsys, monkeypatch, argv, 2, f"{path}{words}", tmp_path)


def test_a_config_file_whose_import_is_broken_names_what_it_imports(tmp_path, capsys, monkeypatch):
  (tmp_path / "mine.py").write_text("import broken_neighbor\n")
  (tmp_path / "broken_neighbor.py").write_text("x = (\n")
  monkeypatch.syspath_prepend(tmp_path)
  argv = [f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run"]
  words = f"{tmp_path}/broken_neighbor.py:1: SyntaxError"
  assert_mistake(capsys, monkeypatch, argv, 2, words, tmp_path)


def test_debug_shows_where_a_config_file_fails(tmp_path, capsys, monkeypatch):
  (tmp_path / "mine.py").write_text("def get_config():\n  return 1 / 0\n")
  argv = [f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run"]
  status, stderr = run_in_process(capsys, monkeypatch, argv)
  assert_one_line(status, 2, stderr, "mine.py:2: ZeroDivisionError: division by zero")
  for flag in ("--debug", "--debug=true", "-debug"):
    status, stderr = run_in_process(capsys, monkeypatch, [flag, *argv])
    assert status == 2
    assert f'File "{tmp_path}/mine.py", line 2, in get_config' in stderr
    assert stderr.rstrip().splitlines()[-1].startswith("error: --config cannot be read")


def test_a_config_of_another_program_lacks_fields(tmp_path, capsys, monkeypatch):
  (tmp_path / "mine.py").write_text(
    "from ml_collections import ConfigDict\n"
    "def get_config():\n  return ConfigDict({'seed': 0, 'learning_rate': 0.1})\n"
  )
  argv = [f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run"]
  words = ": begin get_config with lrdit.config.schema.get_default_config"
  assert_mistake(capsys, monkeypatch, argv, 2, words, tmp_path)


def test_a_config_of_one_s_own_is_used(tmp_path, monkeypatch):
  """Wherever it lies, and in any order of flags; its own argument is handed to it."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "mine.py").write_text(
    "from configs import digits\n"
    "def get_config(arg):\n  config = digits.get_config()\n  config.seed = int(arg)\n"
    "  return config\n"
  )
  (tmp_path / "flags").write_text("--config.training.num_steps=7\n--workdir=w\n")
  argv = ["main.py", "--config.data.flip", "--config.model.depth", "3", "--config", "mine.py:5"]
  values = command_line.parse_flags([*argv, "--flagfile=flags", "--noconfig.model.remat"])
  config = values.config
  assert (config.seed, config.training.num_steps, config.model.depth) == (5, 7, 3)
  assert (config.data.flip, config.model.remat, values.workdir) == (True, False, "w")
