"""The ratios of a benchmark.json, and their comparison between commits. No speed."""

import json
import os
import shutil
import socket
import subprocess
import tempfile

import pytest

from lrdit.benchmark import compare, ratios
from lrdit.runtime.errors import UserError


def results(adaptive=3.0, guided=(False, False)):
  """The part of a benchmark.json that is read: a full arm of 4 s and an adaptive one."""

  def sampling(seconds, *steps):
    entries = zip(steps, guided, strict=False)
    buckets = [{"step_seconds": {"median": s}, "is_guided": g} for s, g in entries]
    return {"seconds_per_image": seconds, "buckets": buckets}

  return {
    "backend": "cpu",
    "device_kind": "cpu",
    "num_devices": 1,
    "jax": "0.0",
    "variant": "T/2",
    "rounds": 5,
    "matmul_peak": {"seconds": {"median": 0.5}, "flops_per_second": 2e9},
    "training": {
      "full": {"step_seconds": {"median": 4.0}},
      "adaptive": {"step_seconds": {"median": adaptive}},
    },
    "sampling": {"full": sampling(2.0, 2.0), "adaptive": sampling(1.5, 0.75, 1.5)},
  }


def test_ratios_are_those_of_the_arms_that_are_there():
  expected = {"training/adaptive/full": 0.75, "sampling/adaptive/full": 0.75}
  assert ratios.ratios(results()) == expected | {"sampling/lowest/highest": 0.5}
  assert ratios.ratios(results(guided=(False, True))) == expected
  made = results()
  made["training"]["static"] = {"step_seconds": {"median": 2.0}}
  made["training"]["narrow"] = {"step_seconds": {"median": 1.0}}
  found = ratios.ratios(made)
  assert (found["training/static/full"], found["training/narrow/full"]) == (0.5, 0.25)
  assert found["training/adaptive/static"] == 1.5
  made["training"]["adaptive, muon"] = {"step_seconds": {"median": 3.75}}
  assert ratios.ratios(made).items() - found.items() == {("training/adaptive, muon/adaptive", 1.25)}


def test_the_machine_is_described_without_its_name(tmp_path, monkeypatch):
  (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A CPU @ 1 GHz\n")
  monkeypatch.setattr(ratios, "CPU_INFO", tmp_path / "cpuinfo")
  found = ratios.machine(results())
  assert (found["cpu_model"], found["num_cores"]) == ("A CPU @ 1 GHz", os.cpu_count())
  assert (found["matmul_flops_per_second"], found["jax"]) == (2e9, "0.0")
  assert socket.gethostname() not in json.dumps(found)
  monkeypatch.setattr(ratios, "CPU_INFO", tmp_path / "missing")
  assert ratios.machine(results())["cpu_model"] == "unknown"


# A main.py that notes its start and its fields, and takes longer at every start.
MAIN = """
import json, pathlib, sys
made, workdir = json.loads({made!r}), sys.argv[2].partition("=")[2]
with open({log!r}, "a") as file:
  print(made["training"]["adaptive"]["step_seconds"]["median"], *sys.argv[3:], file=file)
if "--config.fails=True" in sys.argv:
  sys.exit("error: no such field")
pathlib.Path(workdir, "benchmark.json").write_text(json.dumps(made))
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
  """A repository with two commits, A tagged, and the log of what ran."""
  if not shutil.which("git"):
    pytest.skip("needs git")
  root = tmp_path / "repository"
  root.mkdir()

  def git(*arguments):
    identity = ["-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)

  git("init")
  for tag, adaptive in (("a", 2.0), ("b", 3.0)):
    made = json.dumps(results(adaptive))
    (root / "main.py").write_text(MAIN.format(made=made, log=str(tmp_path / "log")))
    git("add", "main.py")
    git("commit", "-m", tag)
    git("tag", tag)
  monkeypatch.setattr(compare, "ROOT", root)
  (tmp_path / "temporary").mkdir()
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
  return tmp_path


def test_commits_take_turns_and_leave_nothing(repository, capsys):
  compare.main(["a", "b", "--pairs=3", "--config=x.py", "--config.training.batch_size=8"])
  lines = capsys.readouterr().out.splitlines()
  started = [line.split(" ") for line in (repository / "log").read_text().splitlines()]
  assert [words[0] for words in started] == ["2.0", "3.0", "3.0", "2.0", "2.0", "3.0"]
  for words in started:
    assert words[-1] == "--config.training.batch_size=8"
    assert [word for word in words if word.startswith("--config=")] == ["--config=x.py"]
  line = next(line for line in lines if line.startswith("training/adaptive/full"))
  assert line.split() == ["training/adaptive/full", "0.5", "0.75", *["1.500"] * 3]
  assert not list((repository / "temporary").iterdir())


def test_a_commit_that_is_none_or_fails_is_one_line(repository):
  with pytest.raises(UserError, match=r"^nowhere is no commit of "):
    compare.main(["a", "nowhere"])
  with pytest.raises(UserError, match=r"^the benchmark of A failed: error: no such field$"):
    compare.main(["a", "b", "--config.fails=True"])
  assert not list((repository / "temporary").iterdir())


def test_the_ratio_of_a_pair_is_of_its_two_processes():
  pairs = [(results(a), results(b)) for a, b in ((1.0, 2.0), (2.0, 2.0), (4.0, 3.0))]
  lines = compare.format_pairs(("a", "b"), pairs).splitlines()
  line = next(line for line in lines if line.startswith("training/adaptive "))
  assert line.split() == ["training/adaptive", "2", "2", "1.000", "0.750", "2.000"]


def test_a_benchmark_beside_the_accepted_one(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(compare, "ACCEPTED", tmp_path / "accepted.json")
  for name, adaptive, more in (("old", 2.0, {}), ("new", 3.0, {"variant": "S/2", "jax": "0.1"})):
    made = results(adaptive) | more
    made |= {"ratios": ratios.ratios(made), "machine": ratios.machine(made)}
    (tmp_path / f"{name}.json").write_text(json.dumps(made))
  compare.main([str(tmp_path / "old.json"), "--accept"])
  compare.main([str(tmp_path / "new.json")])
  lines = capsys.readouterr().out.splitlines()
  assert "machine: jax ('0.0' there, '0.1' asked for)" in lines
  assert "settings: variant ('T/2' there, 'S/2' asked for)" in lines
  line = next(line for line in lines[::-1] if line.startswith("training/adaptive/full"))
  assert line.split() == ["training/adaptive/full", "0.500", "0.750", "1.500"]
  (tmp_path / "bad.json").write_text("{}")
  for wrong in (["bad.json"], ["missing.json"]):
    with pytest.raises(UserError, match=r"is no benchmark\.json with ratios"):
      compare.main([str(tmp_path / wrong[0])])
  with pytest.raises(UserError, match=r"^name two commits, or one benchmark\.json"):
    compare.main(["a", "b", "c"])


def test_the_accepted_ratios_are_those_that_a_benchmark_writes():
  kept = json.loads(compare.ACCEPTED.read_text())
  assert kept["machine"].keys() == ratios.machine(results()).keys()
  possible = {f"{kind}/{a}/{b}" for kind in ratios.TIMES for a, b in ratios.PAIRS}
  possible |= {"training/adaptive, masked/adaptive"}
  assert {"training/adaptive/full", "sampling/lowest/highest"} <= kept["ratios"].keys()
  assert kept["ratios"].keys() <= possible | {"sampling/lowest/highest"}
  assert all(0 < ratio < 2 for ratio in kept["ratios"].values())
