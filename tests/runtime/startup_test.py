import os
import re
import subprocess
import sys

import jax
import pytest

from lrdit.runtime import malloc, startup
from tests import tiny

# Page faults of writing a large block that was just freed, and the MiB held after freeing it.
PROGRAM = """
import resource
import numpy as np
def touch():
  np.empty(256 << 20, np.uint8).fill(1)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
with open("/proc/self/statm") as file:
  print(int(file.read().split()[1]) * resource.getpagesize() >> 20)
"""


def start_program(program, **environment):
  return subprocess.run(
    [sys.executable, "-c", program],
    cwd=tiny.ROOT,
    env={k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | environment,
    capture_output=True,
    text=True,
    check=True,
  )


def run_program(program, **environment):
  return [int(word) for word in start_program(program, **environment).stdout.split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_freed_memory_is_kept_without_faults_or_returned():
  huge_pages = 128
  faults, held = run_program(PROGRAM, GLIBC_TUNABLES=malloc.KEEP_FREED)
  assert faults < huge_pages // 4
  faults_returned, held_returned = run_program(PROGRAM, GLIBC_TUNABLES=malloc.RETURN_FREED)
  assert faults_returned >= huge_pages
  assert held > held_returned + 200


CPU = {"JAX_PLATFORMS": "cpu"}
TRAIN, ANALYZE = ["main.py", "--mode=train"], ["main.py", "--mode=analyze"]


@pytest.mark.parametrize(
  ("argv", "environment", "plugin", "expected"),
  [
    (TRAIN, CPU, True, malloc.KEEP_FREED),
    (TRAIN, {}, False, malloc.KEEP_FREED),
    (ANALYZE, CPU, False, malloc.RETURN_FREED),
    (TRAIN, {}, True, None),  # an accelerator
    (ANALYZE, {"JAX_PLATFORMS": "cuda,cpu"}, False, None),
    (TRAIN, CPU | {"JAX_NUM_CPU_DEVICES": "2"}, False, None),
    (TRAIN, CPU | {"XLA_FLAGS": "--a --xla_force_host_platform_device_count=4"}, False, None),
    (TRAIN, CPU | {"JAX_NUM_CPU_DEVICES": "many"}, False, None),  # startup reports it
    (TRAIN, CPU | {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}, False, None),
  ],
)
def test_malloc_is_tuned_on_one_cpu_device_alone(argv, environment, plugin, expected, monkeypatch):
  monkeypatch.setattr(malloc.importlib.util, "find_spec", lambda name: plugin or None)
  assert malloc.choose_tunables(argv, environment) == expected
  monkeypatch.setattr(malloc.sys, "platform", "darwin")
  assert malloc.choose_tunables(argv, environment) is None


def test_a_program_starts_again_once_with_the_same_arguments():
  program = (
    "import os, sys; sys.path.insert(0, '.'); from lrdit.runtime import malloc; "
    "malloc.restart_tuned(); print(int(os.environ['GLIBC_TUNABLES'] == malloc.KEEP_FREED))"
  )
  assert run_program(program, **CPU, JAX_NUM_CPU_DEVICES="1", XLA_FLAGS="") == [1]


def test_settings_of_a_run_are_the_defaults_of_jax_and_flax():
  """Otherwise every process would log that its environment differs."""
  assert startup.fix_settings() == []


def test_overridden_settings_and_those_that_change_rounding_are_logged():
  jax.config.update("jax_random_seed_offset", 3)
  jax.config.update("jax_default_matmul_precision", "highest")
  try:
    ignored, heeded = startup.fix_settings()
    assert ignored.startswith("JAX_RANDOM_SEED_OFFSET is ignored")
    assert heeded.startswith("JAX_DEFAULT_MATMUL_PRECISION=highest is used")
    assert jax.config.jax_random_seed_offset == 0
    assert jax.config.jax_default_matmul_precision == "highest"
  finally:
    jax.config.update("jax_random_seed_offset", 0)
    jax.config.update("jax_default_matmul_precision", None)


def test_no_shell_makes_plots_look_for_a_window(monkeypatch):
  monkeypatch.setattr(startup, "use_compilation_cache", lambda: None)
  monkeypatch.setenv("MPLBACKEND", "no_such_backend")
  startup.prepare()
  assert startup.os.environ["MPLBACKEND"] == "agg"


def test_as_many_files_may_be_open_as_the_system_lets(monkeypatch):
  asked = []
  monkeypatch.setattr(startup.resource, "setrlimit", lambda _, limits: asked.append(limits))
  endless = startup.resource.RLIM_INFINITY
  for limits in ((1024, 4096), (1024, 1 << 20), (1024, endless), (4096, 4096), (endless, endless)):
    monkeypatch.setattr(startup.resource, "getrlimit", lambda _, limits=limits: limits)
    startup.raise_open_files_limit()
  assert asked == [(4096, 4096), (1 << 16, 1 << 20), (1 << 16, endless)]

  def refuse(*_):
    raise ValueError("not allowed to raise maximum limit")

  monkeypatch.setattr(startup.resource, "setrlimit", refuse)
  monkeypatch.setattr(startup.resource, "getrlimit", lambda _: (256, endless))
  startup.raise_open_files_limit()


COMPILE = """
import logging, warnings
from lrdit.runtime import compilation_cache, startup
compilation_cache.MIN_CACHED_SECONDS = 0.0  # however fast this machine compiles
logging.basicConfig(level=logging.INFO, format="%(message)s")
startup.prepare()
import jax
def slow_to_compile(x):
  for _ in range(8):
    x = jax.numpy.linalg.svd(jax.random.normal(jax.random.key(0), (8, 8)) @ x)[0]
  return x
warnings.warn("one of another kind")
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("/cache_hits")))
jax.jit(slow_to_compile)(jax.numpy.eye(8)).block_until_ready()
print(sum(hits))
"""


def test_a_second_process_compiles_nothing_anew(tmp_path):
  def run(**variables):
    environment = {"JAX_COMPILATION_CACHE_DIR": "", "JAX_NUM_CPU_DEVICES": "1", **CPU, **variables}
    return run_program(COMPILE, **environment)[-1]

  assert run(XDG_CACHE_HOME=str(tmp_path)) == 0
  cache = tmp_path / "lrdit"
  assert any("slow_to_compile" in path.name for path in cache.glob("*-cache"))
  assert run(JAX_COMPILATION_CACHE_DIR=str(cache)) >= 1


def test_an_entry_that_was_cut_off_is_compiled_again_once(tmp_path):
  """As after a kill or on a full disk."""
  environment = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), **CPU}
  run_program(COMPILE, **environment)
  (entry,) = (path for path in tmp_path.glob("*-cache") if "slow_to_compile" in path.name)
  whole = entry.read_bytes()
  entry.write_bytes(whole[: len(whole) // 2])
  other = tmp_path / "jit_other-0-cache"
  other.write_bytes(b"")
  told = []
  for _ in range(2):
    told.append(start_program(COMPILE, **environment).stderr)
    assert re.findall("Warning: (.*)", told[-1]) == ["one of another kind"]
  assert [text.count("is compiled again: jit_slow_to_compile") for text in told] == [1, 0]
  assert entry.exists()
  assert other.exists()


OURS = "--xla_gpu_enable_triton_gemm=false"


@pytest.mark.parametrize(
  ("given", "plugin", "known", "expected"),
  [
    (None, True, True, OURS),
    ("--xla_a=1", True, True, f"--xla_a=1 {OURS}"),
    ("--xla_gpu_enable_triton_gemm=true", True, True, "--xla_gpu_enable_triton_gemm=true"),
    (None, False, True, None),
    (None, True, False, None),
    ("--xla_a=1", True, False, "--xla_a=1"),
  ],
)
def test_products_on_a_gpu_come_from_libraries(given, plugin, known, expected, monkeypatch):
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  if given:
    monkeypatch.setenv("XLA_FLAGS", given)
  monkeypatch.setattr(startup.importlib.util, "find_spec", lambda name: plugin or None)
  monkeypatch.setattr(startup, "_xla_complaint", lambda: None if known else "unknown")
  startup.use_cublas()
  assert os.environ.get("XLA_FLAGS") == expected
