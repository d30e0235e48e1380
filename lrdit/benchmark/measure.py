"""Timing of all arms in one process, in turn.

One round times, once each, a training step of every arm, solver steps of every arm and bucket, a
part of a whole sampling run of every arm, and the machine's matrix products. Medians over rounds
are compared, so other work on the machine slows all of them alike.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from lrdit.benchmark.arms import MatmulPeak, Task, make_arms
from lrdit.benchmark.results import make_results
from lrdit.experiment import Experiment
from lrdit.runtime import parallel
from lrdit.runtime.progress import make_bar


def interleave(
  tasks: Mapping[Any, Task], rounds: int, after_round: Callable[[dict[Any, list[float]]], Any]
) -> None:
  """Time every task in every round, and call `after_round` with the seconds by task so far.

  Each round begins with another task, so that no task always follows the same one into warm caches
  or the lower clock of a hot chip.
  """
  keys = list(tasks)
  seconds: dict[Any, list[float]] = {key: [] for key in keys}
  for number in range(rounds):
    first = number % len(keys)
    for key in keys[first:] + keys[:first]:
      seconds[key].append(tasks[key](number))
    after_round(seconds)


def measure(
  experiments: Mapping[str, Experiment],
  devices: parallel.Devices,
  after_round: Callable[[dict[str, Any]], Any],
) -> None:
  """Time all arms; call `after_round` with the results of the rounds so far, as JSON."""
  full = experiments["full"]
  peak = MatmulPeak(full.config.benchmark.matmul_size, full.dtype, devices)
  arms = make_arms(experiments, devices)
  b = arms.config.benchmark
  tasks: dict[Any, Task] = {("peak",): peak.time}
  tasks |= {("training", name): arm.time for name, arm in arms.training.items()}
  for name, arm in arms.sampling.items():
    for program in arm.programs:
      tasks["program", name, program] = functools.partial(arm.time_program, program)
  for task in tasks.values():
    task(0)  # an untimed warm-up
  for number in range(b.sampling_runs or 0):
    tasks |= {("run", name, number): arm.make_run() for name, arm in arms.sampling.items()}
  with make_bar(b.rounds, 0, "round") as bar:

    def finish_round(seconds: dict[Any, list[float]]) -> None:
      after_round(make_results(arms, devices, peak, seconds))
      bar.update()

    interleave(tasks, b.rounds, finish_round)
