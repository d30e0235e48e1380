"""The verdicts of tests.endurance, and its commands at the smallest size."""

import json
import sys
import time

import numpy as np
import pytest

from tests.endurance import __main__ as command
from tests.endurance import disks, killing, soak, verdict
from tests.endurance.targets import Target

# Counts to 300 in a file, and holds what it is told to.
WORKER = """
import pathlib, sys, time
held = []
for i in range(1, 301):
  if "memory" in sys.argv:
    held.append(bytearray(b"x" * 200_000))
  if "files" in sys.argv and i % 20 == 0:
    held.append(open(sys.argv[1]))
  time.sleep(0.003)
  pathlib.Path(sys.argv[1]).write_text(str(i))
"""
# Counts to 40 in a directory, from where it was stopped, or anew, or with a mistake at the end.
STAND_IN = """
import pathlib, sys, time
path, kind = pathlib.Path(sys.argv[1], "count"), sys.argv[2]
first = int(path.read_text()) if path.exists() and kind != "forgets" else 0
print("going on from", first, flush=True)
for i in range(first + 1, 41):
  time.sleep(0.01)
  path.with_name("new").write_text(str(i))
  path.with_name("new").replace(path)
if kind == "errs" and first:
  path.write_text("41")
"""


def read_count(path):
  text = path.read_text() if path.exists() else ""
  return int(text or 0)


def made_series(**slopes):
  """600 samples of 6,000 units of work, with noise, a warm-up and a growth per unit of work."""
  rng, done = np.random.default_rng(0), np.linspace(0, 6000, 600)
  warm = np.exp(-done / 200)
  series = {"done": done, "time": 0.003 * done, "cpu": 0.002 * done - 0.2 * warm}
  for name, (level, noise) in {"rss": (5e8, 2e6), "files": (12, 1), "threads": (30, 1)}.items():
    series[name] = np.round(level * (1 - 0.3 * warm) + noise * rng.standard_normal(600))
    series[name] = series[name] + np.floor(slopes.get(name, 0) * done)
  series["cpu"] = series["cpu"] + slopes.get("cpu", 0) * np.square(done)
  return {name: values.tolist() for name, values in series.items()}


@pytest.mark.parametrize(
  "slopes", [{}, {"rss": 4000}, {"files": 1e-3}, {"threads": 1e-3}, {"cpu": 4e-8}]
)
def test_the_verdict_finds_what_grows_and_nothing_else(slopes):
  found = verdict.judge(made_series(**slopes))
  assert {name for name, one in found.items() if one.grows} == {*slopes}


@pytest.mark.parametrize("leaks", [(), ("memory", "files")])
def test_a_process_that_leaks_is_found(tmp_path, leaks):
  count = tmp_path / "count"
  words = [sys.executable, "-c", WORKER, str(count), *leaks]
  scenario = soak.Scenario("a worker", "round", words, lambda: read_count(count))
  found = soak.run(scenario, tmp_path / "worker", interval=0.01)
  grows = {name for name, one in found.items() if one.grows} - {"cpu"}  # a busy machine's
  assert grows == ({"rss", "files"} if leaks else set())
  record = json.loads((tmp_path / "worker.json").read_text())
  assert record["verdicts"].keys() == verdict.TOLERANCES.keys()
  assert len({len(values) for values in record["series"].values()}) == 1
  assert (tmp_path / "worker.png").stat().st_size > 10_000
  assert len(soak.describe(found)) == len(found)


def test_a_soak_that_is_interrupted_is_judged_by_what_was_done(tmp_path):
  count = tmp_path / "count"

  def done():
    if read_count(count) >= 150:
      raise KeyboardInterrupt
    return read_count(count)

  words = [sys.executable, "-c", WORKER, str(count)]
  scenario = soak.Scenario("a worker", "round", words, done)
  assert soak.run(scenario, tmp_path / "worker", interval=0.01).keys() == verdict.TOLERANCES.keys()
  assert max(json.loads((tmp_path / "worker.json").read_text())["series"]["done"]) < 150
  left = read_count(count)
  time.sleep(0.1)
  assert read_count(count) == left  # the process is gone


def stand_in(kind):
  def compare(directory, reference):
    found, expected = (read_count(path / "count") for path in (directory, reference))
    assert found == expected, f"{found} is not {expected}"

  return Target(
    prepare=lambda directory: directory.mkdir(),
    commands=lambda directory: [[sys.executable, "-c", STAND_IN, str(directory), kind]],
    mark=lambda directory: read_count(directory / "count") or None,
    saved=lambda directory: read_count(directory / "count"),
    resumed=r"going on from (\d+)",
    compare=compare,
  )


@pytest.mark.parametrize(
  ("kind", "finding"), [("right", None), ("forgets", "it went on from 0 of"), ("errs", "41 is not")]
)
def test_a_command_that_loses_work_or_makes_something_else_is_found(
  tmp_path, capsys, kind, finding
):
  disturbance = killing.Disturbance(kind, stand_in(kind), tmp_path, seed=0)
  disturbance.run(4, disturbance.kill)
  disturbance.report("kills")
  assert bool(disturbance.findings) == bool(finding)
  assert all(finding in text for text in disturbance.findings)
  assert disturbance.counts["disturbed"] >= 4
  assert f"{kind}: 4 kills" in capsys.readouterr().out or finding


def test_every_kind_of_work_gets_its_share_of_the_kills(tmp_path):
  assert killing.shares(100) == killing.SHARES
  assert sum(killing.shares(7).values()) == 7
  assert killing.make_targets(tmp_path).keys() == killing.SHARES.keys()


def test_without_mounts_the_disks_are_skipped_with_a_reason(tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  assert disks.disks(tmp_path, 1, 1, seed=0) == 0
  assert "skipped, as no file system can be mounted: there is no" in capsys.readouterr().out


def run_command(monkeypatch, tmp_path, *words):
  monkeypatch.setattr(sys, "argv", ["endurance", f"--output={tmp_path}", *words])
  return command.main()


def test_the_command_counts_what_it_damaged(tmp_path, capsys, monkeypatch):
  assert run_command(monkeypatch, tmp_path, "flips", "--count=2") == 0
  assert "checkpoints: 2 damaged" in capsys.readouterr().out


@pytest.mark.slow
def test_a_short_soak_finds_nothing_that_holds_files_or_threads(tmp_path, capsys, monkeypatch):
  sizes = ("--steps=400", "--samples=4000", "--evaluations=12", "--interval=0.02")
  run_command(monkeypatch, tmp_path, "soak", *sizes)
  told = capsys.readouterr().out
  assert told.count("files: constant") == 3
  for name in ("training", "samples", "evaluations"):
    assert (tmp_path / f"{name}.png").exists()
