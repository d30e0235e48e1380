"""The timed work: each arm's training step and sampler, and the machine's matmul peak."""

import concurrent.futures
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lrdit.config.resolve import resolve
from lrdit.experiment import Experiment
from lrdit.model import flops
from lrdit.model.dit import DiTShape, choose_activation_dtype
from lrdit.model.matmul import matmul
from lrdit.runtime import parallel
from lrdit.runtime.progress import make_bar
from lrdit.sampling.sampler import Program

log = logging.getLogger("lrdit")

# arm: (method, rank.compute). The last one is trained only; it samples as `adaptive` does.
ARMS = {
  "full": ("full", "grouped"),
  "narrow": ("narrow", "grouped"),
  "static": ("static", "grouped"),
  "adaptive": ("adaptive", "grouped"),
  "adaptive, masked": ("adaptive", "masked"),
}
SAMPLING_ARMS = ("full", "narrow", "static", "adaptive")

# Sizes that are compute-bound, and the number of consecutive products.
MATMUL_SIZE_ON_CPU, MATMUL_SIZE_ELSEWHERE, MATMUL_COUNT = 2048, 8192, 5

# A state holds the parameters, their average and two moments.
STATE_ARRAYS, BYTES_PER_FLOAT = 4, 4
USABLE_SHARE = 0.9  # XLA's estimate leaves out fragmentation and the workspace of libraries

# Takes the number of a round and returns the seconds of its work.
Task = Callable[[int], float]


def arm_experiments(config: ConfigDict) -> dict[str, Experiment]:
  """Return the experiment of each of `ARMS`, all else equal.

  The adaptive arm is there again with each of `benchmark.optimizers`, as "adaptive, muon".

  Raises:
    UserError: the config does not allow one of them.
  """
  own, others = config.optimizer.name, config.benchmark.optimizers
  fields = {arm: (*fields, own) for arm, fields in ARMS.items()}
  fields |= {f"adaptive, {name}": (*ARMS["adaptive"], name) for name in others}
  made = {}
  for arm, (method, compute, optimizer) in fields.items():
    copy = ConfigDict(config.to_dict())
    copy.method, copy.rank.compute, copy.optimizer.name = method, compute, optimizer
    made[arm] = Experiment(resolve(copy))
  return made


def random_params(template: Any) -> Any:
  """Return parameters of the template's shapes, N(0, 0.02**2) float32, sampled on the device.

  Initial parameters would flatter the speed: their zeros make most gradients zero, and some
  hardware multiplies zeros faster.
  """
  leaves, tree = jax.tree.flatten(template)
  ends = np.cumsum([leaf.size for leaf in leaves])
  # One array compiles fast; without the barrier every slice would sample all of it again.
  flat = 0.02 * jax.random.normal(jax.random.key(0), (int(ends[-1]),))
  parts = jnp.split(jax.lax.optimization_barrier(flat), ends[:-1])
  return tree.unflatten(part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True))


def random_images(model: DiTShape, *batch_axes: int) -> np.ndarray:
  """Return (*batch_axes, H, W, C) float32 standard normal."""
  shape = (*batch_axes, model.image_size, model.image_size, model.channels)
  return np.random.default_rng(1).standard_normal(shape, np.float32)


def seconds_of(function: Callable[[], Any]) -> tuple[float, Any]:
  """Return the seconds until the function's arrays are ready, and the arrays."""
  start = time.perf_counter()
  out = jax.block_until_ready(function())
  return time.perf_counter() - start, out


class MatmulPeak:
  """Products of large square matrices with operands in `dtype`, one per device at a time."""

  def __init__(self, size: int | None, dtype: Any, devices: parallel.Devices):
    """Place matrices of `size`, the default of the platform if None."""
    is_cpu = devices[0].platform == "cpu"
    self.size = size or (MATMUL_SIZE_ON_CPU if is_cpu else MATMUL_SIZE_ELSEWHERE)
    # FLOPs of one timing, over all devices.
    self.flops = flops.FLOPS_PER_MAC * MATMUL_COUNT * len(devices) * self.size**3
    split, replicated = parallel.shardings(devices)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((len(devices) * self.size, self.size), np.float32)
    # This scale keeps products from growing or vanishing.
    factor = rng.standard_normal((self.size, self.size), np.float32) / np.sqrt(self.size)
    activation_dtype = choose_activation_dtype(devices, dtype)
    self._rows = jax.device_put(jnp.asarray(rows, activation_dtype), split)
    self._factor = jax.device_put(jnp.asarray(factor, activation_dtype), replicated)
    self._product = jax.jit(functools.partial(matmul, dtype=dtype), out_shardings=split)

  def _products(self) -> jax.Array:
    x = self._rows
    for _ in range(MATMUL_COUNT):
      x = self._product(x, self._factor)
    return x

  def time(self, _round: int) -> float:
    """Return the seconds of all products."""
    return seconds_of(self._products)[0]


