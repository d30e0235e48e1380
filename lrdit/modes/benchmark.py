"""How fast each arm trains and samples, beside how fast its FLOPs say it should be.

All arms live in one process and take turns: one round times, once each, a
training step of every arm, solver steps of every arm and bucket, a part of a
whole sampling run of every arm, and the machine's matrix products. Medians over
rounds are compared, so whatever else the machine does slows all of them alike.
"""

import concurrent.futures
import contextlib
import functools
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lrdit import builders
from lrdit.model import flops
from lrdit.runtime import parallel
from lrdit.runtime.locks import owned
from lrdit.runtime.progress import make_bar
from lrdit.runtime.store import write_json
from lrdit.runtime.tables import format_table
from lrdit.runtime.workdir import open_workdir, tell_process_fields
from lrdit.train import training_step
from lrdit.train.train_state import create_train_state

log = logging.getLogger("lrdit")

# arm: (method, rank.compute). The last is the reference for training alone: it
# samples as `adaptive` does.
ARMS = {
  "full": ("full", "grouped"),
  "static": ("static", "grouped"),
  "adaptive": ("adaptive", "grouped"),
  "adaptive, masked": ("adaptive", "masked"),
}
SAMPLING_ARMS = ("full", "static", "adaptive")

# Square matrices, large enough to be compute-bound, and how many products in a row.
MATMUL_SIZES = {"cpu": 2048}
MATMUL_SIZE_ELSEWHERE = 8192
MATMUL_COUNT = 5

MEMORY_MEANING = (
  "arguments + outputs + temporaries - donated arguments of the compiled training step, per device"
)

# A state holds the parameters, their average and two moments.
STATE_ARRAYS, BYTES_PER_FLOAT = 4, 4
# The rest is for what XLA does not count: fragments, libraries' work space.
USABLE_SHARE = 0.9

# A task times its work in round number i and returns seconds.
Task = Callable[[int], float]


def arm_config(config: ConfigDict, arm: str) -> ConfigDict:
  """The config of one of `ARMS`, all else equal.

  Raises:
    UserError: the arm cannot be made of these fields.
  """
  copy = ConfigDict(config.to_dict())
  copy.method, copy.rank.compute = ARMS[arm]
  return builders.resolve(copy)


def random_params(config: ConfigDict) -> Any:
  """Return parameters of the model's shapes, N(0, 0.02**2) float32, drawn on the device.

  Not those of initialisation: their zeros make most gradients zero, and zeros
  can be multiplied faster than numbers.
  """
  leaves, tree = jax.tree.flatten(builders.params_template(config))
  ends = np.cumsum([leaf.size for leaf in leaves])
  # One draw, which compiles in a moment, and a barrier, or every slice would draw for itself.
  flat = 0.02 * jax.random.normal(jax.random.key(0), (int(ends[-1]),))
  parts = jnp.split(jax.lax.optimization_barrier(flat), ends[:-1])
  return tree.unflatten(part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True))


def random_images(config: ConfigDict, *batch_axes: int) -> np.ndarray:
  """(*batch_axes, H, W, C) float32 standard normal."""
  s = builders.make_shape(config)
  shape = (*batch_axes, s.image_size, s.image_size, s.channels)
  return np.random.default_rng(1).standard_normal(shape, np.float32)


def seconds_of(function: Callable[[], Any]) -> tuple[float, Any]:
  """Seconds until the function's arrays are there, and the arrays."""
  start = time.perf_counter()
  out = jax.block_until_ready(function())
  return time.perf_counter() - start, out


