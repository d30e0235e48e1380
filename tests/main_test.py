"""The command line's errors: one line, no traceback, exit status 1 or 2."""

import json
import os
import pathlib
import shutil
import subprocess

import pytest

import main
from lrdit.modes import train
from tests import tiny

DIGITS = "--config=configs/digits.py"

NO_IMAGENET = ("--config.data.data_dir=/nowhere", "--config.sampling.clip_x_0=True")

# id: (flags after those of a tiny run, exit status, words of the message).
BAD_INPUTS = {
  "unknown field": (["--config.model.width=3"], 2, "--config.model.width=3: no such config field"),
  "unknown group": (["--config.modle.depth=3"], 2, "no such config field"),
  "field of the wrong type": (["--config.training.batch_size=many"], 2, "batch_size=many"),
  "fraction for a whole number": (["--config.training.num_steps=1.5"], 2, "num_steps=1.5"),
  "group instead of field": (["--config.model=3"], 2, "--config.model"),
  "unknown argument": ([f"{DIGITS}:size=S/2"], 2, "config argument 'size=S/2' is unknown"),
  "argument without a value": ([f"{DIGITS}:adaptive"], 2, "config argument 'adaptive' is unknown"),
  "unknown method": ([f"{DIGITS}:method=sparse"], 1, "config.method='sparse' is unknown"),
  "unknown variant": ([f"{DIGITS}:variant=M/2"], 1, "variant='M/2' is unknown"),
  "missing config file": (["--config=configs/imagenet.py"], 2, "configs/imagenet.py"),
  "unknown flag": (["--work_dir=x"], 2, "Unknown command line flag 'work_dir'"),
  "argument that is no flag": (["train"], 2, "'train' is not a flag"),
  "unknown mode": (["--mode=fly"], 2, "--mode=fly"),
  "no workdir": (["--workdir="], 2, "--workdir is missing"),
  "ratio of zero": (["--config.rank.ratio=0"], 1, "rank.ratio=0.0 must lie in (0, 1]"),
  "ratio above one": (["--config.rank.ratio=1.5"], 1, "rank.ratio=1.5 must lie in (0, 1]"),
  "ratio not a number": (["--config.rank.ratio=nan"], 1, "rank.ratio=nan must lie in (0, 1]"),
  "floor above one": (["--config.rank.min_ratio=2"], 1, "rank.min_ratio=2.0 must lie in (0, 1]"),
  "unknown schedule": (["--config.rank.schedule=up"], 1, "rank.schedule='up' is unknown"),
  "unknown match": (["--config.rank.match=none"], 1, "rank.match='none' is unknown"),
  "unknown compute": (["--config.rank.compute=fast"], 1, "rank.compute='fast' is unknown"),
  "no buckets": (["--config.rank.num_buckets=0"], 1, "rank.num_buckets=0 must be in [1, 1000]"),
  "multiple of zero": (["--config.rank.multiple_of=0"], 1, "rank.multiple_of=0 must be at least 1"),
  "multiple above the rank": (["--config.rank.multiple_of=64"], 1, "multiple_of=64 is above"),
  "unknown dense layer": (['--config.rank.dense_layers=("mlp",)'], 1, "'mlp' fits no layer"),
  "more blocks than there are": (["--config.rank.first_n_blocks=9"], 1, "rank.first_n_blocks=9"),
  "unknown dataset": (["--config.data.name=mnist"], 1, "data.name='mnist' is unknown"),
  "config with a syntax error": (["--config=README.md"], 2, "--config cannot be read"),
  "field below a field": (["--config.training.batch_size.x=3"], 2, "batch_size.x=3: no such"),
  "layers that are no names": (["--config.rank.dense_layers=(1,2)"], 1, "must be names of layers"),
  "no layer left": (['--config.rank.dense_layers=("*",)'], 1, "leaves no layer to factorise"),
  "mean that cannot be met": (["--config.rank.ratio=1"], 1, "rank.match=activated cannot be met"),
  "rate beyond float32": (["--config.optimizer.learning_rate=1e39"], 1, "below 1e30"),
  "noise of another solver": (
    ["--config.sampling.solver=dpm++", "--config.sampling.eta=0.5"],
    1,
    "eta=0.5 is noise of ddim",
  ),
  "image of another size": (["--config.data.image_size=16"], 1, "data.image_size=16 does not fit"),
  "directory nobody reads": (["--config.data.data_dir=x"], 1, "data.data_dir='x' is not used"),
  "odd image size": (["--config.data.image_size=7"], 1, "image_size=7 is not a multiple of"),
  "more classes than there are": (
    ["--config.data.num_classes=11"],
    1,
    "data.num_classes=11 does not",
  ),
  "other channels": (["--config.data.num_channels=3"], 1, "data.num_channels=3 does not fit"),
  "patch that does not divide": (["--config.model.patch_size=3"], 1, "not a multiple of"),
  "heads that do not divide": (
    ["--config.model.num_heads=3"],
    1,
    "hidden_size=32 is not a multiple",
  ),
  "width not in four parts": (["--config.model.hidden_size=34"], 1, "must be a multiple of 4"),
  "negative depth": (["--config.model.depth=-1"], 1, "model.depth=-1 must be in [0, 10000]"),
  "unknown dtype": (["--config.model.dtype=float16"], 1, "model.dtype='float16' is unknown"),
  "drop rate above one": (["--config.model.class_dropout_rate=1.1"], 1, "class_dropout_rate=1.1"),
  "unknown noise": (
    ["--config.diffusion.noise_schedule=cos"],
    1,
    "noise_schedule='cos' is unknown",
  ),
  "unknown prediction": (["--config.diffusion.prediction=x0"], 1, "prediction='x0' is unknown"),
  "unknown weighting": (["--config.diffusion.loss_weighting=p2"], 1, "loss_weighting='p2'"),
  "unknown optimiser": (["--config.optimizer.name=sgd"], 1, "optimizer.name='sgd' is unknown"),
  "no learning rate": (["--config.optimizer.learning_rate=0"], 1, "must be above 0 and below"),
  "endless average": (["--config.optimizer.ema_decay=1"], 1, "ema_decay=1.0 must lie in [0, 1)"),
  "negative clipping": (["--config.optimizer.grad_clip_norm=-1"], 1, "grad_clip_norm=-1.0 must be"),
  "unknown start": (["--config.curriculum.start=top"], 1, "curriculum.start='top' is unknown"),
  "no patience": (["--config.curriculum.patience=0"], 1, "patience=0 must be at least 1"),
  "no checks": (["--config.curriculum.check_every_steps=0"], 1, "check_every_steps=0 must be at"),
  "groups from elsewhere": (["--config.curriculum.boundaries=(1,1000)"], 1, "must start at 0"),
  "groups that fall": (["--config.curriculum.boundaries=(0,9,9,1000)"], 1, "must rise"),
  "one boundary": (["--config.curriculum.boundaries=(0,)"], 1, "must be two or more whole numbers"),
  "broken boundary": (["--config.curriculum.boundaries=(0,0.5,1)"], 1, "or more whole numbers"),
  "groups that end early": (
    ["--config.curriculum.boundaries=(0,50,100)", "--config.curriculum.enabled=True"],
    1,
    "must end at config.diffusion.num_train_timesteps=1000: use (0, 500, 1000)",
  ),
  "zero steps": (["--config.training.num_steps=0"], 1, "training.num_steps=0 must be at least 1"),
  "zero batch": (
    ["--config.training.batch_size=0"],
    1,
    "training.batch_size=0 must be in [1, 1048576]",
  ),
  "batch over devices": (
    ["--config.training.batch_size=6"],
    1,
    "6 is not divisible by the 4 devices",
  ),
  "no checkpoint kept": (["--config.checkpoint.keep=0"], 1, "checkpoint.keep=0 must be at least 1"),
  "unknown solver": (["--config.sampling.solver=euler"], 1, "sampling.solver='euler' is unknown"),
  "zero solver steps": (["--config.sampling.num_steps=0"], 1, "sampling.num_steps=0 must lie in"),
  "too many solver steps": (["--config.sampling.num_steps=2000"], 1, "must lie in [1, 1000]"),
  "no samples": (["--config.sampling.num_samples=0"], 1, "num_samples=0 must be at least 1"),
  "eta above one": (["--config.sampling.eta=2"], 1, "sampling.eta=2.0 must be in [0.0, 1.0]"),
  "sampling over devices": (
    ["--mode=sample", "--config.sampling.batch_size=6"],
    1,
    "sampling.batch_size=6 is not divisible by the 4 devices",
  ),
  "guidance without classes": (
    ["--config.data.num_classes=0", "--config.sampling.guidance_scale=2"],
    1,
    "guidance_scale=2.0 needs classes",
  ),
  "guidance without a null class": (
    ["--config.model.class_dropout_rate=0", "--config.sampling.guidance_scale=2"],
    1,
    "needs a null class",
  ),
  "negative guidance": (["--config.sampling.guidance_scale=-1"], 1, "guidance_scale=-1.0 must be"),
  "unknown label": (["--config.sampling.labels=10"], 1, "sampling.labels='10' is unknown"),
  "unknown label rule": (["--config.sampling.labels=all"], 1, "use balanced, random or 0 to 9"),
  "name with a slash": (["--config.sampling.name=../x"], 1, "must be the name of a directory"),
  "sampling before training": (["--mode=sample"], 1, "is not the workdir of a run"),
  "latents of no VAE": (["--mode=encode", "--output=x"], 1, "vae.downsample_factor=0 says that"),
  "nowhere to encode to": (["--mode=encode"], 2, "--output is missing"),
  "encoding without a VAE": (
    ["--config=configs/celeba.py", "--mode=encode", "--output=x"],
    1,
    "config.vae.path='' must name the VAE",
  ),
  "training on no latents": (
    ["--config=configs/celeba.py"],
    1,
    "config.vae.latents_dir=''",
  ),
  "latents cut to pixels": (
    ["--config=configs/celeba.py", "--config.sampling.clip_x_0=True"],
    1,
    "sampling.clip_x_0=True would cut latents",
  ),
  "image that the VAE does not divide": (
    ["--config=configs/celeba.py", "--config.data.image_size=100"],
    1,
    "data.image_size=100 is not a multiple of config.vae.downsample_factor=8",
  ),
  "latents that the patch does not divide": (
    ["--config=configs/celeba.py", "--config.data.image_size=24"],
    1,
    "(3 latent pixels) is not a multiple of",
  ),
  "no CIFAR-10": (
    ["--config=configs/cifar10.py", "--config.data.data_dir=/nowhere"],
    1,
    "tfds.builder('cifar10', data_dir='/nowhere', file_format='array_record').download_and",
  ),
  "no ImageNet": (
    ["--config=configs/imagenet128.py", "--config.vae.downsample_factor=0", *NO_IMAGENET],
    1,
    "put ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar (both from",
  ),
  "classes out of range": (["--config=configs/imagenet128.py:classes=0"], 2, "classes=0 must be"),
  "own images nowhere": (
    ["--config=configs/cifar10.py", "--config.data.name=folder"],
    1,
    "data_dir",
  ),
  "negative cache": (
    ["--config.data.cache_gib=-1"],
    1,
    "data.cache_gib=-1.0 must be in [0.0, 1000000.0]",
  ),
  "no rounds": (
    ["--mode=benchmark", "--config.benchmark.rounds=0"],
    1,
    "benchmark.rounds=0 must be at least 1",
  ),
  "no steps": (
    ["--mode=benchmark", "--config.benchmark.steps=0"],
    1,
    "benchmark.steps=0 must be at least 1",
  ),
  "fewer than no runs": (
    ["--mode=benchmark", "--config.benchmark.sampling_runs=-1"],
    1,
    "benchmark.sampling_runs=-1 must be at least 0",
  ),
  "matrices of negative size": (
    ["--mode=benchmark", "--config.benchmark.matmul_size=-1"],
    1,
    "benchmark.matmul_size=-1 must be at least 0",
  ),
  "nowhere to write a benchmark": (["--mode=benchmark", "--workdir="], 2, "--workdir is missing"),
  "benchmark over devices": (
    ["--mode=benchmark", "--config.training.batch_size=6"],
    1,
    "training.batch_size=6 is not divisible by the 4 devices",
  ),
  "benchmark of samples over devices": (
    ["--mode=benchmark", "--config.sampling.batch_size=6"],
    1,
    "sampling.batch_size=6 is not divisible by the 4 devices",
  ),
  "benchmark of an arm that cannot be": (
    [f"{DIGITS}:method=full", "--mode=benchmark", "--config.rank.multiple_of=64"],
    1,
    "multiple_of=64 is above",
  ),
  "evaluating before training": (["--mode=evaluate"], 1, "is not the workdir of a run"),
}


