"""Several processes through the real command line, on this machine."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from lrdit.modes import sample, train
from lrdit.runtime import cluster
from lrdit.runtime.errors import UserError
from tests import scripts, tiny
from tests.trained import final_state

TIMEOUT = 240
STEPS = 40
# One block and two ranks: a program for each topology is compiled.
FIELDS = dict(
  model__depth=1,
  rank__num_buckets=2,
  training__num_steps=STEPS,
  training__eval_every_steps=20,
  checkpoint__every_steps=5,
  sampling__num_samples=22,
)
FLAGS = [f"--config.{name.replace('__', '.')}={value}" for name, value in FIELDS.items()]


class Job(scripts.Processes):
  """The processes of one start, which are killed at the end."""

  def __init__(self, workdir, num_processes, num_devices, *flags, apart=None):
    """Start the processes.

    Args:
      workdir: of the run.
      num_processes: how many.
      num_devices: of each process.
      flags: of all.
      apart: (number, command that starts it, its flags, its environment) of one that differs.
    """
    port = scripts.free_port()
    number, *otherwise = apart or (None, [], [], {})
    self.logs = [workdir.with_name(f"{workdir.name}.{i}.log") for i in range(num_processes)]
    super().__init__()
    for i, log in enumerate(self.logs):
      shared = (
        f"--coordinator=127.0.0.1:{port}",
        f"--num_processes={num_processes}",
        f"--process_id={i}",
      )
      wrapper, own_flags, environment = otherwise if i == number else ([], [], {})
      with log.open("w") as file:
        self.processes.append(
          subprocess.Popen(
            [*wrapper, *tiny.command(workdir, *FLAGS, *flags, *own_flags, *shared)],
            cwd=tiny.ROOT,
            env=tiny.environment(num_devices, **environment),
            stdout=file,
            stderr=file,
          )
        )

  def wait(self, timeout=TIMEOUT):
    """Return the exit status of every process."""
    deadline = time.monotonic() + timeout
    try:
      return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]
    except subprocess.TimeoutExpired as error:
      raise AssertionError(f"still running:\n{self.text()}") from error

  def wait_for_line(self, path, count=1):
    """Return once a file of the run has so many lines."""
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


def samples(workdir, name="default"):
  """Return (images as whole numbers, labels) of a sample set."""
  with np.load(workdir / "samples" / name / "samples.npz") as arrays:
    return arrays["arr_0"].astype(int), arrays["arr_1"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
  """An undisturbed run of one process with two devices, this one, and its samples."""
  workdir = tmp_path_factory.mktemp("one") / "run"
  for mode in (train.train, sample.sample):
    mode(tiny.tiny_config(**FIELDS), str(workdir), jax.devices()[:2])
  return workdir


def assert_same_samples(workdir, num_processes, num_devices):
  """The same checkpoint gives the same samples on any topology."""
  name = f"by_{num_processes}"
  flags = ("--mode=sample", f"--config.sampling.name={name}")
  run(workdir, num_processes, num_devices, *flags)
  (got, labels), (expected, expected_labels) = samples(workdir, name), samples(workdir)
  np.testing.assert_array_equal(labels, expected_labels)
  assert np.abs(got - expected).max() <= 1  # a gray level is rounded, and where is up to the CPU


def test_sigterm_and_a_death_in_one_process_reach_all(one_process, tmp_path):
  """Then one process goes on from what two have written."""
  workdir = tmp_path / "run"
  with Job(workdir, 2, 1) as job:
    job.wait_for_line(workdir / "metrics.jsonl", 3)
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.wait() == [75, 75], job.text()
    assert job.text().count("stopped by SIGTERM at step") == 1
  steps = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
  assert 3 <= steps[-1] < STEPS
  with Job(workdir, 2, 1) as job:
    job.wait_for_line(workdir / "metrics.jsonl", steps[-1] + 2)
    job.processes[1].kill()
    statuses = job.wait(timeout=60)
    assert statuses == [75, -signal.SIGKILL], job.text()
    assert job.text().count("error: ") == 1
    assert "process 0: error: another process has ended" in job.text()
  assert "resuming from the checkpoint of step" in run(workdir, 1, 2)
  assert_same_run(workdir, one_process)


def test_two_processes_sample_the_same_images(one_process):
  assert_same_samples(one_process, 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "num_devices"), [(2, 2), (4, 1)])
def test_other_topologies_are_the_same_run(one_process, tmp_path, num_processes, num_devices):
  log = run(tmp_path / "run", num_processes, num_devices)
  assert log.count("trained 40 steps") == 1  # only the first process logs it
  assert_same_run(tmp_path / "run", one_process)
  assert_same_samples(one_process, num_processes, num_devices)


@pytest.mark.slow
def test_modes_of_one_process_refuse_several(tmp_path):
  with Job(tmp_path / "run", 2, 1, "--mode=benchmark") as job:
    assert set(job.wait()) <= {2, 75}, job.text()
    assert "--mode=benchmark is for one process" in job.text()


def errors_of(job):
  return [re.findall(r"(?m)^process \d: error: (.*)", log.read_text()) for log in job.logs]


@pytest.mark.slow
def test_processes_of_different_configs_report_what_differs(tmp_path):
  with Job(tmp_path / "run", 3, 1, apart=(2, [], ["--config.seed=7"], {})) as job:
    assert job.wait() == [1, 1, 1], job.text()
  says = "the config of process 2 differs from process 0: {}. Start all with the same flags, on "
  words = ["see its message"] * 2 + ["seed (0 there, 7 asked for)"]
  assert errors_of(job) == [[says.format(w) + "the same data"] for w in words]
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_on_different_data_report_it(tmp_path, monkeypatch):
  """The disks of two hosts may hold other files under the same name."""
  for host, count in (("a", 40), ("b", 41)):
    (tmp_path / host).mkdir()
    images = np.zeros((count, 8, 8, 1), np.uint8)
    np.savez(tmp_path / host / "images.npz", image=images, label=np.arange(count) % 10)
  flags = ("--config.data.name=npz", "--config.data.data_dir=~/images.npz")
  monkeypatch.setenv("HOME", str(tmp_path / "a"))
  other = {"HOME": str(tmp_path / "b")}
  with Job(tmp_path / "run", 2, 1, *flags, apart=(1, [], [], other)) as job:
    statuses = job.wait()
  assert statuses == [1, 1], job.text()
  assert "the data of process 1 differs from process 0" in errors_of(job)[1][0]


@pytest.mark.slow
def test_a_non_finite_loss_is_reported_by_all(tmp_path):
  """All wait until the first one reports what was saved."""
  workdir = tmp_path / "run"
  run(workdir, 2, 1, "--config.training.num_steps=5")
  config = workdir / "config.json"
  config.write_text(config.read_text().replace('"learning_rate": 0.002', '"learning_rate": 1e+29'))
  with Job(workdir, 2, 1, "--config.optimizer.learning_rate=1e29") as job:
    assert job.wait() == [1, 1], job.text()
  (first,), (second,) = errors_of(job)
  assert first == second
  assert re.match(r"the \w+ of step \d+ is not finite.* The last good checkpoint is step 5", first)


@pytest.mark.slow
def test_terminated_sampling_of_several_processes_goes_on(one_process):
  flags = (
    "--mode=sample",
    "--config.sampling.num_samples=20000",
    "--config.sampling.batch_size=40",
  )
  directory = one_process / "samples" / "terminated"
  name = f"--config.sampling.name={directory.name}"
  with Job(one_process, 2, 1, *flags, name) as job:
    job.wait_for_line(directory / "progress.json")
    job.processes[1].send_signal(signal.SIGTERM)
    statuses = job.wait(timeout=60)
    assert statuses == [75, -signal.SIGTERM], job.text()
  assert not (directory / "samples.npz").exists()
  run(one_process, 2, 1, *flags, name)
  run(one_process, 2, 1, *flags, "--config.sampling.name=at_once")
  sample_sets = [
    one_process / "samples" / name / "samples.npz" for name in ("terminated", "at_once")
  ]
  assert sample_sets[0].read_bytes() == sample_sets[1].read_bytes()


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(one_process):
  found = []
  for num_processes, num_devices in ((1, 2), (2, 1)):
    run(one_process, num_processes, num_devices, "--mode=evaluate")
    found.append(json.loads((one_process / "evaluation.json").read_text()))
    (one_process / "evaluation.json").unlink()  # else it is left alone
  alone, shared = found
  for weights in ("raw", "ema"):
    a, b = (found["held_out"].pop(weights) for found in (alone, shared))
    assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
    for x, y in zip(a["groups"], b["groups"], strict=True):
      assert y.pop("loss") == pytest.approx(x.pop("loss"), rel=1e-6)
      assert x == y
  assert alone == shared


@pytest.mark.slow
def test_grids_and_a_curriculum_over_two_processes(tmp_path):
  flags = (
    "--config.training.sample_every_steps=20",
    "--config.curriculum.enabled=True",
    "--config.curriculum.boundaries=(0,400,700,1000)",
    "--config.curriculum.check_every_steps=4",
    "--config.curriculum.patience=1",
    "--config.curriculum.restart_optimizer=True",
  )
  workdirs = tmp_path / "one", tmp_path / "two"
  for num_processes, workdir in enumerate(workdirs, start=1):
    run(workdir, num_processes, 2 // num_processes, *flags)
  lines = [tiny.read_metrics(workdir) for workdir in workdirs]
  stages = [[line["train/stage"] for line in run] for run in lines]
  assert stages[0] == stages[1]
  assert max(stages[0]) >= 3
  losses = [tiny.losses(workdir) for workdir in workdirs]
  np.testing.assert_allclose(*losses, rtol=1e-5)
  for name in ("step_00000020.png", "step_00000040.png"):
    images = [np.asarray(Image.open(w / "samples" / name), np.int16) for w in workdirs]
    assert np.abs(images[0] - images[1]).max() <= 1


@pytest.mark.slow
def test_a_full_disk_of_the_first_process_ends_all(tmp_path):
  workdir = tmp_path / "run"
  run(workdir, 2, 1, "--config.training.num_steps=5")
  no_cache = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
  with Job(workdir, 2, 1, apart=(0, ["prlimit", "--fsize=20000"], [], no_cache)) as job:
    statuses = job.wait()
  assert statuses == [1, 75], job.text()
  assert errors_of(job)[0][0].startswith("cannot save a checkpoint under")
  run(workdir, 2, 1)


def changed(path):
  return path.stat().st_mtime_ns if path.exists() else 0


def kill_again_and_again(start, progress, kills, seed):
  """Kill a process at random moments of the work, start again each time, and finish at last.

  Args:
    start: makes a `Job`.
    progress: a file that the work writes to.
    kills: how often.
    seed: of the moments and the processes.
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
      assert set(statuses) <= {75}, job.text()
  with start() as job:
    assert set(job.wait()) == {0}, job.text()


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "kills"), [(1, 10), (2, 10)])
def test_killed_training_ends_as_if_undisturbed(tmp_path, record_property, num_processes, kills):
  """A checkpoint is saved every second step, so that many kills meet one being written."""
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
@pytest.mark.parametrize("num_processes", [1, 2])
def test_killed_exports_end_as_an_undisturbed_one(one_process, record_property, num_processes):
  fields = {"sampling.num_samples": 40_000, "sampling.batch_size": 40}
  flags = ("--mode=sample", *(f"--config.{field}={value}" for field, value in fields.items()))
  names = (f"killed_{num_processes}", f"undisturbed_{num_processes}")
  directories = [one_process / "samples" / name for name in names]

  def job(directory):
    return Job(one_process, num_processes, 1, *flags, f"--config.sampling.name={directory.name}")

  with job(directories[1]) as undisturbed:
    assert set(undisturbed.wait()) == {0}, undisturbed.text()
  kill_again_and_again(lambda: job(directories[0]), directories[0] / "progress.json", 10, seed=3)
  record_property("kills", 10)
  sample_sets = [directory / "samples.npz" for directory in directories]
  assert sample_sets[0].read_bytes() == sample_sets[1].read_bytes()


