"""lrdit's side of `torch_benchmark`: the full arm as `--mode=benchmark` times it.

It speaks as `torch_worker` does: it writes one line of JSON, then for every line on standard input,
one of its "tasks", the seconds that this takes.
"""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from configs import cifar10
from lrdit.benchmark import arms
from lrdit.config.resolve import resolve
from lrdit.experiment import Experiment
from lrdit.model import flops, low_rank


def make_experiment(args: argparse.Namespace) -> Experiment:
  """Return the full arm on pixels; the data is random, so its name does not matter."""
  config = cifar10.get_config(f"method=full,variant={args.variant},recipe=dissertation").unlock()
  config.data.image_size, config.data.num_channels = args.image_size, args.channels
  config.data.num_classes, config.training.batch_size = args.num_classes, args.batch_size
  config.model.dtype = args.dtype
  return Experiment(resolve(config))


def make_forward(full: Experiment) -> Callable[[], jax.Array]:
  """The compiled forward pass on a batch."""
  model, batch = full.model(), full.config.training.batch_size
  params = jax.device_put(arms.random_params(full.params_template))
  x = jax.device_put(arms.random_images(full.shape, batch))
  t, y = jnp.arange(batch), jnp.arange(batch) % full.shape.num_classes

  @jax.jit
  def apply(params: Any, x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
    return model.apply({"params": params}, x, t, y, low_rank.RankSelection())

  return lambda: apply(params, x, t, y)


def main() -> None:
  """Serve requests until standard input ends."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--variant", required=True)
  parser.add_argument("--dtype", required=True)
  for name in ("image_size", "channels", "num_classes", "batch_size"):
    parser.add_argument(f"--{name}", type=int, required=True)
  full = make_experiment(parser.parse_args())
  devices = jax.local_devices()[:1]
  arm, peak = arms.TrainingArm(full, devices), arms.MatmulPeak(None, full.dtype, devices)
  forward = make_forward(full)
  tasks = {
    "step": lambda: arm.time(0),
    "forward": lambda: arms.seconds_of(forward)[0],
    "peak": lambda: peak.time(0),
  }
  for task in tasks.values():  # first calls compile and allocate
    task()
    task()
  batch_size = full.config.training.batch_size
  forward_macs = batch_size * flops.forward_macs(full.shape, full.plan, 0)
  about = {
    "name": f"lrdit on jax {jax.__version__}",
    "num_parameters": sum(p.size for p in jax.tree.leaves(full.params_template)),
    "tasks": list(tasks),
    "left_out": "",
    "flops": {
      "step": arm.flops,
      "forward": flops.FLOPS_PER_MAC * forward_macs,
      "peak": peak.flops,
    },
  }
  print(json.dumps(about), flush=True)
  for line in sys.stdin:
    print(tasks[line.strip()](), flush=True)


if __name__ == "__main__":
  main()
