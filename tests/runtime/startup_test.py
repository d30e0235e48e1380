import os
import subprocess
import sys

import jax
import pytest

from lrdit.runtime import startup
from tests import tiny

BLOCK_BYTES = 256 << 20

# Page faults of writing a large block that was freed just before.
PROGRAM = f"""
import resource
{{setup}}
import numpy as np
def touch():
  np.empty({BLOCK_BYTES}, np.uint8).fill(1)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count_faults(setup):
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM.format(setup=setup)],
    cwd=tiny.ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_freed_memory_is_used_again_without_faults():
  pages_at_most = BLOCK_BYTES // (2 << 20)  # as many as there are huge pages
  assert count_faults("") >= pages_at_most
  kept = count_faults("from lrdit.runtime import startup; startup.keep_freed_memory()")
  assert kept < pages_at_most // 4


def test_several_cpu_devices_keep_the_allocator_as_it_is(monkeypatch):
  kept = []
  monkeypatch.setattr(startup, "keep_freed_memory", lambda: kept.append(True))
  monkeypatch.setattr(startup, "use_compilation_cache", lambda: None)
  flag = "--xla_force_host_platform_device_count=4"
  for variables, count in (
    ({}, 1),
    ({"JAX_NUM_CPU_DEVICES": "2"}, 2),
    ({"XLA_FLAGS": f"--a {flag}"}, 4),
  ):
    assert startup.num_cpu_devices(variables) == count
    for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS"):
      monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
      monkeypatch.setenv(name, value)
    startup.prepare("train")
  assert len(kept) == 1


# Memory that is held after a large block was freed.
HELD = """
import resource
from lrdit.runtime import startup
startup.{setup}()
import numpy as np
np.ones(256 << 20, np.uint8)
with open("/proc/self/statm") as file:
  print(int(file.read().split()[1]) * resource.getpagesize())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_an_analysis_gives_freed_memory_back(monkeypatch):
  def held(setup):
    command = [sys.executable, "-c", HELD.format(setup=setup)]
    done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)

  assert held("keep_freed_memory") > held("give_back_freed_memory") + (200 << 20)
  called = []
  for name in ("keep_freed_memory", "give_back_freed_memory", "use_compilation_cache"):
    monkeypatch.setattr(startup, name, lambda name=name: called.append(name))
  startup.prepare("analyze")
  assert called == ["give_back_freed_memory", "use_compilation_cache"]


def test_other_allocators_are_left_alone(monkeypatch):
  monkeypatch.setattr(startup.sys, "platform", "darwin")
  opened = []
  monkeypatch.setattr(startup.ctypes, "CDLL", opened.append)
  startup.keep_freed_memory()
  assert opened == []


def test_settings_of_a_run_are_the_defaults_of_jax_and_flax():
  """Else every process would be told that its shell says otherwise."""
  assert startup.fix_settings_of_a_run() == []


def test_what_is_overridden_and_what_is_heeded_is_said():
  jax.config.update("jax_random_seed_offset", 3)
  jax.config.update("jax_default_matmul_precision", "highest")
  try:
    ignored, heeded = startup.fix_settings_of_a_run()
    assert ignored.startswith("JAX_RANDOM_SEED_OFFSET is ignored")
    assert heeded.startswith("JAX_DEFAULT_MATMUL_PRECISION=highest is heeded")
    assert jax.config.jax_random_seed_offset == 0
    assert jax.config.jax_default_matmul_precision == "highest"
  finally:
    jax.config.update("jax_random_seed_offset", 0)
    jax.config.update("jax_default_matmul_precision", None)


def test_no_shell_makes_plots_look_for_a_window(monkeypatch):
  monkeypatch.setenv("MPLBACKEND", "no_such_backend")
  startup.prepare("analyze")
  assert startup.os.environ["MPLBACKEND"] == "agg"


def test_as_many_files_may_be_open_as_the_system_lets(monkeypatch):
  asked = []
  monkeypatch.setattr(startup.resource, "setrlimit", lambda _, limits: asked.append(limits))
  endless = startup.resource.RLIM_INFINITY
  for limits in ((1024, 4096), (1024, 1 << 20), (1024, endless), (4096, 4096), (endless, endless)):
    monkeypatch.setattr(startup.resource, "getrlimit", lambda _, limits=limits: limits)
    startup.raise_limit_of_open_files()
  assert asked == [(4096, 4096), (1 << 16, 1 << 20), (1 << 16, endless)]

  def refuse(*_):
    raise ValueError("not allowed to raise maximum limit")

  monkeypatch.setattr(startup.resource, "setrlimit", refuse)
  monkeypatch.setattr(startup.resource, "getrlimit", lambda _: (256, endless))
  startup.raise_limit_of_open_files()


COMPILE = """
from lrdit.runtime import startup
startup.MIN_CACHED_SECONDS = 0.0  # however fast this machine compiles
startup.prepare("train")
import jax
def slow_to_compile(x):
  for _ in range(8):
    x = jax.numpy.linalg.svd(jax.random.normal(jax.random.key(0), (8, 8)) @ x)[0]
  return x
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("/cache_hits")))
jax.jit(slow_to_compile)(jax.numpy.eye(8)).block_until_ready()
print(sum(hits))
"""


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"])
def test_a_second_process_compiles_nothing_anew(tmp_path, variable):
  environment = tiny.environment(JAX_COMPILATION_CACHE_DIR="") | {variable: str(tmp_path)}
  cache = tmp_path / "lrdit" if variable == "XDG_CACHE_HOME" else tmp_path

  def run():
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, cwd=tiny.ROOT, env=environment, check=True, capture_output=True)
    return int(done.stdout.split()[-1])

  assert run() == 0
  assert any("slow_to_compile" in path.name for path in cache.glob("*-cache"))
  assert run() >= 1


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
  monkeypatch.setattr(startup, "_complaint_of_xla", lambda: None if known else "unknown")
  startup.take_products_from_libraries()
  assert os.environ.get("XLA_FLAGS") == expected