class TrainingArm:
  """One arm's training step with its state, donated from step to step."""

  def __init__(self, experiment: Experiment, devices: parallel.Devices):
    batch_size = experiment.config.training.batch_size
    experiment = experiment.for_examples(batch_size)  # their number does not change the speed
    config, objective = experiment.config, experiment.objective(devices)
    last = len(experiment.curriculum.stages) - 1
    objective = objective.with_strata(experiment.curriculum.stages[last].strata)
    self._step = experiment.train_step(devices, last)
    self._count = config.benchmark.steps
    self._key = jax.random.key(config.seed)
    self._batch = random_batch(experiment, devices)
    template = experiment.params_template
    self._state = parallel.make_replicated(
      lambda: experiment.fresh_state(random_params(template)), devices
    )
    # (examples, rank bucket) of one microbatch of one device, the whole share by default, and the
    # FLOPs of one step over all devices.
    self.rank_groups = objective.rank_groups
    shape, plan = objective.model.shape, objective.model.plan
    macs = objective.microbatches * flops.training_macs(shape, plan, self.rank_groups)
    macs += experiment.update_macs
    self.flops = flops.FLOPS_PER_MAC * len(devices) * macs
    self.num_parameters = flops.num_parameters(shape, plan)
    self.compile_seconds, self._compiled = seconds_of(self._compile)
    self.memory_bytes = None  # see `results.MEMORY_MEANING`
    if memory := self._compiled.memory_analysis():
      arrays = memory.argument_size_in_bytes + memory.output_size_in_bytes
      self.memory_bytes = arrays - memory.alias_size_in_bytes + memory.temp_size_in_bytes

  def _compile(self) -> Any:
    return self._step.lower(self._state, self._batch, self._key).compile()

  def _run(self) -> Any:
    for _ in range(self._count):
      self._state, _ = self._compiled(self._state, self._batch, self._key)
    return self._state

  def time(self, _round: int) -> float:
    """Return the seconds of `benchmark.steps` training steps."""
    return seconds_of(self._run)[0]


def random_batch(experiment: Experiment, devices: parallel.Devices) -> dict[str, jax.Array]:
  """Return a training batch on the devices."""
  n, config, shape = len(devices), experiment.config, experiment.shape
  local = config.training.batch_size // n
  label = np.arange(n * local, dtype=np.int32).reshape(n, local) % max(shape.num_classes, 1)
  batch = {"image": random_images(shape, n, local), "label": label}
  if config.vae.downsample_factor:
    batch["std"] = np.ones_like(batch["image"])
  return jax.device_put(batch, parallel.shardings(devices)[0])


