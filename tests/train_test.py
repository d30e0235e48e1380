"""Whole runs through the real command line: stop anywhere, start again."""

import dataclasses
import json
import os
import pathlib
import pty
import re
import select
import signal
import subprocess
import termios
import time

import jax
import numpy as np
import pytest
from PIL import Image

from lrdit import builders, evaluate, optimizer, train
from lrdit.checkpoints import Checkpoints
from lrdit.errors import UserError
from lrdit.train_state import create_train_state
from tests import tiny

# Long enough to be interrupted, and with everything that happens on the way.
LONG = ("--config.training.num_steps=60", "--config.checkpoint.every_steps=10")


def final_state(workdir, arg="", **overrides):
  """The newest checkpoint of a tiny run."""
  config = tiny.tiny_config(arg, **overrides)
  made, _ = builders.make_optimizer(config)
  num_groups = builders.make_curriculum(config).num_groups
  template = jax.eval_shape(
    lambda: create_train_state(builders.init_params(config), made, num_groups)
  )
  return Checkpoints(workdir).restore_state(template)


def assert_same_run(workdir, reference, **overrides):
  """Equal metrics and, to the bit, equal final states."""
  got, expected = (
    [
      {name: value for name, value in line.items() if not name.endswith("_per_second")}
      for line in tiny.read_metrics(path)
    ]
    for path in (workdir, reference)
  )
  assert got == expected
  a, b = final_state(workdir, **overrides), final_state(reference, **overrides)
  assert a.step == expected[-1]["step"]
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """A run of 60 steps that nothing interrupts."""
  workdir = tmp_path_factory.mktemp("undisturbed")
  tiny.run_main(workdir, *LONG, "--config.training.eval_every_steps=20")
  return workdir


def start(workdir, *flags, num_devices=None):
  """To be entered by `with`, which closes its pipe."""
  return subprocess.Popen(
    tiny.command(workdir, *LONG, "--config.training.eval_every_steps=20", *flags),
    cwd=tiny.ROOT,
    env=tiny.environment(num_devices),
    stderr=subprocess.PIPE,
    text=True,
  )


def wait_for_line(process, pattern):
  for line in process.stderr:
    if re.search(pattern, line):
      return line
  raise AssertionError(f"{pattern!r} was never printed")


def test_losses_fall_and_lines_have_all_their_fields(undisturbed):
  lines = tiny.read_metrics(undisturbed)
  assert [line["step"] for line in lines] == list(range(1, 61))
  assert np.mean([line["train/loss"] for line in lines[-10:]]) < 0.9 * lines[0]["train/loss"]
  assert {"train/images_per_second", "train/steps_per_second", "eval/loss"} <= lines[-1].keys()
  log_file = (undisturbed / "train.log").read_text()
  assert "step 60/60" in log_file
  assert "\r" not in log_file
  assert {p.name for p in undisturbed.iterdir()} - {"evaluation.json"} == {
    "checkpoints",
    "config.json",
    "data.json",
    "metrics.jsonl",
    "samples",
    "train.log",
  }


@pytest.mark.parametrize(
  "step",
  [pytest.param(1, marks=pytest.mark.slow), 11, pytest.param(25, marks=pytest.mark.slow)],
)
def test_a_killed_run_resumes_to_the_bit(undisturbed, tmp_path, step):
  with start(tmp_path) as process:
    wait_for_line(process, rf"step {step}/60")
    process.kill()
  before = len((tmp_path / "metrics.jsonl").read_text().splitlines())
  assert before < 60, "killed too late to test anything"
  done = tiny.run_main(tmp_path, *LONG, "--config.training.eval_every_steps=20")
  resumed = re.search(r"resuming from the checkpoint of step (\d+)", done.stderr)
  # At most the steps since the last checkpoint (or the one being written).
  assert int(resumed[1]) >= step - 20 if resumed else step <= 20
  assert_same_run(tmp_path, undisturbed)
  assert not list((tmp_path / "checkpoints").glob("*tmp*")), "leftovers of the killed save"


