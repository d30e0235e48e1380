"""The suite as other CPUs compute it: with fewer instructions, other kernels, fewer threads.

Every run repeats some tests marked `floats` on one of them. `bash launch/test.sh -m other_cpus`
runs the whole suite on each.
"""

import importlib.metadata
import os
import platform
import subprocess
import sys

import pytest
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

from tests import tiny

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86's instructions")

# Each is one run of the suite. Of numpy's own loops, those that need more than the named level are
# switched off.
AVX2 = {
  "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
  "OPENBLAS_CORETYPE": "Haswell",
  "NPY_DISABLE_CPU_FEATURES": ("X86_V3",),
}
# The emitters that users have, which conftest.py replaces on jax 0.10.
EMITTERS = "--xla_cpu_use_fusion_emitters=true"
HAS_EMITTERS = importlib.metadata.version("jaxlib").startswith("0.10.")
SSE4_2 = {
  "XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2" + f" {EMITTERS}" * HAS_EMITTERS,
  "OPENBLAS_CORETYPE": "Zen",
  "NPY_DISABLE_CPU_FEATURES": (),
  "PJRT_NPROC": "1",
  "OPENBLAS_NUM_THREADS": "1",
  "OMP_NUM_THREADS": "1",
}
FOUR_DEVICES = {"OPENBLAS_CORETYPE": "SkylakeX", "JAX_NUM_CPU_DEVICES": "4"}
SETTINGS = {
  "AVX2, Haswell": AVX2,
  "SSE4.2, Zen, one thread": SSE4_2,
  "SkylakeX, four virtual devices": FOUR_DEVICES,
}
NEEDS = {"Haswell": "X86_V3", "Zen": "X86_V3", "SkylakeX": "X86_V4"}


def run_suite(name, *arguments):
  """Run pytest in the environment of a setting; return its last line."""
  setting = dict(SETTINGS[name])
  if not __cpu_features__[NEEDS[setting["OPENBLAS_CORETYPE"]]]:
    pytest.skip(f"this CPU cannot stand in for {name}")
  if "NPY_DISABLE_CPU_FEATURES" in setting:
    kept = setting["NPY_DISABLE_CPU_FEATURES"]
    others = [f for f in __cpu_dispatch__ if __cpu_features__[f] and f not in kept]
    setting["NPY_DISABLE_CPU_FEATURES"] = " ".join(others)
  inherited = {
    key: value
    for key, value in os.environ.items()
    if key != "LRDIT_TEST_CACHE" and not key.startswith("PYTEST_")
  }
  done = subprocess.run(
    [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
    cwd=tiny.ROOT,
    env=inherited | setting,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout
  return done.stdout.splitlines()[-1].strip("= ")


def test_comparisons_of_floats_hold_on_another_cpu():
  tests = (tiny.ROOT / "tests").rglob("*_test.py")
  files = sorted(str(f) for f in tests if "pytest.mark.floats" in f.read_text())
  one = ["-p", "tests.one_variant"]
  run_suite("SSE4.2, Zen, one thread", "-m", "floats", *one, *files)


@pytest.mark.other_cpus
@pytest.mark.parametrize("name", SETTINGS)
def test_the_suite_passes(name, record_property):
  summary = run_suite(name, f"--ignore={__file__}")
  record_property("summary", f"{name}: {summary}")
