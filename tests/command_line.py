"""The command line within the tests' own process, and what an error of a user looks like."""

import main
from tests import tiny

DIGITS = "--config=configs/digits.py"
CIFAR = "--config=configs/cifar10.py"
CELEBA = "--config=configs/celeba.py"


def run_in_process(capsys, monkeypatch, argv):
  """Return the exit status and standard error of main.py, run from the checkout."""
  monkeypatch.chdir(tiny.ROOT)
  capsys.readouterr()
  status = main.run(["main.py", *argv])
  return status, capsys.readouterr().err


def assert_one_line(status, expected_status, stderr, words):
  assert status == expected_status, stderr
  lines = [line for line in stderr.splitlines() if line.strip()]
  assert len(lines) == 1, stderr
  assert lines[0].startswith("error: ")
  assert words in lines[0]
  assert "Traceback" not in stderr


def assert_mistake(capsys, monkeypatch, argv, status, words, tmp):
  """Check that a command line ends in one line of error and writes nothing; "{tmp}" is `tmp`."""
  before = sorted(tmp.rglob("*"))
  argv = [flag.replace("{tmp}", str(tmp)) for flag in argv]
  got, stderr = run_in_process(capsys, monkeypatch, argv)
  assert_one_line(got, status, stderr, words.replace("{tmp}", str(tmp)))
  assert sorted(tmp.rglob("*")) == before  # nothing was written


def assert_tiny_mistake(capsys, monkeypatch, flags, status, words, tmp):
  """As `assert_mistake`, of flags that follow those of a tiny run."""
  own = any(flag.startswith("--config=") for flag in flags)
  argv = tiny.command(tmp / "run", *flags)[3 if own else 2 :]
  assert_mistake(capsys, monkeypatch, argv, status, words, tmp)
