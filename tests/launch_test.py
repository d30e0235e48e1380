"""The launch scripts of the datasets, run whole on tiny models."""

import json
import os
import signal

import numpy as np
import pytest

from lrdit.config.run_config import store_config
from tests import scripts, tiny

ARMS = ("full", "static", "adaptive")
NUM_STEPS = 100  # long enough to be interrupted in the middle


@pytest.fixture
def checkout(tmp_path):
  return scripts.copy_checkout(tmp_path / "checkout", "configs", "launch", "lrdit", "main.py")


def write_images(path, with_labels):
  rng = np.random.default_rng(0)
  arrays = {"image": rng.integers(0, 256, (64, 32, 32, 3), np.uint8)}
  if with_labels:
    arrays["label"] = np.arange(64) % 10
  np.savez(path, **arrays)


def overrides(images, **fields):
  values = tiny.OVERRIDES | {"data.name": "npz", "data.data_dir": images}
  values |= {key.replace("__", "."): value for key, value in fields.items()}
  return [f"--config.{field}={value}" for field, value in values.items()]


def start(checkout, script, *flags, **environment):
  """Starts a script from the checkout's parent."""
  command = ["bash", f"checkout/launch/{script}", *flags]
  return scripts.start(command, checkout.parent, tiny.environment(**environment))


def run(checkout, script, *flags, **environment):
  return scripts.finish(start(checkout, script, *flags, **environment))


def modes(stderr):
  """What was done, as "dataset, arm: mode"."""
  lines = [line.removeprefix("== ") for line in stderr.splitlines() if line.startswith("== ")]
  return [line.partition(", under")[0] for line in lines]


def assert_arm_is_whole(workdir, step, image_shape):
  assert (workdir / "checkpoints" / str(step) / "ema_params").is_dir()
  evaluation = json.loads((workdir / "evaluation.json").read_text())
  assert evaluation["checkpoint_step"] == step
  directory = workdir / "samples" / "default"
  metadata = json.loads((directory / "metadata.json").read_text())
  assert metadata["method"] == workdir.name.rpartition("_")[2]
  assert all(figures["metadata"] == metadata for figures in evaluation["samples"].values())
  with np.load(directory / "samples.npz") as export:
    assert export["arr_0"].shape == (10, *image_shape)


@pytest.mark.slow
def test_cifar10_goes_on_where_it_was_stopped_and_repeats_nothing(checkout, tmp_path):
  write_images(tmp_path / "images.npz", with_labels=True)
  # The file's name is relative to where the script is called.
  flags = overrides(
    "images.npz",
    data__image_size=8,  # a Frechet distance over 32x32x3 pixels takes long
    training__num_steps=NUM_STEPS,
    checkpoint__every_steps=NUM_STEPS,
  )
  runs = [tmp_path / "out" / f"cifar10_{arm}" for arm in ARMS]

  process = start(checkout, "cifar10.sh", *flags, RUNS="out")
  scripts.wait_until(lambda: scripts.has_lines(runs[1] / "metrics.jsonl"), process)
  os.killpg(process.pid, signal.SIGTERM)
  status, _, stderr = scripts.finish(process)
  assert status == 143, stderr
  assert modes(stderr) == [
    *(f"cifar10, full: {mode}" for mode in ("train", "sample", "evaluate")),
    "cifar10, static: train",
  ]
  assert not (runs[1] / "checkpoints" / str(NUM_STEPS)).exists()
  first_arm = scripts.times(runs[0])

  status, stdout, stderr = run(checkout, "cifar10.sh", *flags, RUNS="out")
  assert status == 0 and not stderr, stderr
  assert modes(stderr) == ["cifar10, full: finished"] + [
    f"cifar10, {arm}: {mode}" for arm in ARMS[1:] for mode in ("train", "sample", "evaluate")
  ]
  assert "resuming from the checkpoint of step" in stderr
  assert scripts.times(runs[0]) == first_arm
  for workdir in runs:
    assert_arm_is_whole(workdir, NUM_STEPS, (8, 8, 3))
    loss = json.loads((workdir / "evaluation.json").read_text())["held_out"]["ema"]["loss"]
    assert f"{loss:.5f}  {workdir}/samples/default\n" in stdout

  all_arms = scripts.times(tmp_path / "out")
  status, again, stderr = run(checkout, "cifar10.sh", *flags, RUNS="out")
  assert (status, again) == (0, stdout), stderr
  assert modes(stderr) == [f"cifar10, {arm}: finished" for arm in ARMS]
  assert scripts.times(tmp_path / "out") == all_arms

  # An export without its metadata was stopped half-way.
  (runs[2] / "samples" / "default" / "metadata.json").unlink()
  status, _, stderr = run(checkout, "cifar10.sh", *flags, RUNS="out")
  assert status == 0 and not stderr, stderr
  assert modes(stderr)[2:] == ["cifar10, adaptive: sample", "cifar10, adaptive: evaluate"]
  assert_arm_is_whole(runs[2], NUM_STEPS, (8, 8, 3))

  # What differs from the finished run is main.py's to judge.
  status, _, stderr = run(checkout, "cifar10.sh", *flags, "--config.seed=1", RUNS="out")
  assert status == 1
  assert "holds another run: seed (0 there, 1 asked for)" in stderr.splitlines()[-1]