class MatmulPeak:
  """Large square products in the compute dtype, one per device at a time.

  Attributes:
    size: rows and columns.
    flops: FLOPs of one timing, over all devices.
  """

  def __init__(self, config: ConfigDict, devices: parallel.Devices):
    """Places the matrices."""
    default = MATMUL_SIZES.get(devices[0].platform, MATMUL_SIZE_ELSEWHERE)
    self.size = config.benchmark.matmul_size or default
    self.flops = flops.FLOPS_PER_MAC * MATMUL_COUNT * len(devices) * self.size**3
    split, replicated = parallel.shardings(devices)
    dtype = builders.DTYPES[config.model.dtype]
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((len(devices) * self.size, self.size), np.float32)
    # Products of this scale neither grow nor vanish.
    factor = rng.standard_normal((self.size, self.size), np.float32) / np.sqrt(self.size)
    self._rows = jax.device_put(jnp.asarray(rows, dtype), split)
    self._factor = jax.device_put(jnp.asarray(factor, dtype), replicated)
    self._product = jax.jit(jnp.matmul, out_shardings=split)

  def _products(self) -> jax.Array:
    x = self._rows
    for _ in range(MATMUL_COUNT):
      x = self._product(x, self._factor)
    return x

  def time(self, _round: int) -> float:
    """Seconds of all products."""
    return seconds_of(self._products)[0]


class TrainingArm:
  """One arm's training step with its state, donated from step to step.

  Attributes:
    groups: (examples, rank bucket) of one device.
    flops: FLOPs of one step, over all devices.
    num_parameters: allocated parameters.
    compile_seconds: tracing and compiling the step.
    memory_bytes: see `MEMORY_MEANING`; None where the backend does not say.
  """

  def __init__(self, config: ConfigDict, devices: parallel.Devices):
    """Makes the state and compiles the step."""
    objective = builders.make_objective(config, devices)
    optimizer, _ = builders.make_optimizer(config)
    curriculum = builders.make_curriculum(config)
    self._step = builders.make_train_step(config, devices, len(curriculum.stages) - 1)
    self._count = config.benchmark.steps
    self._key = jax.random.key(config.seed)
    self._batch = self._make_batch(config, devices)
    self._state = parallel.make_replicated(
      lambda: create_train_state(random_params(config), optimizer, curriculum.num_groups), devices
    )
    local = config.training.batch_size // len(devices)
    self.groups = training_step.select_ranks(objective, jnp.zeros(local, jnp.int32)).groups
    shape, plan = objective.model.shape, objective.model.plan
    macs = len(devices) * flops.training_macs(shape, plan, self.groups)
    self.flops = flops.FLOPS_PER_MAC * macs
    self.num_parameters = flops.num_parameters(shape, plan)
    self.compile_seconds, self._compiled = seconds_of(self._compile)
    self.memory_bytes = program_bytes(self._compiled)

  def _make_batch(self, config: ConfigDict, devices: parallel.Devices) -> dict[str, jax.Array]:
    """A batch on the devices, where reading ahead would have put it."""
    n, classes = len(devices), config.data.num_classes
    local = config.training.batch_size // n
    label = np.arange(n * local, dtype=np.int32).reshape(n, local) % max(classes, 1)
    batch = {"image": random_images(config, n, local), "label": label}
    if config.vae.downsample_factor:
      batch["std"] = np.ones_like(batch["image"])
    return jax.device_put(batch, parallel.shardings(devices)[0])

  def _compile(self) -> Any:
    return self._step.lower(self._state, self._batch, self._key).compile()

  def _run(self) -> Any:
    for _ in range(self._count):
      self._state, _ = self._compiled(self._state, self._batch, self._key)
    return self._state

  def time(self, _round: int) -> float:
    """Seconds of `benchmark.steps` training steps."""
    return seconds_of(self._run)[0]


def program_bytes(compiled: Any) -> int | None:
  """Memory of one device while a compiled program runs; None if unknown."""
  memory = compiled.memory_analysis()
  if memory is None:
    return None
  arrays = memory.argument_size_in_bytes + memory.output_size_in_bytes
  return arrays - memory.alias_size_in_bytes + memory.temp_size_in_bytes


