"""`--mode=report` from the command line."""

import json
import shlex

import pytest

import main
from tests import tiny
from tests.workdirs import make_run


def run_main(capsys, monkeypatch, *flags):
  monkeypatch.setattr(main.startup, "prepare", list)
  capsys.readouterr()
  status = main.run(["main.py", *flags])
  return status, capsys.readouterr().err.strip()


def test_the_command_line_writes_both_files(tmp_path, capsys, monkeypatch):
  workdirs = [make_run(tmp_path / method, method) for method in ("full", "adaptive")]
  output = tmp_path / "a" / "b"
  flags = ["--mode=report", f"--workdirs={','.join(workdirs)}", f"--output={output}"]
  assert run_main(capsys, monkeypatch, *flags)[0] == 0
  assert (output / "report.html").read_text().startswith("<!DOCTYPE html>")
  stored = json.loads((output / "report.json").read_text())
  assert stored["made"]["command"] == shlex.join(["python", "main.py", *flags])
  assert [arm["name"] for arm in stored["arms"]] == ["full", "adaptive"]
  assert {row["key"]: row for row in stored["rows"]}["held_out_loss_ema"]["cells"][0]["summaries"]
  assert not {"image", "pixels"} & stored["grids"][0].keys()
  assert sorted(path.name for path in output.iterdir()) == ["report.html", "report.json"]


@pytest.mark.parametrize(
  ("flags", "status", "words"),
  [
    (["--mode=report"], 2, "--workdirs is missing"),
    (["--mode=report", "--workdirs=a"], 2, "--output is missing"),
    (["--mode=report", "--workdirs=a", "--output=b", "--workdir=c"], 2, "--workdir is not used"),
    (
      ["--mode=report", "--workdirs=a", "--output=b", "--config=configs/digits.py"],
      2,
      "--config is not used by --mode=report",
    ),
    (
      ["--config=configs/digits.py", "--workdir=a", "--workdirs=b"],
      2,
      "--workdirs is not used by --mode=train",
    ),
    (["--mode=report", "--workdirs=/nowhere", "--output=b"], 1, "/nowhere is not the workdir"),
  ],
)
def test_wrong_flags_end_in_one_line(flags, status, words, capsys, monkeypatch):
  monkeypatch.chdir(tiny.ROOT)
  got, stderr = run_main(capsys, monkeypatch, *flags)
  assert (got, len(stderr.splitlines())) == (status, 1), stderr
  assert stderr.startswith("error: ")
  assert words in stderr
