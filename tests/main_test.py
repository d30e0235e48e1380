"""The command line as a whole: help, tracebacks, workdirs and disks that fail."""

import json
import os
import pathlib
import shutil
import subprocess

import pytest

import main
from lrdit.experiment import Experiment
from lrdit.model import flops
from lrdit.modes import train
from tests import tiny
from tests.command_line import assert_one_line, run_in_process


def test_no_flags_and_help(capsys, monkeypatch):
  status, stderr = run_in_process(capsys, monkeypatch, [])
  assert_one_line(status, 2, stderr, "--config is missing")
  assert main.run(["main.py", "--help"]) == 0
  assert "--mode" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("mode", "data"), [("train", "train 1498, eval 299"), ("benchmark", "digits: not read")]
)
def test_a_dry_run_prints_the_resolved_run_and_writes_nothing(
  mode, data, tmp_path, capsys, monkeypatch
):
  monkeypatch.chdir(tiny.ROOT)
  flags = (f"--mode={mode}", "--dry_run", "--config.model.depth=2")
  argv = tiny.command(tmp_path / "run", *flags, arg="method=adaptive")
  assert main.run(argv[1:]) == 0
  printed = capsys.readouterr().out
  experiment = Experiment(tiny.tiny_config("method=adaptive", model__depth=2))
  ranks = experiment.plan.by_name["blocks_1/mlp/fc1"].active
  assert f"2 of rank {', '.join(map(str, ranks))}\n" in printed
  parameters = flops.num_parameters(experiment.shape, experiment.plan)
  for words in ("adaptive", f"{parameters:,}", data, "4 x cpu", f"{tmp_path}"):
    assert words in printed
  assert "tensorboard/" not in printed
  assert not list(tmp_path.iterdir())


def test_a_dry_run_lists_the_files_of_tensorboard_and_the_profiler(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tiny.ROOT)
  fields = ("--config.training.tensorboard=True", "--config.training.profile_steps=(2,2)")
  assert main.run(tiny.command(tmp_path / "run", "--dry_run", *fields)[1:]) == 0
  assert "samples/step_*.png, tensorboard/, profile/\n" in capsys.readouterr().out


def test_a_dry_run_needs_no_more_than_its_mode(tmp_path, capsys, monkeypatch):
  def run(*flags):
    argv = [f"--workdir={tmp_path / 'run'}", "--dry_run", *flags]
    return run_in_process(capsys, monkeypatch, argv)

  no_data = ("--config=configs/cifar10.py", "--config.data.data_dir=/nowhere")
  assert run(*no_data, "--mode=benchmark", "--config.sampling.batch_size=8")[0] == 0
  sections = "--config.analysis.sections=('flops',)"
  assert run(*no_data, "--mode=analyze", sections)[0] == 0
  status, stderr = run(*no_data, "--mode=analyze", "--config.analysis.sections=('weights',)")
  assert_one_line(status, 1, stderr, "is not the workdir of a run")
  assert not list(tmp_path.iterdir())


def test_a_dry_run_in_a_workdir_refuses_another_run(trained, capsys, monkeypatch):
  before = sorted(trained.rglob("*"))
  argv = tiny.command(trained, "--dry_run")[2:]
  assert run_in_process(capsys, monkeypatch, argv)[0] == 0
  status, stderr = run_in_process(capsys, monkeypatch, [*argv, "--config.seed=1"])
  assert_one_line(status, 1, stderr, "holds another run: seed (0 there, 1 asked for)")
  assert sorted(trained.rglob("*")) == before


def test_debug_shows_the_traceback(tmp_path, capsys, monkeypatch):
  argv = [*tiny.command(tmp_path / "run")[2:], "--config.rank.ratio=0", "--debug"]
  status, stderr = run_in_process(capsys, monkeypatch, argv)
  assert status == 1
  assert "Traceback" in stderr
  got, stderr = run_in_process(capsys, monkeypatch, [*argv[:-1], "--debug=true"])
  assert (got, "Traceback" in stderr) == (1, True)
  assert stderr.rstrip().splitlines()[-1].startswith("error: ")


def test_a_workdir_that_is_a_file(tmp_path, capsys, monkeypatch):
  (tmp_path / "run").write_text("")
  status, stderr = run_in_process(capsys, monkeypatch, tiny.command(tmp_path / "run")[2:])
  assert_one_line(status, 1, stderr, "File exists")


def test_a_read_only_place(capsys, monkeypatch):
  """/proc refuses new directories even to root."""
  status, stderr = run_in_process(capsys, monkeypatch, tiny.command("/proc/lrdit")[2:])
  assert_one_line(status, 1, stderr, "/proc/lrdit")