class SamplingArm:
  """One arm's sampler on a batch of images.

  Attributes:
    sampler: as `--mode=sample` uses it.
    compile_seconds: tracing and compiling every bucket the solver visits.
  """

  def __init__(self, config: ConfigDict, devices: parallel.Devices):
    """Slices the parameters and compiles every bucket."""
    self.sampler = builders.make_sampler(config, devices)
    params = jax.jit(functools.partial(random_params, config))()
    self.sliced_params = self.sampler.slice_params(params)
    size, classes = self.sampler.settings.batch_size, config.data.num_classes
    split = parallel.shardings(devices)[0]
    index = np.arange(size)
    self._index = jax.device_put(index.astype(np.uint32), split)
    self._y = jax.device_put((index % classes).astype(np.int32), split) if classes else None
    noise = random_images(config, size)
    self._start = jax.device_put((noise, np.zeros_like(noise)), split)
    self._count = min(config.benchmark.steps, config.sampling.num_steps)
    self._rounds = config.benchmark.rounds
    self.compile_seconds, self._programs = seconds_of(self._compile)

  def _compile(self) -> dict[int, Any]:
    return {
      bucket: run.lower(*self._arguments(bucket, self._start, 0, 1)).compile()
      for bucket, run in self.sampler.run_bucket.items()
    }

  @property
  def buckets(self) -> list[int]:
    """The rank buckets that the solver visits, ascending."""
    return sorted(self.sampler.run_bucket)

  def solver_steps(self, bucket: int) -> int:
    """How many of the run's solver steps fall in a bucket."""
    return sum(end - first for b, first, end in self.sampler.segments if b == bucket)

  def step_flops(self, bucket: int) -> int:
    """FLOPs of one solver step of the batch in a bucket."""
    return self._run_flops(self.sampler.model.plan.at_bucket(bucket), np.zeros(1, np.int32))

  def run_flops(self) -> int:
    """FLOPs of a whole run of the batch."""
    return self._run_flops(self.sampler.model.plan, self.sampler.table.t)

  def _run_flops(self, plan: Any, t: np.ndarray) -> int:
    settings, shape = self.sampler.settings, self.sampler.model.shape
    macs = flops.sampling_macs(shape, plan, t, settings.batch_size, settings.guidance_scale)
    return flops.FLOPS_PER_MAC * macs

  def _arguments(self, bucket: int, carry: Any, first: int, end: int) -> tuple[Any, ...]:
    steps = np.int32(first), np.int32(end)
    return (self.sliced_params[bucket], carry, self._y, self._index, *steps)

  def _copy_start(self) -> Any:
    """Images to begin from; a copy, as a run may overwrite what it is given."""
    return jax.block_until_ready(jax.tree.map(jnp.copy, self._start))

  def time_bucket(self, bucket: int, _round: int) -> float:
    """Seconds of `benchmark.steps` consecutive solver steps with a bucket's parameters."""
    arguments = self._arguments(bucket, self._copy_start(), 0, self._count)
    return seconds_of(lambda: self._programs[bucket](*arguments))[0]

  def make_run(self) -> Task:
    """A task whose rounds are the parts of one whole run, from noise to images."""
    total, carry = self.sampler.table.t.size, self._copy_start()

    def part(number: int) -> float:
      nonlocal carry
      first, end = (total * i // self._rounds for i in (number, number + 1))
      seconds, carry = seconds_of(lambda: self._run_range(carry, first, end))
      return seconds

    return part

  def _run_range(self, carry: Any, first: int, end: int) -> Any:
    """Solver steps [first, end), each in its own bucket."""
    for bucket, low, high in self.sampler.segments:
      low, high = max(low, first), min(high, end)
      if low < high:
        carry = self._programs[bucket](*self._arguments(bucket, carry, low, high))
    return carry


def interleave(
  tasks: Mapping[Any, Task], rounds: int, after_round: Callable[[], Any]
) -> dict[Any, list[float]]:
  """Seconds of every task in every round.

  Each round begins with another task, so that no task always follows the same
  one into warm caches or a hot chip's lower clock.
  """
  keys = list(tasks)
  seconds: dict[Any, list[float]] = {key: [] for key in keys}
  for number in range(rounds):
    first = number % len(keys)
    for key in keys[first:] + keys[:first]:
      seconds[key].append(tasks[key](number))
    after_round()
  return seconds


def summarise(seconds: Sequence[float], per: int = 1) -> dict[str, Any]:
  """Median, least and all of some timings, each divided by `per`."""
  each = [s / per for s in seconds]
  return {"median": statistics.median(each), "min": min(each), "rounds": each}


def training_report(
  arms: Mapping[str, TrainingArm],
  timings: Mapping[str, dict[str, Any]],
  batch_size: int,
  peak: float,
) -> dict[str, dict[str, Any]]:
  """What is reported of each arm's training.

  Args:
    arms: by name, `full` among them.
    timings: seconds of one step, from `summarise`.
    batch_size: global.
    peak: FLOP/s of the matrix products, all devices together.
  """
  report = {}
  for name, arm in arms.items():
    seconds = timings[name]["median"]
    report[name] = {
      "num_parameters": arm.num_parameters,
      "rank_groups": [list(group) for group in arm.groups],
      "flops_per_step": arm.flops,
      "compile_seconds": arm.compile_seconds,
      "step_seconds": timings[name],
      "steps_per_second": 1 / seconds,
      "images_per_second": batch_size / seconds,
      "flops_per_second": arm.flops / seconds,
      "peak_fraction": arm.flops / seconds / peak,
      "memory_bytes": arm.memory_bytes,
      "speedup_over_full": timings["full"]["median"] / seconds,
      "full_flops_over_these": arms["full"].flops / arm.flops,
    }
  return report


def bucket_report(
  arm: SamplingArm, timings: Mapping[int, dict[str, Any]], peak: float
) -> list[dict[str, Any]]:
  """What is reported of each bucket of a sampler, by ascending rank.

  Args:
    arm: the sampler.
    timings: seconds of one solver step of a batch by bucket, from `summarise`.
    peak: as in `training_report`.
  """
  highest = arm.buckets[-1]
  report = []
  for bucket in arm.buckets:
    seconds, count = timings[bucket]["median"], arm.step_flops(bucket)
    report.append(
      {
        "bucket": bucket,
        "solver_steps": arm.solver_steps(bucket),
        "flops_per_step": count,
        "step_seconds": timings[bucket],
        "step_seconds_per_image": seconds / arm.sampler.settings.batch_size,
        "flops_per_second": count / seconds,
        "peak_fraction": count / seconds / peak,
        "time_over_highest_bucket": seconds / timings[highest]["median"],
        "flops_over_highest_bucket": count / arm.step_flops(highest),
      }
    )
  return report


def sampling_report(
  arms: Mapping[str, SamplingArm], seconds: Mapping[Any, list[float]], steps: int, peak: float
) -> dict[str, dict[str, Any]]:
  """What is reported of each arm's sampling.

  Rates and speed-ups are of the buckets' medians over all rounds; a whole run is
  one timing, and stands beside them as a check.

  Args:
    arms: by name, `full` among them.
    seconds: of `interleave`.
    steps: solver steps in one timing of a bucket.
    peak: as in `training_report`.
  """
  report = {}
  for name, arm in arms.items():
    timings = {b: summarise(seconds["bucket", name, b], steps) for b in arm.buckets}
    from_buckets = sum(arm.solver_steps(b) * timings[b]["median"] for b in arm.buckets)
    runs = [sum(parts) for key, parts in seconds.items() if key[:2] == ("run", name)]
    measured = summarise(runs) if runs else None
    report[name] = {
      "compile_seconds": arm.compile_seconds,
      "buckets": bucket_report(arm, timings, peak),
      "flops_per_run": arm.run_flops(),
      "run_seconds": measured,
      "run_seconds_from_buckets": from_buckets,
      "seconds_per_image": from_buckets / arm.sampler.settings.batch_size,
      "flops_per_second": arm.run_flops() / from_buckets,
      "peak_fraction": arm.run_flops() / from_buckets / peak,
      "speedup_over_full": 1.0,
      "full_flops_over_these": arms["full"].run_flops() / arm.run_flops(),
    }
  full = report["full"]["seconds_per_image"]
  for entry in report.values():
    entry["speedup_over_full"] = full / entry["seconds_per_image"]
  return report


def describe(config: ConfigDict, devices: parallel.Devices) -> dict[str, Any]:
  """What the figures must be quoted with."""
  shape, s = builders.make_shape(config), config.sampling
  return {
    "jax": jax.__version__,
    "backend": devices[0].platform,
    "device_kind": devices[0].device_kind,
    "num_devices": len(devices),
    "cpu_count": os.cpu_count(),
    "variant": config.model.variant,
    "model": {name: getattr(shape, name) for name in shape.__dataclass_fields__},
    "dtype": config.model.dtype,
    "remat": config.model.remat,
    "scan_blocks": config.model.scan_blocks,
    "rank": config.rank.to_dict(),
    "batch_size": config.training.batch_size,
    "sampling_batch_size": s.batch_size,
    "solver": s.solver,
    "num_steps": s.num_steps,
    "guidance_scale": s.guidance_scale,
    "rounds": config.benchmark.rounds,
    "steps": config.benchmark.steps,
    "sampling_runs": config.benchmark.sampling_runs,
    "compile_threads": config.benchmark.compile_threads,
    "memory_bytes_are": MEMORY_MEANING,
  }


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
  """Compiles anew, so that compile times are not those of reading a file."""
  before = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)