class SamplingArm:
  """One arm's sampler, as `--mode=sample` uses it, on a batch of images."""

  def __init__(self, experiment: Experiment, devices: parallel.Devices):
    config, self.sampler = experiment.config, experiment.sampler(devices)
    self.programs = list(self.sampler.run_program)  # that the solver visits, by bucket
    self._num_passes = experiment.num_passes
    params = jax.jit(functools.partial(random_params, experiment.params_template))()
    self._sliced_params = self.sampler.bucket_params(params)
    size, classes = self.sampler.settings.batch_size, config.data.num_classes
    split, index = parallel.shardings(devices)[0], np.arange(size)
    self._index = jax.device_put(index.astype(np.uint32), split)
    self._y = jax.device_put((index % classes).astype(np.int32), split) if classes else None
    noise = random_images(experiment.shape, size)
    self._start = jax.device_put((noise, np.zeros_like(noise)), split)
    self._count = min(config.benchmark.steps, config.sampling.num_steps)
    self._rounds = config.benchmark.rounds
    self.compile_seconds, self._compiled = seconds_of(self._compile)

  def _compile(self) -> dict[Program, Any]:
    return {
      program: run.lower(*self._arguments(program, self._start, 0, 1)).compile()
      for program, run in self.sampler.run_program.items()
    }

  def solver_steps(self, program: Program) -> int:
    """Return the number of solver steps that a program computes."""
    return sum(end - first for own, first, end in self.sampler.segments if own == program)

  def step_flops(self, program: Program) -> int:
    """Return the FLOPs of one solver step of the batch by a program."""
    plan = self.sampler.model.plan.at_bucket(program.bucket)
    return self._flops(plan, np.zeros(1, np.int32), np.array([1 + program.is_guided]))

  def run_flops(self) -> int:
    """Return the FLOPs of a whole run of the batch."""
    return self._flops(self.sampler.model.plan, self.sampler.table.t, self._num_passes)

  def _flops(self, plan: Any, t: np.ndarray, num_passes: np.ndarray) -> int:
    macs = flops.sampling_macs(self.sampler.model.shape, plan, t, num_passes)
    return flops.FLOPS_PER_MAC * self.sampler.settings.batch_size * macs

  def _arguments(self, program: Program, carry: Any, first: int, end: int) -> tuple[Any, ...]:
    steps = np.int32(first), np.int32(end)
    return (self._sliced_params[program.bucket], carry, self._y, self._index, *steps)

  def _copy_start(self) -> Any:
    """Return a copy of the initial images, which a run may overwrite."""
    return jax.block_until_ready(jax.tree.map(jnp.copy, self._start))

  def time_program(self, program: Program, _round: int) -> float:
    """Return the seconds of `benchmark.steps` consecutive solver steps by a program."""
    arguments = self._arguments(program, self._copy_start(), 0, self._count)
    return seconds_of(lambda: self._compiled[program](*arguments))[0]

  def make_run(self) -> Task:
    """Return a task whose rounds are the parts of one whole run, from noise to images."""
    total, carry = self.sampler.table.t.size, self._copy_start()

    def part(number: int) -> float:
      nonlocal carry
      first, end = (total * i // self._rounds for i in (number, number + 1))
      seconds, carry = seconds_of(lambda: self._run_range(carry, first, end))
      return seconds

    return part

  def _run_range(self, carry: Any, first: int, end: int) -> Any:
    """Run the solver steps [first, end), each by its own program."""
    for program, low, high in self.sampler.segments:
      low, high = max(low, first), min(high, end)
      if low < high:
        carry = self._compiled[program](*self._arguments(program, carry, low, high))
    return carry


def bytes_of_other_arms(experiments: Mapping[str, Experiment]) -> int:
  """Return the bytes on a device beside the full arm's training."""
  arrays = 0
  for arm, experiment in experiments.items():
    shape, plan = experiment.shape, experiment.plan
    if arm != "full":
      arrays += STATE_ARRAYS * flops.num_parameters(shape, plan)
    if arm in SAMPLING_ARMS:
      plans = map(plan.at_bucket, range(plan.num_buckets))
      arrays += sum(flops.num_parameters(shape, at_bucket) for at_bucket in plans)
  return BYTES_PER_FLOAT * arrays


def fit_memory(
  experiments: Mapping[str, Experiment], devices: parallel.Devices
) -> tuple[Mapping[str, Experiment], TrainingArm]:
  """Return the experiments with the batch size halved until it fits, and the full training arm.

  It fits if XLA's estimate for the full arm, whose activations are the largest, leaves room for the
  arrays of the other arms. Devices that do not report their memory keep the batch size.
  """
  limit = (devices[0].memory_stats() or {}).get("bytes_limit")
  others = bytes_of_other_arms(experiments)
  while True:
    arm = TrainingArm(experiments["full"], devices)
    config = ConfigDict(experiments["full"].config.to_dict())
    half = config.training.batch_size // 2
    too_much = limit and (arm.memory_bytes or 0) + others > USABLE_SHARE * limit
    if not too_much or half % len(devices) or not half:
      return experiments, arm
    log.info("a batch of %d does not fit; trying %d", config.training.batch_size, half)
    config.training.batch_size = half
    experiments = arm_experiments(config)
    del arm  # free its state before the next one is made


@dataclasses.dataclass(frozen=True)
class Arms:
  """What is timed of each arm, by its name in `arm_experiments`."""

  experiments: Mapping[str, Experiment]
  training: Mapping[str, TrainingArm]
  sampling: Mapping[str, SamplingArm]

  @property
  def config(self) -> ConfigDict:
    """The full arm's config, which the settings of a benchmark are read from."""
    return self.experiments["full"].config


def make_arms(experiments: Mapping[str, Experiment], devices: parallel.Devices) -> Arms:
  """Compile the arms, with a batch size that fits if `fit_memory` asks for it.

  Concurrent compilations slow each other down, so several threads leave compile times at None.
  """
  b, training = experiments["full"].config.benchmark, {}
  with make_bar(len(experiments) + len(SAMPLING_ARMS), 0, "program") as bar:
    if b.fit_memory:
      experiments, training["full"] = fit_memory(experiments, devices)
      bar.update()

    def make(kind: type, name: str) -> TrainingArm | SamplingArm:
      log.debug("compiling %s, %s", kind.__name__, name)
      arm = kind(experiments[name], devices)
      bar.update()
      return arm

    with concurrent.futures.ThreadPoolExecutor(b.compile_threads) as pool:
      jobs = {n: pool.submit(make, TrainingArm, n) for n in experiments if n not in training}
      samplers = {n: pool.submit(make, SamplingArm, n) for n in SAMPLING_ARMS}
      training |= {name: job.result() for name, job in jobs.items()}
      sampling = {name: job.result() for name, job in samplers.items()}
  if b.compile_threads > 1:
    for arm in (*training.values(), *sampling.values()):
      arm.compile_seconds = None
  return Arms(experiments, training, sampling)
