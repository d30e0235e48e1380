"""The benchmark of processes: its arithmetic, and one round at a tiny size. No timings."""

import pytest

from tests.benchmarks import processes_benchmark
from tests.benchmarks.processes_benchmark import summarize


def report(cpu, wall, idle_cpu=0.0):
  idle = {"idle_cpu": idle_cpu, "idle_wall": 4.0}
  return {"cpu": cpu, "wall": wall, "memory": 2.5, "loss": 1.0} | idle


def test_a_side_takes_the_cpu_time_of_all_its_processes_and_the_wall_time_of_the_slowest():
  rounds = [
    [report([3.0, 1.0], 2.5), report([2.0, 0.0], 3.0, idle_cpu=0.5)],
    [report([4.0, 2.0], 5.0), report([1.0, 1.0], 4.0, idle_cpu=0.5)],
  ]
  summary = summarize(rounds, num_steps=2)
  assert summary["cpu"] == [3.0, 4.0]
  assert summary["system"] == [0.5, 1.5]
  assert summary["wall"] == [1.5, 2.5]
  assert summary["memory"] == 5.0
  assert summary["idle"] == 2 * 1.0 / 16.0  # of both processes, in seconds they both waited


def test_ratios_are_of_the_same_round():
  assert processes_benchmark.ratios([2.0, 6.0, 9.0], [1.0, 2.0, 10.0]) == "2.000 (0.900 to 3.000)"


def test_processes_share_the_threads():
  shares = [processes_benchmark.threads_of_process(side, 4) for side in ("1x8", "2x4", "8x1")]
  assert shares == [4, 2, 1]
  assert processes_benchmark.threads_of_process("2x1", 0) == 0


def test_sides_have_as_many_devices(capsys):
  with pytest.raises(SystemExit):
    processes_benchmark.parse(["--sides=1x2,2x2"])
  assert "the same number of devices" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_do_the_work_of_one(capsys):
  """The sides' losses agree, or it would end with an error."""
  processes_benchmark.main(
    ["--sides=1x2,2x1", "--variant=T/2", "--image_size=4", "--batch_size=4", "--rounds=1"]
  )
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines[2:]] == ["1x2", "2x1"]