def device_peak_bytes(devices: parallel.Devices) -> int | None:
  """Most memory the process has held on a device, all arms together; None if unknown."""
  peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
  return max((peak for peak in peaks if peak is not None), default=None)


def bytes_of_other_arms(config: ConfigDict) -> int:
  """Return what lies on a device beside the full arm's training: states, sliced parameters."""
  arrays = 0
  for arm in ARMS:
    fields = arm_config(config, arm)
    shape, plan = builders.make_shape(fields), builders.make_plan(fields)
    if arm != "full":
      arrays += STATE_ARRAYS * flops.num_parameters(shape, plan)
    if arm in SAMPLING_ARMS:
      buckets = range(plan.num_buckets)
      arrays += sum(flops.num_parameters(shape, plan.at_bucket(bucket)) for bucket in buckets)
  return BYTES_PER_FLOAT * arrays


def full_arm_that_fits(config: ConfigDict, devices: parallel.Devices) -> TrainingArm:
  """Return the full arm at a batch that fits, the given one or less; set it in the config.

  The batch is halved until XLA's estimate of the full arm, whose activations are the largest,
  fits beside what the other arms hold. It is kept where a device does not tell its memory.
  """
  limit = (devices[0].memory_stats() or {}).get("bytes_limit")
  others = bytes_of_other_arms(config)
  while True:
    arm = TrainingArm(arm_config(config, "full"), devices)
    half = config.training.batch_size // 2
    too_much = limit and (arm.memory_bytes or 0) + others > USABLE_SHARE * limit
    if not too_much or half % len(devices) or not half:
      return arm
    log.info("a batch of %d does not fit: trying %d", config.training.batch_size, half)
    config.training.batch_size = half
    del arm  # and its state, before the next one is made