@pytest.mark.slow
def test_celeba_encodes_once_and_runs_the_arms_on_the_latents(checkout, tmp_path):
  write_images(tmp_path / "images.npz", with_labels=False)
  vae = f"--config.vae.path={tiny.GOLDEN / 'sd_vae_tiny'}"
  flags = [
    vae,
    *overrides("images.npz", training__num_steps=2, data__image_size=32, evaluation__extractors=()),
  ]
  status, stdout, stderr = run(checkout, "celeba.sh", *flags, LATENTS="latents")
  assert status == 0 and not stderr, stderr
  assert modes(stderr)[0] == f"celeba: encode into {tmp_path / 'latents'}"
  assert np.load(tmp_path / "latents" / "eval.npy").shape[1:] == (2, 2, 4, 4, 4)
  for arm in ARMS:
    assert_arm_is_whole(tmp_path / "runs" / f"celeba_{arm}", 2, (32, 32, 3))

  written = scripts.times(tmp_path / "latents") | scripts.times(tmp_path / "runs")
  status, again, stderr = run(checkout, "celeba.sh", *flags, LATENTS="latents")
  assert (status, again) == (0, stdout), stderr
  assert modes(stderr)[1:] == [f"celeba, {arm}: finished" for arm in ARMS]
  assert scripts.times(tmp_path / "latents") | scripts.times(tmp_path / "runs") == written


@pytest.mark.slow
def test_digits_are_reported_and_nothing_is_repeated(checkout, tmp_path):
  overrides = tiny.OVERRIDES | {"training.num_steps": 2}
  flags = [f"--config.{field}={value}" for field, value in overrides.items()]
  status, _, stderr = run(checkout, "digits.sh", *flags, SEEDS="3")
  assert status == 0 and not stderr, stderr
  assert modes(stderr) == [
    f"digits, {arm}, seed 3: {mode}" for arm in ARMS for mode in ("train", "sample", "evaluate")
  ]
  runs = tmp_path / "runs"
  for arm in ARMS:
    workdir = runs / f"digits_{arm}_3"
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    assert evaluation["samples"]["default"]["metadata"]["method"] == arm
    assert evaluation["checkpoint_step"] == 2
    assert json.loads((workdir / "config.json").read_text())["seed"] == 3
    assert not (workdir / "features").exists()
  assert [path.name for path in (runs / "digits_features").iterdir()] == [
    "reference_pixel_train.npz"
  ]
  report = json.loads((runs / "digits_report" / "report.json").read_text())
  assert [arm["method"] for arm in report["arms"]] == list(ARMS)
  assert (runs / "digits_report" / "report.html").exists()

  written = {path: when for path, when in scripts.times(runs).items() if "report" not in str(path)}
  status, _, stderr = run(checkout, "digits.sh", *flags, SEEDS="3")
  assert status == 0 and not stderr, stderr
  assert modes(stderr) == [f"digits, {arm}, seed 3: finished" for arm in ARMS]
  assert scripts.times(runs).items() >= written.items()


@pytest.mark.slow
def test_schedules_are_reported_and_nothing_is_repeated(checkout, tmp_path):
  overrides = tiny.OVERRIDES | {"training.num_steps": 20}
  flags = [f"--config.{field}={value}" for field, value in overrides.items()]
  status, _, stderr = run(checkout, "schedules.sh", *flags, SEEDS="3 4")
  assert status == 0 and not stderr, stderr
  runs, names = tmp_path / "runs", ("measured", "adaptive", "increasing", "constant")
  report = json.loads((runs / "digits_schedules" / "report.json").read_text())
  assert [arm["name"] for arm in report["arms"]] == [
    "full",
    "static",
    *(f"adaptive (schedule {s})" for s in ("measured", "logistic_decreasing", *names[2:])),
  ]
  assert [[run["seed"] for run in arm["runs"]] for arm in report["arms"]] == 6 * [[3, 4]]
  ranks = json.loads((runs / "digits_measured_4" / "config.json").read_text())["rank"]
  analysis = runs / "digits_full_3" / "analysis" / "truncation.json"
  assert ranks["analysis"] == str(analysis)
  assert ranks["measured_boundaries"] == json.loads(analysis.read_text())["boundaries"]

  made_again = ("analysis", "digits_schedules")  # plots, and the page
  written = {
    path: when
    for path, when in scripts.times(runs).items()
    if not any(name in str(path.relative_to(runs)) for name in made_again)
  }
  status, _, stderr = run(checkout, "schedules.sh", *flags, SEEDS="3 4")
  assert status == 0 and not stderr, stderr
  assert modes(stderr) == [
    *(f"digits, {name}, seed {seed}: finished" for seed in (3, 4) for name in ("full", "static")),
    "digits, full, seed 3: analyze",
    *(f"digits, {name}, seed {seed}: finished" for seed in (3, 4) for name in names),
  ]
  assert scripts.times(runs).items() >= written.items()


