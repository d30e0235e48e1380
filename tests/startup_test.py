import subprocess
import sys

import pytest

from lrdit import startup
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
  kept = count_faults("from lrdit import startup; startup.keep_freed_memory()")
  assert kept < pages_at_most // 4


def test_other_allocators_are_left_alone(monkeypatch):
  monkeypatch.setattr(startup.sys, "platform", "darwin")
  monkeypatch.setattr(startup.ctypes, "CDLL", lambda _: pytest.fail("called"))
  startup.keep_freed_memory()


def test_a_second_run_compiles_nothing_anew(tmp_path):
  cache = tmp_path / "xdg" / "lrdit"
  places = {"XDG_CACHE_HOME": str(tmp_path / "xdg"), "JAX_COMPILATION_CACHE_DIR": ""}
  tiny.run_main(tmp_path / "a", "--config.training.num_steps=2", **places)
  written = {path.name: path.stat().st_mtime_ns for path in cache.glob("*-cache")}
  assert any("train_step" in name or "_fun" in name for name in written), written
  tiny.run_main(tmp_path / "b", "--config.training.num_steps=2", **places)
  assert {path.name: path.stat().st_mtime_ns for path in cache.glob("*-cache")} == written
  assert tiny.losses(tmp_path / "a") == tiny.losses(tmp_path / "b")