def make_arms(
  config: ConfigDict, devices: parallel.Devices
) -> tuple[ConfigDict, dict[str, TrainingArm], dict[str, SamplingArm]]:
  """Return the config, with a batch that fits where asked to, and the compiled arms.

  On several threads the times of compiling are those of sharing the cores, and not kept.
  """
  threads = config.benchmark.compile_threads
  training: dict[str, TrainingArm] = {}
  with make_bar(len(ARMS) + len(SAMPLING_ARMS), 0, "program") as bar:
    if config.benchmark.fit_memory:
      config = ConfigDict(config.to_dict())
      training["full"] = full_arm_that_fits(config, devices)
      bar.update()
    configs = {name: arm_config(config, name) for name in ARMS}

    def make(kind: type, name: str) -> TrainingArm | SamplingArm:
      log.debug("compiling %s, %s", kind.__name__, name)
      arm = kind(configs[name], devices)
      bar.update()
      return arm

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
      jobs = {n: pool.submit(make, TrainingArm, n) for n in ARMS if n not in training}
      samplers = {n: pool.submit(make, SamplingArm, n) for n in SAMPLING_ARMS}
      training |= {name: job.result() for name, job in jobs.items()}
      sampling = {name: job.result() for name, job in samplers.items()}
  if threads > 1:
    for arm in (*training.values(), *sampling.values()):
      arm.compile_seconds = None
  return config, training, sampling


