"""One process of one side of `processes_benchmark`: a training step as `train.run_steps` runs it.

It joins the others of its side and prints one line of JSON that describes it. For every line on
standard input, a number of steps, it prints what these took (`Worker.run`).
"""

import argparse
import itertools
import json
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from configs import cifar10
from lrdit.benchmark import arms
from lrdit.config.resolve import resolve
from lrdit.experiment import Experiment
from lrdit.runtime import cluster, parallel
from lrdit.runtime.compilation_cache import use_compilation_cache


def make_experiment(args: argparse.Namespace) -> Experiment:
  """Return a run on random pixels, with one endless window of metrics."""
  config = cifar10.get_config(f"method={args.method},variant={args.variant}").unlock()
  config.data.image_size, config.training.batch_size = args.image_size, args.batch_size
  config.training.log_every_steps = 10**9
  return Experiment(resolve(config))


def own_batch(experiment: Experiment, devices: parallel.Devices) -> dict[str, np.ndarray]:
  """Return this process's (n, b) slots of one global batch, the same for every topology."""
  shape, batch_size = experiment.shape, experiment.config.training.batch_size
  slots = parallel.batch_slots(batch_size, devices)
  images = arms.random_images(shape, batch_size)
  return {"image": images[slots], "label": (slots % shape.num_classes).astype(np.int32)}


def cpu_seconds() -> np.ndarray:
  """Return the (2,) user and system seconds of all threads of this process so far."""
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return np.array([usage.ru_utime, usage.ru_stime])


class Worker:
  """This process's share of a training, from step to step."""

  def __init__(self, experiment: Experiment, devices: parallel.Devices):
    """Makes the state and runs two steps: first calls compile and allocate."""
    curriculum = experiment.curriculum
    self._step = experiment.train_step(devices, len(curriculum.stages) - 1)
    params = arms.random_params(experiment.params_template)
    state = experiment.fresh_state(params)
    self._state = parallel.replicate(parallel.to_host(state), devices)
    self._batches: Iterator[Any] = parallel.prefetch(
      itertools.repeat(own_batch(experiment, devices)), devices
    )
    self._key = jax.random.key(experiment.config.seed)
    self._steps_asked = 0
    self._train(2)
    self._ended = time.perf_counter(), cpu_seconds()

  def _train(self, num_steps: int) -> float:
    """Train, and return the mean loss of all steps so far as training reads it for a line."""
    window = None
    for _ in range(num_steps):
      if cluster.num_processes() > 1:  # as training asks before every step
        cluster.is_preempted(self._steps_asked)
        self._steps_asked += 1
      before = window
      self._state, window = self._step(self._state, next(self._batches), self._key)
      if before:
        parallel.read(before)
    window = parallel.read(window)
    jax.block_until_ready(self._state)
    return float(window.loss) / float(window.count)

  def run(self, num_steps: int) -> dict[str, Any]:
    """Train, and return what it took.

    Returns:
      "wall", and "cpu" as [user, system], seconds of the steps; "idle_wall" and
      "idle_cpu" seconds since the last steps; "memory", the most GiB ever held; "loss"
      since the start.
    """
    wall, cpu = time.perf_counter(), cpu_seconds()
    idle_wall, idle_cpu = wall - self._ended[0], cpu - self._ended[1]
    loss = self._train(num_steps)
    self._ended = time.perf_counter(), cpu_seconds()
    return {
      "wall": self._ended[0] - wall,
      "cpu": list(self._ended[1] - cpu),
      "idle_wall": idle_wall,
      "idle_cpu": float(idle_cpu.sum()),
      "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
      "loss": loss,
    }


def main() -> None:
  """Serve requests until standard input ends."""
  parser = argparse.ArgumentParser(description=__doc__)
  for name in ("method", "variant", "coordinator"):
    parser.add_argument(f"--{name}", required=True)
  for name in ("image_size", "batch_size", "num_processes", "process_id"):
    parser.add_argument(f"--{name}", type=int, required=True)
  args = parser.parse_args()
  use_compilation_cache()
  job = cluster.Cluster(args.coordinator, args.num_processes, args.process_id)
  cluster.connect(job, shares_sigterm=True)
  worker = Worker(make_experiment(args), parallel.all_devices())
  about = {
    "num_processes": cluster.num_processes(),
    "num_devices": len(parallel.all_devices()),
  }
  print(json.dumps(about), flush=True)
  for line in sys.stdin:
    print(json.dumps(worker.run(int(line))), flush=True)


if __name__ == "__main__":
  main()