def test_how_a_process_computes_is_no_other_arm_but_samples_are_of_a_dtype(checkout, tmp_path):
  """By the files alone, as main.py leaves them; what is still to do is asked of arms.sh."""
  workdir, export = tmp_path / "run", tmp_path / "run" / "samples" / "default"
  export.mkdir(parents=True)
  (workdir / "checkpoints" / "8").mkdir(parents=True)
  config = tiny.tiny_config()
  store_config(workdir, config)
  (export / "samples.npz").touch()
  drawn = {"checkpoint_step": 8, "weights": "ema", "labels": "balanced", "dtype": "float32"}
  drawn |= {field: value for field, value in config.sampling.items() if field != "labels"}
  (export / "metadata.json").write_text(json.dumps(drawn))
  evaluation = {"checkpoint_step": 8, "held_out": {"dtype": "float32"}}
  evaluation["samples"] = {"default": {"extractors": {"pixel": {}}, "metadata": drawn}}
  settings = {"settings": config.evaluation.to_dict()}
  (workdir / "evaluation.json").write_text(json.dumps(evaluation | settings))
  flags = [f"--config.{field}={value}" for field, value in tiny.OVERRIDES.items()]

  def remaining(*more):
    words = ["source checkout/launch/arms.sh", 'remaining_modes "$@"']
    command = ["bash", "-c", "; ".join(words), "-", workdir]
    command += [f"--config={tiny.ROOT}/configs/digits.py", *flags, *more]
    status, stdout, stderr = scripts.finish(
      scripts.start(command, checkout.parent, tiny.environment())
    )
    assert status == 0 and not stderr, stderr
    return stdout.split()

  alike = ["model.remat=True", "model.scan_blocks=True", "rank.compute=masked"]
  assert remaining(*(f"--config.{field}" for field in alike)) == []
  assert remaining("--config.model.dtype=bfloat16") == ["sample", "evaluate"]
  assert remaining("--config.optimizer.learning_rate=1") == ["train", "sample", "evaluate"]


def test_imagenet128_hands_the_classes_on(checkout):
  """Latents that look finished are not encoded again; the arms get the classes."""
  latents = checkout / "latents"
  latents.mkdir()
  (latents / "manifest.json").write_text("{}")
  environment = {"LATENTS": str(latents), "CLASSES": "7"}
  status, _, stderr = run(checkout, "imagenet128.sh", "--config.vae.path=vae", **environment)
  assert status == 1
  assert stderr.splitlines()[-1].startswith("error: ")
  assert "manifest.json is damaged" in stderr


@pytest.mark.parametrize("classes", ["1001", "0", "-1", "400x", "1e3"])
def test_imagenet128_refuses_classes_before_it_encodes(checkout, classes):
  status, _, stderr = run(checkout, "imagenet128.sh", "--config.vae.path=vae", CLASSES=classes)
  assert status == 2
  assert f"error: CLASSES={classes}: a number from 1 to 1000" in stderr


@pytest.mark.parametrize(
  ("script", "flags", "words"),
  [
    ("celeba.sh", [], "--config.vae.path=VAE is missing"),
    ("celeba.sh", ["--config.vae.path="], "--config.vae.path=VAE is missing"),
    ("imagenet128.sh", ["--config.seed=1"], "--config.vae.path=VAE is missing"),
    ("celeba.sh", ["--config.vae.latents_dir=x"], "name the directory by LATENTS=DIR"),
    ("cifar10.sh", ["--workdir=x"], "'--workdir=x' is not of the form --config.GROUP.FIELD=VALUE"),
    ("digits.sh", ["--config.seed=1"], "--config.seed=1: name the seeds by SEEDS"),
    ("schedules.sh", ["--config.seed=1"], "--config.seed=1: name the seeds by SEEDS"),
    ("schedules.sh", ["--config.rank.schedule=constant"], "every schedule is run, one after"),
    ("cifar10.sh", ["--config.method=full"], "--config.method=full: every method is run"),
  ],
)
def test_a_wrong_argument_ends_with_the_usage(checkout, script, flags, words):
  scripts.assert_wrong_argument(run(checkout, script, *flags), script, words)


@pytest.mark.parametrize(
  "script", ["cifar10.sh", "celeba.sh", "imagenet128.sh", "digits.sh", "schedules.sh"]
)
def test_help(checkout, script):
  scripts.assert_help(run(checkout, script, "--config.seed=1", "--help"), script)