def measure(config: ConfigDict, devices: parallel.Devices) -> dict[str, Any]:
  """Times everything and returns what `benchmark.json` holds."""
  peak = MatmulPeak(config, devices)
  config, training, sampling = make_arms(config, devices)
  tasks: dict[Any, Task] = {("peak",): peak.time}
  tasks |= {("training", name): arm.time for name, arm in training.items()}
  for name, arm in sampling.items():
    for bucket in arm.buckets:
      tasks["bucket", name, bucket] = functools.partial(arm.time_bucket, bucket)
  for task in tasks.values():
    task(0)  # not counted: first calls touch memory for the first time
  for number in range(config.benchmark.sampling_runs):
    tasks |= {("run", name, number): arm.make_run() for name, arm in sampling.items()}
  with make_bar(config.benchmark.rounds, 0, "round") as bar:
    seconds = interleave(tasks, config.benchmark.rounds, bar.update)
  return report(config, devices, peak, training, sampling, seconds)


def report(
  config: ConfigDict,
  devices: parallel.Devices,
  peak: MatmulPeak,
  training: Mapping[str, TrainingArm],
  sampling: Mapping[str, SamplingArm],
  seconds: Mapping[Any, list[float]],
) -> dict[str, Any]:
  """What `benchmark.json` holds, of the seconds from `interleave`."""
  products = summarise(seconds["peak",])
  peak_rate = peak.flops / products["median"]
  timings = {name: summarise(seconds["training", name], config.benchmark.steps) for name in ARMS}
  solver_steps = min(config.benchmark.steps, config.sampling.num_steps)
  return describe(config, devices) | {
    "matmul_peak": {
      "size": peak.size,
      "flops_per_second": peak_rate,
      "highest_flops_per_second": peak.flops / products["min"],
      "seconds": products,
    },
    "device_peak_bytes_of_all_arms": device_peak_bytes(devices),
    "training": training_report(training, timings, config.training.batch_size, peak_rate),
    "sampling": sampling_report(sampling, seconds, solver_steps, peak_rate),
  }


# Columns of the tables: header -> text of an entry of the report.
_RATES = {
  "GFLOP/s": lambda e: f"{e['flops_per_second'] / 1e9:.4g}",
  "of peak": lambda e: f"{100 * e['peak_fraction']:.0f} %",
}
_STEP_SECONDS = {
  "median s": lambda e: f"{e['step_seconds']['median']:.4g}",
  "min s": lambda e: f"{e['step_seconds']['min']:.4g}",
}
_AGAINST_FULL = {
  "compile s": lambda e: "-" if (s := e["compile_seconds"]) is None else f"{s:.1f}",
  "speed-up": lambda e: f"{e['speedup_over_full']:.2f}",
  "by FLOPs": lambda e: f"{e['full_flops_over_these']:.2f}",
}
TRAINING_COLUMNS = {
  "parameters": lambda e: f"{e['num_parameters']:,}",
  "GFLOPs": lambda e: f"{e['flops_per_step'] / 1e9:.4g}",
  **_STEP_SECONDS,
  "steps/s": lambda e: f"{e['steps_per_second']:.4g}",
  "images/s": lambda e: f"{e['images_per_second']:.4g}",
  **_RATES,
  "memory MiB": lambda e: "-" if e["memory_bytes"] is None else f"{e['memory_bytes'] / 2**20:,.0f}",
  **_AGAINST_FULL,
}
BUCKET_COLUMNS = {
  "in a run": lambda e: str(e["solver_steps"]),
  "GFLOPs": lambda e: f"{e['flops_per_step'] / 1e9:.4g}",
  **_STEP_SECONDS,
  "s/image": lambda e: f"{e['step_seconds_per_image']:.3g}",
  **_RATES,
  "over top bucket": lambda e: f"{e['time_over_highest_bucket']:.3f}",
  "by FLOPs": lambda e: f"{e['flops_over_highest_bucket']:.3f}",
}
RUN_COLUMNS = {
  "GFLOPs": lambda e: f"{e['flops_per_run'] / 1e9:.4g}",
  "median s": lambda e: f"{e['run_seconds']['median']:.4g}" if e["run_seconds"] else "not run",
  "from buckets s": lambda e: f"{e['run_seconds_from_buckets']:.4g}",
  "s/image": lambda e: f"{e['seconds_per_image']:.3g}",
  **_RATES,
  **_AGAINST_FULL,
}


