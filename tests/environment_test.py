"""Mistakes and limits outside the command line: variables, other processes, the system."""

import os
import subprocess
import sys

import pytest

from lrdit.experiment import Experiment
from lrdit.runtime import cluster, startup
from lrdit.runtime.errors import UserError, as_user_error
from tests import tiny
from tests.command_line import DIGITS, assert_one_line


def test_the_default_directory_of_datasets_may_be_unset_or_empty_or_wrong(monkeypatch):
  config = tiny.tiny_config(data__name="cifar10", data__image_size=32, data__num_channels=3)
  monkeypatch.setenv("TFDS_DATA_DIR", "")
  monkeypatch.setenv("HOME", "/nowhere")
  with pytest.raises(UserError, match="no prepared cifar10 under /nowhere/tensorflow_datasets"):
    Experiment(config).source("train")
  monkeypatch.setenv("TFDS_DATA_DIR", "gs://bucket")
  with pytest.raises(UserError, match=r"^TFDS_DATA_DIR=gs://bucket is an address"):
    Experiment(config).source("train")


# The environment: read while jax is imported, so that each needs a process.

ENVIRONMENTS = {
  "no such platform": ({"JAX_PLATFORMS": "cuda"}, "JAX_PLATFORMS=cuda: no device to compute on"),
  "no number of devices": (
    {"JAX_NUM_CPU_DEVICES": "two"},
    "JAX_NUM_CPU_DEVICES=two in the environment",
  ),
  "no truth": ({"JAX_ENABLE_X64": "maybe"}, "JAX_ENABLE_X64=maybe in the environment: invalid"),
  "unknown generator": (
    {"JAX_DEFAULT_PRNG_IMPL": "mt19937"},
    "JAX_DEFAULT_PRNG_IMPL=mt19937 in the environment: Invalid value",
  ),
  "no seconds": ({"TQDM_MININTERVAL": "soon"}, "TQDM_MININTERVAL=soon in the environment: could"),
  "unknown flag of XLA": (
    {"XLA_FLAGS": "--xla_nonsense=1"},
    "XLA_FLAGS=--xla_nonsense=1 in the environment: Unknown flag",
  ),
  "no value of XLA's": (
    {"XLA_FLAGS": "--xla_force_host_platform_device_count=two"},
    "Couldn't interpret value two for flag xla_force_host_platform_device_count",
  ),
}


@pytest.mark.parametrize(("variables", "words"), ENVIRONMENTS.values(), ids=ENVIRONMENTS.keys())
def test_a_mistake_in_the_environment_names_the_variable(variables, words, tmp_path):
  command = [sys.executable, "main.py", DIGITS, f"--workdir={tmp_path}/run"]
  environment = {"JAX_PLATFORMS": "cpu", "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
  done = subprocess.run(
    command,
    cwd=tiny.ROOT,
    env=environment | variables,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert_one_line(done.returncode, 2, done.stderr, words)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", ["two", "0", "-5", "1.5"])
def test_devices_are_counted_from_one(given, monkeypatch):
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", given)
  with pytest.raises(UserError, match=f"JAX_NUM_CPU_DEVICES={given} "):
    startup.prepare()


@pytest.mark.parametrize("name", cluster.COUNTS)
def test_counts_of_processes_may_be_empty_but_not_words(name):
  alone = {"TPU_SKIP_MDS_QUERY": "1"}
  assert cluster.detection_method(alone | {name: ""}) is None
  for given in ("x", "-1", "2.0"):
    with pytest.raises(UserError, match=f"{name}={given} in the environment"):
      cluster.detection_method(alone | {name: given})


def test_a_process_whose_others_never_come_says_so_and_ends(tmp_path):
  """As in `srun -n 4 --pty bash`: SLURM tells of four processes, and one is started."""
  slurm = {
    "SLURM_JOB_ID": str(os.getpid()),  # the coordinator's port follows from it
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
  }
  program = (
    "import sys, main; from lrdit.runtime import startup; startup.prepare(); "
    "from lrdit.runtime import cluster; "
    "cluster.START_SECONDS, cluster.LOGGED_AFTER_SECONDS = 3, 1; "
    "sys.exit(main.run(['main.py', *sys.argv[1:]]))"
  )
  done = subprocess.run(
    [sys.executable, "-c", program, DIGITS, f"--workdir={tmp_path}/run"],
    cwd=tiny.ROOT,
    env=tiny.environment() | slurm,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == 75, done.stderr
  waiting, error = done.stderr.splitlines()
  for line in (waiting, error):
    assert (
      "--num_processes=1 runs this process alone (there are several by SLURM_STEP_NUM_TASKS=4"
      in line
    )
  assert waiting.startswith("a process: waiting for the other processes, up to 3 s")
  assert error.startswith("a process: error: the other processes cannot be reached (not all came")
  assert not (tmp_path / "run").exists()


def test_what_jax_was_asked_to_look_for_is_told_as_such(monkeypatch):
  error = FloatingPointError("invalid value (inf) encountered in div")
  assert as_user_error(error) is None
  monkeypatch.setenv("JAX_DEBUG_INFS", "1")
  assert "raised because JAX_DEBUG_INFS is set" in str(as_user_error(error))


# Limits of the system.


@pytest.mark.parametrize(
  ("error", "words"),
  [
    (OSError(24, "Too many open files", "x"), "too many open files: the limit of this process is"),
    (RuntimeError("open failed: Too many open files"), "raise it by 'ulimit -n NUMBER'"),
    (MemoryError(), "out of memory (the machine gives no more)"),
    (OSError(12, "Cannot allocate memory"), "out of memory"),
    (RuntimeError("can't start new thread"), "raise 'ulimit -u NUMBER'"),
  ],
)
def test_a_limit_of_the_system_is_named(error, words):
  assert words in str(as_user_error(error))
  wrapped = ValueError("a library's")
  wrapped.__cause__ = error
  assert words in str(as_user_error(wrapped))