def run_in_process(capsys, monkeypatch, argv):
  monkeypatch.chdir(tiny.ROOT)
  capsys.readouterr()
  status = main.run(["main.py", *argv])
  return status, capsys.readouterr().err


def assert_one_line(status, expected_status, stderr, words):
  assert status == expected_status, stderr
  lines = [line for line in stderr.splitlines() if line.strip()]
  assert len(lines) == 1, stderr
  assert lines[0].startswith("error: ")
  assert words in lines[0]
  assert "Traceback" not in stderr


@pytest.mark.parametrize(("flags", "status", "words"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_ends_in_one_line(flags, status, words, tmp_path, capsys, monkeypatch):
  config = [flag for flag in flags if flag.startswith("--config=")] or [DIGITS]
  rest = [flag for flag in flags if flag not in config]
  argv = [*config, *tiny.command(tmp_path / "run")[3:], *rest]
  got, stderr = run_in_process(capsys, monkeypatch, argv)
  assert_one_line(got, status, stderr, words)
  # Nothing may be left of a run that could not begin.
  assert not (tmp_path / "run").exists()


def test_there_are_at_least_25_bad_inputs():
  assert len(BAD_INPUTS) >= 25


def test_no_flags_and_help(capsys, monkeypatch):
  status, stderr = run_in_process(capsys, monkeypatch, [])
  assert_one_line(status, 2, stderr, "--config is missing")
  assert main.run(["main.py", "--help"]) == 0
  assert "--mode" in capsys.readouterr().out


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
  done = tiny.run_main(tmp_path / "run", **shell)
  assert tiny.losses(tmp_path / "run") == tiny.losses(trained)
  for name in shell:
    assert sum(line.startswith(f"{name} is ignored") for line in done.stderr.splitlines()) == 1


def assert_fails(done, words):
  assert_one_line(done.returncode, 1, done.stderr, words)


def test_modes_refuse_another_model_s_workdir(trained):
  for mode in ("train", "sample"):
    done = tiny.run_main(trained, "--config.model.depth=1", f"--mode={mode}", check=False)
    assert_fails(done, "holds another run: model.depth (2 there, 1 asked for)")


@pytest.mark.parametrize("mode", ["train", "sample"])
def test_corrupt_and_empty_checkpoints(trained, tmp_path, mode):
  workdir = tmp_path / "run"
  shutil.copytree(trained, workdir)
  for file in (workdir / "checkpoints").rglob("*"):
    if file.is_file() and file.stat().st_size > 500:
      os.truncate(file, 100)
  done = tiny.run_main(workdir, f"--mode={mode}", check=False)
  assert done.returncode == 1
  assert "Traceback" not in done.stderr
  assert done.stderr.splitlines()[-1].startswith("error: none of the checkpoints under")


def test_an_empty_and_a_missing_checkpoint(trained, tmp_path):
  shutil.copytree(trained, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints")
  (tmp_path / "run" / "checkpoints" / "8").mkdir(parents=True)
  done = tiny.run_main(tmp_path / "run", "--mode=sample", check=False)
  assert done.returncode == 1
  assert "Traceback" not in done.stderr
  assert done.stderr.splitlines()[-1].startswith("error: none of the checkpoints under")
  shutil.rmtree(tmp_path / "run" / "checkpoints")
  assert_fails(tiny.run_main(tmp_path / "run", "--mode=sample", check=False), "no checkpoint under")


def test_evaluating_without_samples(trained):
  done = tiny.run_main(trained, "--mode=evaluate", "--config.sampling.name=none", check=False)
  assert done.returncode == 1
  assert done.stderr.splitlines()[-1].startswith("error: no samples under")


def test_exports_are_evaluated_only_whole_and_with_their_own_weights(trained, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(trained, workdir)
  tiny.run_main(workdir, "--mode=sample", "--config.sampling.png_files=True")
  done = tiny.run_main(workdir, "--mode=evaluate", "--config.sampling.use_ema=False", check=False)
  assert done.returncode == 1
  assert done.stderr.splitlines()[-1].startswith("error: the samples under")
  assert "weights" in done.stderr
  os.truncate(workdir / "samples" / "default" / "samples.npz", 300)
  done = tiny.run_main(workdir, "--mode=evaluate", check=False)
  assert (done.returncode, "is damaged" in done.stderr) == (1, True)
  # A smaller export leaves nothing of the larger one.
  one = "--config.sampling.num_samples=1"
  tiny.run_main(workdir, "--mode=sample", "--config.sampling.png_files=True", one)
  assert len(list((workdir / "samples" / "default" / "png").iterdir())) == 1
  done = tiny.run_main(workdir, "--mode=evaluate", one, check=False)
  assert (done.returncode, "need more than 3 generated images" in done.stderr) == (1, True)


def test_another_model_without_a_config_is_not_called_damaged(trained, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(trained, workdir)
  (workdir / "config.json").unlink()
  done = tiny.run_main(workdir, "--config.model.hidden_size=48", check=False)
  assert done.returncode == 1
  assert "is of another model" in done.stderr.splitlines()[-1]
  assert not (workdir / "config.json").exists()
  tiny.run_main(workdir)


def test_a_full_disk_under_the_metrics(tmp_path):
  """/dev/full answers every write with "no space left on device"."""
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
  done = tiny.run_main(tmp_path / "run", check=False)
  assert done.returncode == 1
  assert done.stderr.rstrip().splitlines()[-1].startswith("error: No space left on device")
  assert "Traceback" not in done.stderr


def test_a_full_disk_under_a_checkpoint_keeps_the_one_before(trained, tmp_path):
  """A limit on the size of files stops the save half-way, as a full disk does."""
  workdir = tmp_path / "run"
  shutil.copytree(trained, workdir)
  limited = ["prlimit", "--fsize=20000", *tiny.command(workdir, "--config.training.num_steps=16")]
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
  assert sorted(p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()) == [
    "4",
    "8",
  ]
  tiny.run_main(workdir, "--mode=sample")


def test_metadata_says_what_was_sampled(trained):
  tiny.run_main(
    trained, "--mode=sample", "--config.sampling.use_ema=False", "--config.sampling.name=raw"
  )
  metadata = json.loads((pathlib.Path(trained) / "samples" / "raw" / "metadata.json").read_text())
  assert metadata["weights"] == "raw"
  assert metadata["checkpoint_step"] == 8
  assert sum(metadata["solver_steps_per_bucket"]) == metadata["num_steps"] == 10
