"""Several processes through the real command line, on this machine."""

import os
import random
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest

from tests import tiny
from tests.train_test import final_state

TIMEOUT = 240
STEPS = 40
FLAGS = (
  f"--config.training.num_steps={STEPS}",
  "--config.training.eval_every_steps=20",
  "--config.checkpoint.every_steps=5",
  "--config.sampling.num_samples=22",
)
FIELDS = dict(training__num_steps=STEPS, training__eval_every_steps=20, checkpoint__every_steps=5)


def free_port():
  with socket.socket() as sock:
    sock.bind(("127.0.0.1", 0))
    return sock.getsockname()[1]


class Job:
  """The processes of one start; ended by SIGKILL whatever happens."""

  def __init__(self, workdir, num_processes, num_devices, *flags):
    port = free_port()
    self.logs = [workdir.with_name(f"{workdir.name}.{i}.log") for i in range(num_processes)]
    self.processes = []
    for i, log in enumerate(self.logs):
      shared = (
        f"--coordinator=127.0.0.1:{port}",
        f"--num_processes={num_processes}",
        f"--process_id={i}",
      )
      with log.open("w") as file:
        self.processes.append(
          subprocess.Popen(
            tiny.command(workdir, *FLAGS, *flags, *shared),
            cwd=tiny.ROOT,
            env=tiny.environment(num_devices),
            stdout=file,
            stderr=file,
          )
        )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.processes:
      process.kill()
      process.wait()

  def wait(self, timeout=TIMEOUT):
    """Exit status of every process."""
    deadline = time.monotonic() + timeout
    try:
      return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]
    except subprocess.TimeoutExpired as error:
      raise AssertionError(f"still running:\n{self.text()}") from error

  def wait_for_line(self, path, count=1):
    """Returns once a file of the run has so many lines."""
    deadline = time.monotonic() + TIMEOUT
    while not path.exists() or path.read_text().count("\n") < count:
      assert time.monotonic() < deadline, self.text()
      assert all(p.poll() is None for p in self.processes), self.text()
      time.sleep(0.02)

  def text(self):
    return "\n".join(log.read_text()[-20000:] for log in self.logs)


def run(workdir, num_processes, num_devices, *flags):
  with Job(workdir, num_processes, num_devices, *flags) as job:
    assert job.wait() == [0] * num_processes, job.text()
    return job.text()


def assert_same_run(workdir, reference):
  a, b = (tiny.read_metrics(path) for path in (workdir, reference))
  assert [line["step"] for line in a] == [line["step"] for line in b]
  for name in ("train/loss", "train/grad_norm", "eval/loss"):
    got, expected = ([line[name] for line in lines if name in line] for lines in (a, b))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
  leaves = [jax.tree.leaves(final_state(path, **FIELDS)) for path in (workdir, reference)]
  for x, y in zip(*leaves, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def samples(workdir):
  return (workdir / "samples" / "default" / "samples.npz").read_bytes()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
  """One process with four devices, undisturbed, and its samples."""
  workdir = tmp_path_factory.mktemp("one") / "run"
  for mode in ("train", "sample"):
    run(workdir, 1, 4, f"--mode={mode}")
  return workdir


def assert_same_samples(workdir, num_processes, num_devices):
  """The same checkpoint gives the same samples on any topology."""
  name = f"by_{num_processes}"
  flags = ("--mode=sample", f"--config.sampling.name={name}")
  run(workdir, num_processes, num_devices, *flags)
  assert (workdir / "samples" / name / "samples.npz").read_bytes() == samples(workdir)


def test_sigterm_and_a_death_in_one_process_reach_all(one_process, tmp_path):
  """Every start on another topology: what one wrote, the next one goes on from."""
  workdir = tmp_path / "run"
  with Job(workdir, 2, 1) as job:
    job.wait_for_line(workdir / "metrics.jsonl", 3)
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.wait() == [0, 0], job.text()
    assert job.text().count("stopped by SIGTERM at step") == 1
  steps = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
  assert 3 <= steps[-1] < STEPS
  with Job(workdir, 2, 2) as job:
    job.wait_for_line(workdir / "metrics.jsonl", steps[-1] + 2)
    job.processes[1].kill()
    assert job.wait(timeout=60) == [75, -signal.SIGKILL], job.text()
    assert "process 0: error: another process has ended" in job.text()
  assert "resuming from the checkpoint of step" in run(workdir, 1, 2)
  assert_same_run(workdir, one_process)


def test_two_processes_draw_the_same_samples(one_process):
  assert_same_samples(one_process, 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "num_devices"), [(2, 2), (4, 1)])
