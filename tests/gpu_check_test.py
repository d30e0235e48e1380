"""`launch/gpu_check.sh` on a CPU, with tiny shapes."""

import json
import sys

import pytest

from tests import scripts, tiny
from tests.benchmarks import gpu_check

METHODS = ["full", "narrow", "static", "adaptive"]
LINES = {"tests": 1, "b2": 9, "cifar10": 1}  # of the table; xl2 is as b2


def start(output, *flags):
  environment = tiny.environment() | {"OUTPUT": str(output), "PYTHON": sys.executable}
  return scripts.start(["bash", scripts.LAUNCH / "gpu_check.sh", *flags], tiny.ROOT, environment)


def check_tests(result):
  assert len(result) > 1
  assert set(result.values()) == {"passed"}


def check_b2(result):
  assert result["variant"] == "B/2"
  assert [*result["training"]] == [*METHODS, "adaptive, masked"]
  assert [*result["sampling"]] == METHODS


def check_cifar10(result):
  (evaluation,) = (arm["evaluation"] for arm in result.values())
  assert 0 < evaluation["checkpoint_step"] < 1_000_000
  assert evaluation["held_out"]["ema"]["loss"] > 0


CHECKS = {"tests": check_tests, "b2": check_b2, "cifar10": check_cifar10}


@pytest.mark.parametrize(
  "parts", [("tests", "cifar10"), pytest.param(("b2",), marks=pytest.mark.slow)]
)
def test_a_dry_run_does_all_of_it_on_a_cpu(tmp_path, parts):
  flags = ("--dry_run", f"--parts={','.join(parts)}")
  status, stdout, stderr = scripts.finish(start(tmp_path, *flags))
  logs = {name: (tmp_path / f"{name}.log").read_text() for name in parts}
  assert (status, stderr) == (0, ""), logs
  for name in parts:
    CHECKS[name](json.loads((tmp_path / f"{name}.json").read_text()))
  table = (tmp_path / "table.md").read_text()
  assert stdout.endswith(table)
  lines = table.splitlines()
  assert len({line.count("|") for line in lines}) == 1
  assert len(lines) == 2 + sum(LINES[name] for name in parts) + len(parts)  # a header of two
  assert all(f"| part {name} |  |  |  |  | done" in table for name in parts)


def test_the_end_of_a_part_loses_nothing_of_the_others(tmp_path, monkeypatch, capsys):
  """One part ends at its limit, one fails and one has been left out for want of images."""

  def command(name, arguments, output, limit):
    code = {
      "tests": "import time; time.sleep(60)",
      "b2": "raise SystemExit(3)",
      "xl2": f"open({str(output / 'xl2.json')!r}, 'w').write('{{}}')",
    }
    return [sys.executable, "-c", code[name]]

  monkeypatch.setattr(gpu_check, "part_command", command)
  assert gpu_check.main([f"--output={tmp_path}", "--minutes=0.1"]) == 1
  printed = capsys.readouterr().out
  assert "| part tests |  |  |  |  | ended at its limit of 1 s" in printed
  assert "| part b2 |  |  |  |  | failed with status 3, see b2.log" in printed
  assert "| part xl2 |  |  |  |  | done" in printed
  assert "| part cifar10 |  |  |  |  | left out: give --config.data.data_dir" in printed


@pytest.mark.parametrize(
  ("flags", "words"),
  [(["--parts=tests,b3"], "b3 is unknown"), (["--workdir=x"], "'--workdir=x' is not of the form")],
)
def test_wrong_arguments_are_told_before_anything_is_run(flags, words, tmp_path, capsys):
  with pytest.raises(SystemExit) as stop:
    gpu_check.main([f"--output={tmp_path / 'new'}", *flags])
  assert stop.value.code == 2
  assert words in capsys.readouterr().err
  assert not (tmp_path / "new").exists()