def test_clusters_are_detected_by_their_environment():
  def is_cluster(environment):
    return cluster.detection_method(environment) == "jax"

  alone = {"TPU_SKIP_MDS_QUERY": "1", "PATH": os.environ["PATH"]}
  assert not is_cluster(alone)
  assert not is_cluster(alone | {"SLURM_STEP_NUM_TASKS": "1"})
  assert not is_cluster(alone | {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"})  # outside srun
  assert is_cluster(alone | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"})
  slurm = {"SLURM_STEP_NUM_TASKS": "4", "PMI_SIZE": "4"}
  assert is_cluster(alone | slurm)  # srun --mpi=pmi2
  assert is_cluster(alone | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://a:1"})
  assert is_cluster(alone | {"TPU_WORKER_HOSTNAMES": "a,b"})
  mpi = [{"OMPI_COMM_WORLD_SIZE": "2"}, {"PMI_SIZE": "2"}, slurm | {"PMI_SIZE": "8"}]
  assert [cluster.detection_method(alone | e) for e in mpi] == ["mpi4py"] * 3


def test_an_mpi_without_mpi4py_is_an_error(monkeypatch):
  monkeypatch.setenv("PMI_SIZE", "2")
  monkeypatch.setitem(sys.modules, "mpi4py", None)  # importing it fails
  with pytest.raises(UserError, match=r"install mpi4py and .* or give --coordinator"):
    cluster.find_cluster(None, None, None)