def test_a_defect_of_ours_is_not_disguised(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(train, "train", lambda *_: 1 / 0)
  status, stderr = run_in_process(capsys, monkeypatch, tiny.command(tmp_path / "run")[2:])
  assert status == 70
  assert "ZeroDivisionError" in stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A finished tiny run with two checkpoints."""
  workdir = tmp_path_factory.mktemp("trained")
  tiny.run_main(workdir)
  return workdir


def test_the_shell_does_not_choose_what_a_run_computes(trained, tmp_path):
  """Random streams and dtypes are a run's own: it goes on to the bit wherever it is resumed."""
  shell = {
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_RANDOM_SEED_OFFSET": "7",
    "JAX_HIGH_DYNAMIC_RANGE_GUMBEL": "1",
    "JAX_ENABLE_X64": "1",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_DISABLE_JIT": "1",
    "JAX_TRANSFER_GUARD": "disallow",
    "JAX_NO_EXECUTION": "1",
    "FLAX_FIX_RNG_SEPARATOR": "1",
    "FLAX_RETURN_FROZENDICT": "1",
  }
  flag = "--config.training.tensorboard=True"
  done = tiny.run_main(tmp_path / "run", flag, **shell, **tiny.SHOWING_IMPORTS)
  assert tiny.losses(tmp_path / "run") == tiny.losses(trained)
  for name in shell:
    assert sum(line.startswith(f"{name} is ignored") for line in done.stderr.splitlines()) == 1
  assert not tiny.HEAVY & tiny.imported_packages(done.stderr)


@pytest.fixture
def run(capsys, monkeypatch):
  """Runs a tiny command line in this process; returns the exit status and standard error."""

  def run(workdir, *flags):
    return run_in_process(capsys, monkeypatch, tiny.command(workdir, *flags)[2:])

  return run


@pytest.fixture
def copy(trained, tmp_path):
  """A copy of the trained run, to be damaged."""
  return shutil.copytree(trained, tmp_path / "run")


def assert_ends_with(status, stderr, words):
  assert status == 1
  assert "Traceback" not in stderr
  assert stderr.splitlines()[-1].startswith(f"error: {words}")


def test_modes_refuse_another_model_s_workdir(trained, run):
  for mode in ("train", "sample"):
    status, stderr = run(trained, "--config.model.depth=2", f"--mode={mode}")
    words = "holds another run: model.depth (1 there, 2 asked for)"
    assert_one_line(status, 1, stderr, words)


def test_corrupt_checkpoints(copy, run):
  for file in (copy / "checkpoints").rglob("*"):
    if file.is_file() and file.stat().st_size > 500:
      os.truncate(file, 100)
  done = tiny.run_main(copy, check=False)  # with what orbax's threads write to standard error
  assert_ends_with(done.returncode, done.stderr, "none of the checkpoints under")
  assert_ends_with(*run(copy, "--mode=sample"), "none of the checkpoints under")


def test_an_empty_and_a_missing_checkpoint(copy, run):
  shutil.rmtree(copy / "checkpoints")
  (copy / "checkpoints" / "8").mkdir(parents=True)
  assert_ends_with(*run(copy, "--mode=sample"), "none of the checkpoints under")
  shutil.rmtree(copy / "checkpoints")
  status, stderr = run(copy, "--mode=sample")
  assert_one_line(status, 1, stderr, "no checkpoint under")


def test_evaluating_without_samples(trained, run):
  evaluated = run(trained, "--mode=evaluate", "--config.sampling.name=none")
  assert_ends_with(*evaluated, "no samples under")


def test_exports_are_evaluated_only_whole_and_with_their_own_weights(copy, run):
  directory, sample = (
    copy / "samples" / "default",
    ("--mode=sample", "--config.sampling.png_files=True"),
  )
  assert run(copy, *sample)[0] == 0
  status, stderr = run(copy, "--mode=evaluate", "--config.sampling.use_ema=False")
  assert_ends_with(status, stderr, "the samples under")
  assert "weights" in stderr
  os.truncate(directory / "samples.npz", 300)
  status, stderr = run(copy, "--mode=evaluate")
  assert (status, "is damaged" in stderr) == (1, True)
  # A smaller export leaves nothing of the larger one.
  one = "--config.sampling.num_samples=1"
  assert run(copy, *sample, one)[0] == 0
  assert len(list((directory / "png").iterdir())) == 1
  status, stderr = run(copy, "--mode=evaluate", one)
  assert (status, "need more than 3 generated images" in stderr) == (1, True)


def test_another_model_without_a_config_is_not_called_damaged(copy, run):
  (copy / "config.json").unlink()
  status, stderr = run(copy, "--config.model.hidden_size=48")
  assert status == 1
  assert "is of another model" in stderr.splitlines()[-1]
  assert not (copy / "config.json").exists()
  assert run(copy)[0] == 0


def test_a_full_disk_under_the_metrics(tmp_path):
  """/dev/full answers every write with "no space left on device"."""
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
  done = tiny.run_main(tmp_path / "run", check=False)
  assert done.returncode == 1
  assert done.stderr.rstrip().splitlines()[-1].startswith("error: No space left on device")
  assert "Traceback" not in done.stderr


def test_a_full_disk_under_a_checkpoint_keeps_the_one_before(copy, run):
  """A limit on the size of files stops the save half-way, as a full disk does."""
  limited = ["prlimit", "--fsize=20000", *tiny.command(copy, "--config.training.num_steps=16")]
  done = subprocess.run(
    limited,
    cwd=tiny.ROOT,
    env=tiny.environment(JAX_ENABLE_COMPILATION_CACHE="false"),
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 1, done.stderr
  assert "Traceback" not in done.stderr
  assert done.stderr.rstrip().splitlines()[-1].startswith("error: cannot save a checkpoint under")
  kept = [path.name for path in (copy / "checkpoints").iterdir() if path.name.isdigit()]
  assert sorted(kept) == ["4", "8"]
  assert run(copy, "--mode=sample")[0] == 0


def test_metadata_says_what_was_sampled(trained, run):
  fields = ("--config.sampling.use_ema=False", "--config.sampling.name=raw")
  assert run(trained, "--mode=sample", *fields)[0] == 0
  metadata = json.loads((pathlib.Path(trained) / "samples" / "raw" / "metadata.json").read_text())
  assert metadata["weights"] == "raw"
  assert metadata["checkpoint_step"] == 8
  assert sum(metadata["solver_steps_per_bucket"]) == metadata["num_steps"] == 10
