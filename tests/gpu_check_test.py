"""`launch/gpu_check.sh` on a CPU, with tiny shapes."""

import json
import sys

import pytest

from tests import scripts, tiny
from tests.benchmarks import gpu_check

METHODS = ["full", "narrow", "static", "adaptive"]
PARTS = ["tests", "b2", "cifar10"]  # xl2 is as b2


def start(output, *flags):
  environment = tiny.environment() | {"OUTPUT": str(output), "PYTHON": sys.executable}
  return scripts.start(["bash", scripts.LAUNCH / "gpu_check.sh", *flags], tiny.ROOT, environment)


def test_a_dry_run_does_all_of_it_on_a_cpu(tmp_path):
  status, stdout, stderr = scripts.finish(
    start(tmp_path, "--dry_run", f"--parts={','.join(PARTS)}")
  )
  logs = {name: (tmp_path / f"{name}.log").read_text() for name in PARTS}
  assert (status, stderr) == (0, ""), logs
  read = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in PARTS}
  assert len(read["tests"]) > 1
  assert set(read["tests"].values()) == {"passed"}
  assert read["b2"]["variant"] == "B/2"
  assert [*read["b2"]["training"]] == [*METHODS, "adaptive, masked"]
  assert [*read["b2"]["sampling"]] == METHODS
  (evaluation,) = (arm["evaluation"] for arm in read["cifar10"].values())
  assert 0 < evaluation["checkpoint_step"] < 1_000_000
  assert evaluation["held_out"]["ema"]["loss"] > 0
  table = (tmp_path / "table.md").read_text()
  assert stdout.endswith(table)
  lines = table.splitlines()
  assert len({line.count("|") for line in lines}) == 1
  # A header of two lines, the tests, nine rows of the benchmark, one arm, three parts.
  assert len(lines) == 2 + 1 + 9 + 1 + 3
  assert all(f"| part {name} |  |  |  |  | done" in table for name in PARTS)


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
