"""Measure how fast each arm trains and samples on this machine."""

import contextlib
import json
import logging
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from lrdit.benchmark.arms import ARMS, arm_config
from lrdit.benchmark.measure import measure
from lrdit.benchmark.results import format_results
from lrdit.config.run_config import log_process_fields, open_workdir
from lrdit.runtime import parallel
from lrdit.runtime.locks import owned
from lrdit.runtime.store import write_json

log = logging.getLogger("lrdit")


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
  """Compile anew, so that compile times are not those of reading a file."""
  before = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)


def benchmark(config: ConfigDict, workdir: str, devices: parallel.Devices | None = None) -> None:
  """Run `--mode=benchmark`: a table on standard output, and `benchmark.json`.

  The file is written after every round, so a benchmark that is killed keeps its rounds.
  Data and parameters are random: neither a dataset nor a trained run is needed.

  Args:
    config: resolved; its arm does not matter, as every arm is measured.
    workdir: where to write; made if it is not there.
    devices: devices to use; all by default.

  Raises:
    UserError: whatever the user can fix.
  """
  devices = devices or jax.local_devices()
  for name in ARMS:
    arm_config(config, name)  # for its checks, before anything is written
  parallel.check_divisible("config.training.batch_size", config.training.batch_size, devices)
  parallel.check_divisible("config.sampling.batch_size", config.sampling.batch_size, devices)
  path = open_workdir(workdir, config, create=True)
  log_process_fields(path, config)
  # Programs compiled side by side are not timed, and may come from the cache.
  is_timed = config.benchmark.compile_threads == 1
  with (
    owned(path, "benchmark"),
    without_compilation_cache() if is_timed else contextlib.nullcontext(),
  ):
    measure(config, devices, lambda results: write_json(path / "benchmark.json", results))
  print(format_results(json.loads((path / "benchmark.json").read_text())))
  log.info("written to %s", path / "benchmark.json")
