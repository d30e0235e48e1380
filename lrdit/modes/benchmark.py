"""Measure how fast each arm trains and samples on this machine: `--mode=benchmark`."""

import contextlib
import json
import logging
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from lrdit.benchmark.arms import arm_experiments
from lrdit.benchmark.measure import measure
from lrdit.benchmark.results import format_results
from lrdit.config.run_config import log_process_fields, open_workdir
from lrdit.runtime import parallel
from lrdit.runtime.locks import owned
from lrdit.runtime.store import write_json

log = logging.getLogger("lrdit")


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
  """Compile every program, so that compile times are not those of reading a file."""
  before = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)


def benchmark(config: ConfigDict, workdir: str, devices: parallel.Devices | None = None) -> None:
  """Run `--mode=benchmark`: print a table, and write `benchmark.json` below `workdir`.

  The file is written after every round, so a benchmark that is killed keeps its rounds. Data and
  parameters are random, so neither a dataset nor a trained run is needed. Every arm is measured,
  whatever the config's own.
  """
  devices = devices or jax.local_devices()
  experiments = arm_experiments(config)  # checks the config before anything is written
  parallel.check_divisible("config.training.batch_size", config.training.batch_size, devices)
  parallel.check_divisible("config.sampling.batch_size", config.sampling.batch_size, devices)
  path = open_workdir(workdir, config, create=True)
  log_process_fields(path, config)
  # The times of concurrent compilations are not kept, so these may use the cache.
  is_timed = config.benchmark.compile_threads == 1
  with (
    owned(path, "benchmark"),
    without_compilation_cache() if is_timed else contextlib.nullcontext(),
  ):
    measure(experiments, devices, lambda results: write_json(path / "benchmark.json", results))
  print(format_results(json.loads((path / "benchmark.json").read_text())))
  log.info("wrote %s", path / "benchmark.json")
