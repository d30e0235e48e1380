"""Every test runs on four virtual CPU devices and needs no network.

`LRDIT_TEST_PLATFORM=cuda` runs those marked `gpu` on a GPU instead.
"""

import importlib.metadata
import logging
import os
import pathlib
import shutil
import signal
import tempfile

from lrdit.runtime import startup

os.environ["JAX_PLATFORMS"] = os.environ.get("LRDIT_TEST_PLATFORM", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
  # Small shapes gain nothing from optimized code, and it takes longer to compile. Other XLA
  # flags, such as another CPU's instruction set, are kept.
  flags = ["--xla_backend_optimization_level=0"]
  if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Its older emitters compile a training step in a third of the time; later releases have none.
    flags.append("--xla_cpu_use_fusion_emitters=false")
  flags += os.environ.get("XLA_FLAGS", "").split()
  os.environ["XLA_FLAGS"] = " ".join(dict.fromkeys(flags))
else:
  # Products of float32 are those of float32, as the tolerances expect, and not TF32's.
  os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
  startup.use_cublas()
# Many tests compile the same small programs: one cache, shared by the workers
# and by the command lines and test runs they start, and gone with the process that made it.
if "LRDIT_TEST_CACHE" not in os.environ:
  os.environ["LRDIT_TEST_CACHE"] = tempfile.mkdtemp(prefix="lrdit-test-")
  os.environ["LRDIT_TEST_CACHE_MADE_BY"] = str(os.getpid())
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["LRDIT_TEST_CACHE"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

# A shell starts its background jobs with SIGINT ignored, and what they start inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import jaxtyping
import pytest

ROOT = pathlib.Path(__file__).parents[1]
# The shapes and dtypes in annotations are checked while the tests run. The train state is left
# out, as its tree may hold shapes or placeholders in place of arrays.
ANNOTATED = [
  ".".join(path.relative_to(ROOT).with_suffix("").parts)
  for path in sorted(ROOT.glob("lrdit/**/*.py"))
  if "from jaxtyping import" in path.read_text() and path != ROOT / "lrdit/train/state.py"
]
jaxtyping.install_import_hook(ANNOTATED, "beartype.beartype")

# Faults that tests record as properties of this name, and what the summary says of their number.
COUNTED = {
  "kills": "kill -9 at random moments",
  "disks": "disks that were full or read-only from a random moment on",
  "flips": "files with a random byte flipped or cut there",
}

jax.config.update("jax_num_cpu_devices", 4)


@pytest.fixture(autouse=True, scope="session")
def disks_are_not_waited_for():
  """A killed process, unlike a machine without power, loses nothing that it has written.

  Two files of tests wait 13,000 times, which took most of their time.
  """
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(os, "fsync", lambda _file: None)
    yield


@pytest.fixture(autouse=True)
def log_lines_reach_caplog():
  """Once each: pytest looks whether they propagate before a test, and main.py ends that."""
  logging.getLogger("lrdit").propagate = True


@pytest.fixture
def told(caplog):
  """All that the package logs."""
  caplog.set_level(logging.DEBUG, logger="lrdit")
  return caplog


def pytest_unconfigure():
  if os.environ["LRDIT_TEST_CACHE_MADE_BY"] == str(os.getpid()):
    shutil.rmtree(os.environ["LRDIT_TEST_CACHE"], ignore_errors=True)


def pytest_terminal_summary(terminalreporter):
  """Says what each run on another CPU came to, and how many faults the tests made."""
  reports = [report for group in terminalreporter.stats.values() for report in group]
  told = [
    pair
    for report in reports
    if getattr(report, "when", "") == "call"
    for pair in report.user_properties
  ]
  for text in sorted(value for name, value in told if name == "summary"):
    terminalreporter.write_line(text)
  for kind, text in COUNTED.items():
    if counts := [value for name, value in told if name == kind]:
      terminalreporter.write_line(f"{sum(counts)} {text}")