def format_result(result: Mapping[str, Any]) -> str:
  """What a person reads of `benchmark.json`."""
  model, peak = result["model"], result["matmul_peak"]
  size = f"{model['image_size']}x{model['image_size']}x{model['channels']}"
  head = [
    (
      f"DiT-{result['variant']} (width {model['hidden_size']}, depth {model['depth']}) on {size}, "
      f"{result['dtype']}, {result['num_devices']} x "
      f"{result['device_kind']}, jax {result['jax']}"
    ),
    (
      f"medians of {result['rounds']} rounds; batch {result['batch_size']} in training, "
      f"{result['sampling_batch_size']} in sampling by {result['solver']} with "
      f"{result['num_steps']} steps at guidance {result['guidance_scale']:g}"
    ),
    (
      f"matmul peak {peak['flops_per_second'] / 1e9:.4g} GFLOP/s, highest "
      f"{peak['highest_flops_per_second'] / 1e9:.4g} ({peak['size']} squared)"
    ),
    f"memory: {MEMORY_MEANING}",
  ]
  buckets = {
    f"{name}, bucket {entry['bucket']}" if len(arm["buckets"]) > 1 else name: entry
    for name, arm in result["sampling"].items()
    for entry in arm["buckets"]
  }
  tables = [
    format_table("training step", TRAINING_COLUMNS, result["training"]),
    format_table("solver step", BUCKET_COLUMNS, buckets),
    format_table("sampling run", RUN_COLUMNS, result["sampling"]),
  ]
  return "\n\n".join(["\n".join(head), *tables])


def benchmark(config: ConfigDict, workdir: str, devices: parallel.Devices | None = None) -> None:
  """Runs `--mode=benchmark`: a table on standard output, and `benchmark.json`.

  Data and parameters are random: neither a dataset nor a trained run is needed.

  Args:
    config: resolved; its arm does not matter, every arm is measured.
    workdir: where to write; made if it is not there.
    devices: devices to use; all by default.

  Raises:
    UserError: whatever the user can mend.
  """
  devices = devices or jax.local_devices()
  for name in ARMS:
    arm_config(config, name)  # for its checks, before anything is written
  parallel.check_divisible("config.training.batch_size", config.training.batch_size, devices)
  parallel.check_divisible("config.sampling.batch_size", config.sampling.batch_size, devices)
  path = open_workdir(workdir, config, create=True)
  tell_process_fields(path, config)
  # Programs compiled side by side are not timed, and may come from the cache.
  is_timed = config.benchmark.compile_threads == 1
  with (
    owned(path, "benchmark"),
    without_compilation_cache() if is_timed else contextlib.nullcontext(),
  ):
    result = measure(config, devices)
  write_json(path / "benchmark.json", result)
  print(format_result(result))
  log.info("written to %s", path / "benchmark.json")