def test_other_topologies_are_the_same_run(one_process, tmp_path, num_processes, num_devices):
  log = run(tmp_path / "run", num_processes, num_devices)
  assert log.count("trained 40 steps") == 1  # the first process speaks for all
  assert_same_run(tmp_path / "run", one_process)
  assert_same_samples(one_process, num_processes, num_devices)


@pytest.mark.slow
def test_modes_of_one_process_refuse_several(tmp_path):
  with Job(tmp_path / "run", 2, 1, "--mode=benchmark") as job:
    assert set(job.wait()) <= {2, 75, -signal.SIGABRT}, job.text()
    assert "--mode=benchmark is for one process" in job.text()


def changed(path):
  return path.stat().st_mtime_ns if path.exists() else 0


def kill_again_and_again(start, progress, kills, seed):
  """Starts anew after every kill -9 at a random moment of the work, then lets it finish.

  Args:
    start: makes a `Job`.
    progress: a file that the work writes to.
    kills: how many.
    seed: of the moments and of the process that is killed.
  """
  rng = random.Random(seed)
  for _ in range(kills):
    before = changed(progress)
    with start() as job:
      deadline = time.monotonic() + TIMEOUT
      while changed(progress) == before:
        assert time.monotonic() < deadline, job.text()
        time.sleep(0.01)
      time.sleep(rng.uniform(0.0, 1.5))
      victim = rng.randrange(len(job.processes))
      job.processes[victim].kill()
      statuses = job.wait(timeout=60)
      assert statuses.pop(victim) == -signal.SIGKILL, job.text()
      assert set(statuses) <= {75, -signal.SIGABRT}, job.text()
  with start() as job:
    assert set(job.wait()) == {0}, job.text()


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "kills"), [(1, 10), (2, 10)])
def test_killed_training_ends_as_if_undisturbed(tmp_path, record_property, num_processes, kills):
  """A checkpoint every second step: many kills meet one being written."""
  flags = ("--config.training.num_steps=400", "--config.checkpoint.every_steps=2")
  fields = FIELDS | dict(training__num_steps=400, checkpoint__every_steps=2)
  undisturbed, workdir = tmp_path / "undisturbed", tmp_path / "run"
  run(undisturbed, num_processes, 1, *flags)
  kill_again_and_again(
    lambda: Job(workdir, num_processes, 1, *flags), workdir / "metrics.jsonl", kills, num_processes
  )
  record_property("kills", kills)
  assert tiny.losses(workdir) == tiny.losses(undisturbed)
  states = [final_state(path, **fields) for path in (workdir, undisturbed)]
  for x, y in zip(*map(jax.tree.leaves, states), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_killed_exports_end_as_an_undisturbed_one(one_process, record_property):
  fields = {"sampling.num_samples": 40_000, "sampling.batch_size": 40}
  flags = ("--mode=sample", *(f"--config.{field}={value}" for field, value in fields.items()))
  directories = [one_process / "samples" / name for name in ("killed", "undisturbed_export")]

  def job(directory):
    return Job(one_process, 1, 1, *flags, f"--config.sampling.name={directory.name}")

  with job(directories[1]) as undisturbed:
    assert undisturbed.wait() == [0], undisturbed.text()
  kill_again_and_again(lambda: job(directories[0]), directories[0] / "progress.json", 10, seed=3)
  record_property("kills", 10)
  exports = [directory / "samples.npz" for directory in directories]
  assert exports[0].read_bytes() == exports[1].read_bytes()


def test_the_environments_of_clusters_are_known():
  from lrdit.parallel import is_cluster

  alone = {"TPU_SKIP_MDS_QUERY": "1", "PATH": os.environ["PATH"]}
  assert not is_cluster(alone)
  assert not is_cluster(alone | {"SLURM_STEP_NUM_TASKS": "1"})
  assert not is_cluster(alone | {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"})  # outside srun
  assert is_cluster(alone | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"})
  assert is_cluster(alone | {"OMPI_COMM_WORLD_SIZE": "2"})
  assert is_cluster(alone | {"TPU_WORKER_HOSTNAMES": "a,b"})