@pytest.mark.parametrize(
  "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_stopped_run_saves_and_resumes_to_the_bit(undisturbed, tmp_path, number):
  with start(tmp_path) as process:
    wait_for_line(process, "step 13/60")
    process.send_signal(number)
    rest = process.stderr.read()
  assert process.returncode == 0
  stopped = re.search(rf"stopped by {number.name} at step (\d+)", rest)
  assert stopped, rest
  assert final_state(tmp_path).step == int(stopped[1])
  tiny.run_main(tmp_path, *LONG, "--config.training.eval_every_steps=20")
  assert_same_run(tmp_path, undisturbed)


def test_a_finished_run_is_left_alone(undisturbed):
  before = (undisturbed / "metrics.jsonl").read_text()
  done = tiny.run_main(undisturbed, *LONG, "--config.training.eval_every_steps=20")
  assert "trained 60 steps" in done.stderr
  assert (undisturbed / "metrics.jsonl").read_text() == before


def test_devices_do_not_change_a_run_or_its_samples(undisturbed, tmp_path):
  flags = (*LONG, "--config.training.eval_every_steps=20")
  tiny.run_main(tmp_path, *flags, num_devices=4)
  np.testing.assert_allclose(tiny.losses(tmp_path)[:20], tiny.losses(undisturbed)[:20], rtol=1e-5)
  np.testing.assert_allclose(tiny.losses(tmp_path), tiny.losses(undisturbed), rtol=1e-3)
  # The same checkpoint, sampled on one and on four devices.
  exports = []
  for devices in (1, 4):
    name = f"--config.sampling.name=on{devices}"
    tiny.run_main(undisturbed, "--mode=sample", name, num_devices=devices)
    with np.load(undisturbed / "samples" / f"on{devices}" / "samples.npz") as arrays:
      exports.append(arrays["arr_0"].astype(int))
  assert np.abs(exports[0] - exports[1]).max() <= 1


def test_a_checkpoint_of_four_devices_resumes_on_one(undisturbed, tmp_path):
  with start(tmp_path, num_devices=4) as process:
    wait_for_line(process, "step 8/60")
    process.terminate()
    process.communicate()
  assert process.returncode == 0
  tiny.run_main(tmp_path, *LONG, "--config.training.eval_every_steps=20")
  np.testing.assert_allclose(tiny.losses(tmp_path), tiny.losses(undisturbed), rtol=1e-3)


@pytest.mark.parametrize(
  "arm",
  [*(pytest.param(arm, marks=pytest.mark.slow) for arm in ("full", "static")), "adaptive"],
)
def test_every_arm_trains_samples_and_is_evaluated(tmp_path, arm):
  flags = ("--config.training.sample_every_steps=4", "--config.sampling.png_files=True")
  for mode in ("train", "sample", "evaluate"):
    done = tiny.run_main(tmp_path, f"--mode={mode}", *flags, arg=f"method={arm}")
  assert "pixel_frechet_distance" in done.stderr
  assert sorted(p.name for p in (tmp_path / "samples").glob("*.png")) == [
    "step_00000004.png",
    "step_00000008.png",
  ]
  export = tmp_path / "samples" / "default"
  with np.load(export / "samples.npz") as arrays:
    samples, labels = arrays["arr_0"], arrays["arr_1"]
  assert (samples.shape, samples.dtype) == ((10, 8, 8, 3), np.uint8)
  assert (labels.dtype, labels.tolist()) == (np.int64, list(range(10)))
  for i, sample in enumerate(samples):
    with Image.open(export / "png" / f"{i:06d}.png") as png:
      np.testing.assert_array_equal(png, sample)
  with Image.open(export / "grid.png") as grid:
    assert grid.size[0] == 10 * 50 - 2


def test_evaluation_is_training_s_own_and_of_the_averaged_weights(undisturbed):
  fields = dict(training__num_steps=60, training__eval_every_steps=20, checkpoint__every_steps=10)
  config = tiny.tiny_config(evaluation__extractors=(), **fields)
  evaluate.evaluate(config, str(undisturbed), jax.devices()[:1])
  losses = json.loads((undisturbed / "evaluation.json").read_text())["held_out"]
  trained = tiny.read_metrics(undisturbed)[-1]["eval/loss"]
  assert losses["ema"]["loss"] == pytest.approx(trained, rel=1e-6)
  assert losses["raw"]["loss"] != losses["ema"]["loss"]


@pytest.mark.slow
def test_unconditional_models_run_without_labels(tmp_path):
  flags = ("--config.data.num_classes=0",)
  for mode in ("train", "sample", "evaluate"):
    tiny.run_main(tmp_path, f"--mode={mode}", *flags)
  with np.load(tmp_path / "samples" / "default" / "samples.npz") as arrays:
    assert list(arrays) == ["arr_0"]


@pytest.mark.slow
@pytest.mark.parametrize(
  "flags",
  [
    ("--config.model.dtype=bfloat16", "--config.sampling.guidance_scale=2"),
    ("--config.model.learn_sigma=True", "--config.sampling.solver=ddpm"),
    ("--config.diffusion.prediction=epsilon", "--config.sampling.solver=dpm++"),
    ("--config.rank.last_n_blocks=1", "--config.rank.match=total", "--config.optimizer.name=lion"),
  ],
  ids=lambda flags: flags[0],
)
def test_options_run_end_to_end(tmp_path, flags):
  for mode in ("train", "sample"):
    tiny.run_main(tmp_path, f"--mode={mode}", "--config.training.num_steps=3", *flags)
  assert np.isfinite(tiny.losses(tmp_path)).all()


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
  tiny.run_main(tmp_path, "--config.training.num_steps=4")
  good = final_state(tmp_path)
  # Going on with an absurd learning rate needs the stored config to agree.
  config = tmp_path / "config.json"
  config.write_text(config.read_text().replace('"learning_rate": 0.002', '"learning_rate": 1e+29'))
  done = tiny.run_main(
    tmp_path,
    "--config.training.num_steps=40",
    "--config.optimizer.learning_rate=1e29",
    check=False,
  )
  assert done.returncode == 1
  last = done.stderr.rstrip().splitlines()[-1]
  message = re.match(
    r"error: the (loss|gradient|update) of step (\d+) is not finite, the first quantity that is "
    r"not; nothing was saved after it. The last good checkpoint is step 4. Lower config",
    last,
  )
  assert message, done.stderr
  assert 5 <= int(message[2]) <= 8
  assert all(np.isfinite(tiny.losses(tmp_path)))
  for a, b in zip(jax.tree.leaves(final_state(tmp_path)), jax.tree.leaves(good), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_nan_in_the_data_is_told_with_its_step(tmp_path, monkeypatch):
  config = tiny.tiny_config(training__num_steps=200)
  clean = builders.make_source(config, "train")
  images = clean.images.copy()
  images[7, 2, 5] = np.nan
  spoilt = {"train": dataclasses.replace(clean, images=images), "eval": clean}
  monkeypatch.setattr(builders, "make_source", lambda config, split: spoilt[split])
  devices = jax.devices()[:2]
  batches = train.Trainer(config, str(tmp_path), devices).batches(range(200))
  step = next(i for i, b in enumerate(batches, start=1) if np.isnan(b["image"]).any())
  words = f"the batch of step {step} is not finite.* step {(step - 1) // 4 * 4}. Encode the data"
  with pytest.raises(UserError, match=words):
    train.train(config, str(tmp_path), devices)


# A stage ends at its second or a later check; constant, so that a run can be prolonged.
STAGES = (
  "--config.curriculum.enabled=True",
  "--config.curriculum.boundaries=(0,400,700,1000)",
  "--config.curriculum.check_every_steps=4",
  "--config.curriculum.patience=1",
  "--config.curriculum.restart_optimizer=True",
  "--config.optimizer.decay=constant",
  "--config.optimizer.warmup_steps=2",
  "--config.checkpoint.every_steps=100",
)
STAGES_CONFIG = {
  "curriculum__enabled": True,
  "curriculum__boundaries": (0, 400, 700, 1000),
}


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
  """A curriculum that nothing interrupts; the step each stage began at by its number."""
  workdir = tmp_path_factory.mktemp("staged")
  done = tiny.run_main(workdir, *STAGES, "--config.training.num_steps=60")
  entered = re.findall(r"^stage (\d)/4: timesteps (.*), from step (\d+)$", done.stderr, re.M)
  return workdir, entered


def test_a_curriculum_goes_through_its_stages(staged):
  workdir, entered = staged
  ranges = ["700 to 999", "400 to 699", "0 to 399", "0 to 999"]
  assert [(number, text) for number, text, _ in entered] == list(zip("1234", ranges, strict=True))
  starts = [int(step) for *_, step in entered]
  assert starts[0] == 0
  assert all(step % 4 == 0 for step in starts)
  lines = tiny.read_metrics(workdir)
  for line in lines:
    stage = sum(start < line["step"] for start in starts)
    assert line["train/stage"] == stage
    groups = {name for name in line if name.startswith("train/loss_t")}
    highest_first = ("train/loss_t0700-0999", "train/loss_t0400-0699", "train/loss_t0000-0399")
    assert groups == set(highest_first[:stage])
    began = starts[stage - 1]
    share = min(1, (line["step"] - began) / 2)
    assert line["train/learning_rate"] == pytest.approx(2e-3 * share, rel=1e-6)


@pytest.mark.parametrize("after_start", [0, 3])
def test_a_curriculum_resumes_to_the_bit(staged, tmp_path, after_start):
  """At the very step a stage begins, and inside it between two checks."""
  reference, entered = staged
  step = int(entered[1][2]) + after_start
  done = tiny.run_main(tmp_path, *STAGES, f"--config.training.num_steps={step}")
  assert "training ended in stage 2/4 of the curriculum" in done.stderr
  done = tiny.run_main(tmp_path, *STAGES, "--config.training.num_steps=60")
  assert f"resuming from the checkpoint of step {step}" in done.stderr
  assert f"stage 2/4: timesteps 400 to 699, from step {entered[1][2]}" in done.stderr
  assert "training ended in stage" not in done.stderr
  assert_same_run(tmp_path, reference, **STAGES_CONFIG)


def test_other_numbers_of_timesteps_scale_the_groups(tmp_path):
  flags = ("--config.training.num_steps=2", "--config.diffusion.num_train_timesteps=20")
  tiny.run_main(tmp_path, *flags)
  names = [name for name in tiny.read_metrics(tmp_path)[-1] if name.startswith("train/loss_t")]
  assert names[:2] == ["train/loss_t0000-0001", "train/loss_t0002-0003"]
  assert all(int(name[-4:]) < 20 for name in names)


def read_terminal(fd, process, timeout=120):
  """What the process shows on the terminal until it ends."""
  shown, deadline = b"", time.monotonic() + timeout
  while time.monotonic() < deadline:
    if select.select([fd], [], [], 0.5)[0]:
      try:
        shown += os.read(fd, 65536)
      except OSError:  # the other end is closed
        break
    elif process.poll() is not None:
      break
  return shown.decode()


def test_a_terminal_shows_a_bar_with_speed_loss_and_time_left(tmp_path):
  ours, theirs = pty.openpty()
  termios.tcsetwinsize(theirs, (40, 120))
  process = subprocess.Popen(
    tiny.command(tmp_path), cwd=tiny.ROOT, env=tiny.environment(), stderr=theirs
  )
  os.close(theirs)
  shown = read_terminal(ours, process)
  os.close(ours)
  assert process.wait() == 0
  bar = next(line for line in reversed(shown.split("\r")) if "8/8" in line and "%" in line)
  assert re.search(r"\d+ images/s, loss 0\.\d+", bar), bar
  assert re.search(r"\[\d\d:\d\d<\d\d:\d\d,", bar), bar
  assert "step 8/8" not in shown
  log_file = (tmp_path / "train.log").read_text()
  assert "step 8/8" in log_file
  assert "%" not in log_file


def test_config_is_checked_before_the_workdir_is_touched(tmp_path):
  config = tiny.tiny_config(training__batch_size=6)
  with pytest.raises(UserError, match="not divisible by the 4 devices"):
    train.train(config, str(tmp_path / "run"))
  assert not pathlib.Path(tmp_path / "run").exists()


def test_the_learning_rate_in_the_metrics_is_the_one_applied(undisturbed):
  config = tiny.tiny_config(training__num_steps=60)
  schedule = optimizer.learning_rate_schedule(
    config.optimizer.learning_rate, config.optimizer.warmup_steps, 60, config.optimizer.decay
  )
  for line in tiny.read_metrics(undisturbed)[::20]:
    assert line["train/learning_rate"] == pytest.approx(
      float(schedule(line["step"] - 1, 0)), rel=1e-6
    )
