"""Whole runs through the real command line: stop anywhere, start again."""

import dataclasses
import gzip
import json
import logging
import os
import pathlib
import pty
import re
import select
import shutil
import signal
import subprocess
import termios
import time
import types
import zlib

import jax
import numpy as np
import pytest
from PIL import Image

from lrdit.config.run_config import read_changes
from lrdit.experiment import Experiment
from lrdit.modes import evaluate, sample, train
from lrdit.runtime.errors import UserError
from lrdit.runtime.locks import owned
from lrdit.train import optimizer
from lrdit.train.monitor import advice_on_non_finite
from tests import tiny
from tests.trained import SHALLOW, assert_same_run, final_state

# Long enough to be interrupted, and with everything that happens on the way.
LONG = (
  "--config.training.num_steps=60",
  "--config.checkpoint.every_steps=10",
  "--config.training.eval_every_steps=20",
)
LONG_CONFIG = dict(
  training__num_steps=60, checkpoint__every_steps=10, training__eval_every_steps=20
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """A run of 60 steps that nothing interrupts."""
  workdir = tmp_path_factory.mktemp("undisturbed")
  tiny.run_main(workdir, *LONG)
  return workdir


def start(workdir, *flags, num_devices=None):
  """To be entered by `with`, which closes its pipe."""
  return subprocess.Popen(
    tiny.command(workdir, *LONG, *flags),
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
  assert f"trained 60 steps; checkpoints are under {undisturbed / 'checkpoints'}\n" in log_file
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
  done = tiny.run_main(tmp_path, *LONG)
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
  assert process.returncode == 75
  stopped = re.search(rf"stopped by {number.name} at step (\d+)", rest)
  assert stopped, rest
  assert final_state(tmp_path).step == int(stopped[1])
  tiny.run_main(tmp_path, *LONG)
  assert_same_run(tmp_path, undisturbed)


def test_a_finished_run_is_left_alone(undisturbed, told):
  before = (undisturbed / "metrics.jsonl").read_text()
  train.train(tiny.tiny_config(**LONG_CONFIG), str(undisturbed), jax.devices()[:1])
  assert "trained 60 steps" in told.text
  assert (undisturbed / "metrics.jsonl").read_text() == before


def test_devices_do_not_change_a_run_or_its_samples(undisturbed, tmp_path):
  tiny.run_main(tmp_path, *LONG, num_devices=4)
  np.testing.assert_allclose(tiny.losses(tmp_path)[:20], tiny.losses(undisturbed)[:20], rtol=1e-5)
  np.testing.assert_allclose(tiny.losses(tmp_path), tiny.losses(undisturbed), rtol=1e-3)
  # The same checkpoint, sampled on one and on four devices.
  exports = []
  for devices in (1, 4):
    config = tiny.tiny_config(**LONG_CONFIG, sampling__name=f"on{devices}")
    sample.sample(config, str(undisturbed), jax.devices()[:devices])
    with np.load(undisturbed / "samples" / f"on{devices}" / "samples.npz") as arrays:
      exports.append(arrays["arr_0"].astype(int))
  assert np.abs(exports[0] - exports[1]).max() <= 1


def test_a_checkpoint_of_four_devices_resumes_on_one(undisturbed, tmp_path):
  with start(tmp_path, num_devices=4) as process:
    wait_for_line(process, "step 8/60")
    process.terminate()
    process.communicate()
  assert process.returncode == 75
  tiny.run_main(tmp_path, *LONG)
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
  for i, pixels in enumerate(samples):
    with Image.open(export / "png" / f"{i:06d}.png") as png:
      np.testing.assert_array_equal(png, pixels)
  with Image.open(export / "grid.png") as grid:
    assert grid.size[0] == 10 * 50 - 2


def test_evaluation_is_training_s_own_and_of_the_averaged_weights(undisturbed):
  config = tiny.tiny_config(evaluation__extractors=(), **LONG_CONFIG)
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


def train_one_device(workdir, **fields):
  # Constant, so that a longer run is the same program.
  config = tiny.tiny_config(**{"optimizer__decay": "constant"} | fields)
  train.train(config, str(workdir), jax.devices()[:1])


def test_a_run_that_blew_up_goes_on_as_its_message_says(tmp_path, told):
  train_one_device(tmp_path, training__num_steps=4)
  good = final_state(tmp_path)
  message = (
    r"the (loss|gradient|update) of step (\d+) is not finite, the first quantity that is not; "
    r"nothing was saved after it. The last good checkpoint is step 4. Lower config.optimizer."
    r"learning_rate or raise config.optimizer.warmup_steps, and run the command again, which goes "
    r"on from step 4"
  )
  with pytest.raises(UserError, match=message) as raised:
    train_one_device(tmp_path, training__num_steps=40, optimizer__learning_rate=1e29)
  assert 5 <= int(re.match(message, str(raised.value))[2]) <= 8
  assert all(np.isfinite(tiny.losses(tmp_path)))
  for a, b in zip(jax.tree.leaves(final_state(tmp_path)), jax.tree.leaves(good), strict=True):
    np.testing.assert_array_equal(a, b)
  assert "from step 4 on: config.optimizer.learning_rate is 1e+29, and was 0.002" in (
    (tmp_path / "train.log").read_text()
  )
  train_one_device(tmp_path, training__num_steps=6)
  assert final_state(tmp_path).step == 6
  assert all(np.isfinite(tiny.losses(tmp_path)))
  assert read_changes(tmp_path) == []  # no step at the other rate was saved


@pytest.mark.slow
def test_a_spoilt_checkpoint_is_deleted_as_its_message_says(tmp_path):
  fields = dict(checkpoint__every_steps=1, optimizer__grad_clip_norm=0.0, training__num_steps=6)
  spoilt = fields | dict(optimizer__learning_rate=1e15, optimizer__warmup_steps=1)
  path = tmp_path / "checkpoints" / "1"
  message = (
    f"the loss of step 2 is .*The parameters of the checkpoint of step 1 are spoilt already: "
    f"delete {path}, lower config.optimizer.learning_rate or .*, which goes on from the start"
  )
  with pytest.raises(UserError, match=message):
    train_one_device(tmp_path, **spoilt)
  shutil.rmtree(path)
  trainer = train.Trainer(tiny.tiny_config(**fields), str(tmp_path), jax.devices()[:1])
  assert trainer.initial_state().step == 0
  trainer.files.close()


@pytest.mark.parametrize(
  ("quantity", "step", "newest", "before", "advice"),
  [
    ("loss", 9, 8, 4, "delete checkpoints/8, lower .*, which goes on from step 4$"),
    ("gradient", 9, 8, 0, "delete checkpoints/8, lower .*, which goes on from the start$"),
    ("update", 9, 8, 4, r"^The last good checkpoint is step 8. Lower .* goes on from step 8$"),
    ("loss", 10, 8, 4, r"^The last good checkpoint is step 8. Lower .* goes on from step 8$"),
    ("loss", 1, 0, 0, "^Lower .* and run the command again$"),
    ("batch", 9, 8, 4, r"^The last good checkpoint is step 8. The data is damaged: "),
  ],
)
def test_advice_fits_what_is_there(quantity, step, newest, before, advice):
  assert re.search(
    advice, advice_on_non_finite(quantity, step, newest, before, pathlib.Path("checkpoints"))
  )


@pytest.mark.slow
def test_a_run_goes_on_in_another_dtype_and_logs_it(tmp_path, told):
  train_one_device(tmp_path, training__num_steps=4)
  train_one_device(tmp_path, training__num_steps=5, model__dtype="bfloat16", model__remat=True)
  assert np.isfinite(tiny.losses(tmp_path)).all()
  told = (tmp_path / "train.log").read_text()
  assert "from step 4 on: config.model.dtype is 'bfloat16', and was 'float32'" in told


def test_a_workdir_in_training_is_refused_to_another_training(tmp_path):
  config = tiny.tiny_config()
  with owned(tmp_path, "train"), pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
    train.train(config, str(tmp_path), jax.devices()[:1])
  assert list(tmp_path.iterdir()) == []
  trainer = train.Trainer(config, str(tmp_path), jax.devices()[:1])
  with pytest.raises(UserError, match="in use by process"):
    train.Trainer(config, str(tmp_path), jax.devices()[:1])
  trainer.files.close()
  other = tiny.tiny_config(seed=1)
  (tmp_path / "checkpoints" / "4").mkdir()
  (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
  for _ in range(2):  # a refusal keeps nothing
    with pytest.raises(UserError, match="holds another run: seed"):
      train.Trainer(other, str(tmp_path), jax.devices()[:1])


def test_a_nan_in_the_data_is_reported_with_its_step(tmp_path, monkeypatch):
  config = tiny.tiny_config(training__num_steps=200)
  clean = Experiment(config).source("train")
  images = clean.images.copy()
  images[7, 2, 5] = np.nan
  spoilt = {"train": dataclasses.replace(clean, images=images), "eval": clean}
  monkeypatch.setattr(Experiment, "source", lambda self, split: spoilt[split])
  devices = jax.devices()[:2]
  batches = train.Trainer(config, str(tmp_path), devices).batches(range(200))
  step = next(i for i, b in enumerate(batches, start=1) if np.isnan(b["image"]).any())
  saved = (step - 1) // 4 * 4
  words = f"the batch of step {step} is not finite.* step {saved}. The data is damaged"
  with pytest.raises(UserError, match=words):
    train.train(config, str(tmp_path), devices)


# A stage ends at its second or a later check; constant, so that a run can be prolonged.
STAGES = SHALLOW | {
  "curriculum__enabled": True,
  "curriculum__boundaries": (0, 400, 1000),
  "curriculum__check_every_steps": 4,
  "curriculum__patience": 1,
  "curriculum__restart_optimizer": True,
  "optimizer__decay": "constant",
  "optimizer__warmup_steps": 2,
  "checkpoint__every_steps": 100,
}


def train_stages(workdir, num_steps):
  """(stage, timesteps, first step) of each stage that the run enters."""
  train_one_device(workdir, **STAGES, training__num_steps=num_steps)
  log_file = (workdir / "train.log").read_text()
  return re.findall(r"stage (\d)/3: timesteps (.*), from step (\d+)$", log_file, re.M)


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
  """A curriculum that nothing interrupts, and its stages."""
  workdir = tmp_path_factory.mktemp("staged")
  return workdir, train_stages(workdir, 40)


def test_a_curriculum_goes_through_its_stages(staged):
  workdir, entered = staged
  assert [entry[:2] for entry in entered] == [
    ("1", "400 to 999"),
    ("2", "0 to 399"),
    ("3", "0 to 999"),
  ]
  starts = [int(step) for *_, step in entered]
  assert starts[0] == 0
  assert all(step % 4 == 0 for step in starts)
  for line in tiny.read_metrics(workdir):
    stage = sum(start < line["step"] for start in starts)
    assert line["train/stage"] == stage
    groups = {name for name in line if name.startswith("train/loss_t")}
    assert groups == set(["train/loss_t0400-0999", "train/loss_t0000-0399"][:stage])
    share = min(1, (line["step"] - starts[stage - 1]) / 2)
    assert line["train/learning_rate"] == pytest.approx(2e-3 * share, rel=1e-6)


@pytest.mark.parametrize("after_start", [0, 3])
def test_a_curriculum_resumes_to_the_bit(staged, tmp_path, told, after_start):
  """At the very step a stage begins, and inside it between two checks."""
  reference, entered = staged
  step = int(entered[1][2]) + after_start
  train_stages(tmp_path, step)
  assert "training ended in stage 2/3 of the curriculum" in told.text
  told.clear()
  again = train_stages(tmp_path, 40)
  assert f"resuming from the checkpoint of step {step}" in told.text
  assert again[-2:] == entered[1:]
  assert "training ended in stage" not in told.text
  assert_same_run(tmp_path, reference, **STAGES)


def test_other_numbers_of_timesteps_scale_the_groups(tmp_path):
  fields = SHALLOW | {"training__num_steps": 2, "diffusion__num_train_timesteps": 20}
  train_one_device(tmp_path, **fields)
  names = [name for name in tiny.read_metrics(tmp_path)[-1] if name.startswith("train/loss_t")]
  assert names[:2] == ["train/loss_t0000-0001", "train/loss_t0002-0003"]
  assert all(int(name[-4:]) < 20 for name in names)


def test_a_profile_of_some_steps_is_written(tmp_path):
  config = tiny.tiny_config(**SHALLOW, training__num_steps=4)
  with config.unlocked():
    config.training.profile_steps = (2, 3)
  train.train(config, str(tmp_path), jax.devices()[:1])
  [trace] = tmp_path.glob("profile/plugins/profile/*/*.trace.json.gz")
  with gzip.open(trace, "rt") as file:
    names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
  assert sum("PjitFunction" in name or "train_step" in name for name in names) > 0
  assert list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))
  assert len(tiny.losses(tmp_path)) == 4


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


def test_a_grid_that_is_not_finite_is_logged(monkeypatch, caplog):
  batch = np.zeros((80, 8, 8, 1), np.float32)
  batch[3, 0, 0] = np.nan
  config = tiny.tiny_config(training__sample_every_steps=4)
  grids = train.Grids(Experiment(config), jax.devices()[:1], vae_digest="")
  monkeypatch.setattr(grids, "_sampler", types.SimpleNamespace(sample=lambda *_: [batch]))
  pixels = grids.sample({}, step=7)
  assert pixels[3, 0, 0] == 0
  assert pixels[3, 1, 1] == 128
  assert "1 of the 80 samples of step 7 are not finite" in caplog.text


def is_held_out(key):
  return zlib.crc32(key.encode()) % 20 == 0


def write_npz(path, images):
  """Labels begin at 1, and the only image of 3 is held out."""
  only = next(i for i in range(len(images)) if is_held_out(str(i)))
  labels = np.where(np.arange(len(images)) == only, 3, 1 + np.arange(len(images)) % 2)
  np.savez(path, image=images, label=labels)


def write_folder(path, images):
  """The only image of 3 is held out."""
  only = next(f"3/{i}.png" for i in range(1000) if is_held_out(f"3/{i}.png"))
  names = [f"{('10', '2')[i % 2]}/{i}.png" for i in range(1, len(images))]
  for image, name in zip(images, [only, *names], strict=True):
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path / name)


@pytest.mark.parametrize(
  ("name", "write", "num_classes", "patterns"),
  [
    ("npz", write_npz, 4, ["2 of 4 classes have no training image, .* mean nothing: 0, 3\\. "]),
    (
      "folder",
      write_folder,
      3,
      [
        "training images\\): 0 is '2' \\(\\d+\\), 1 is '3' \\(0\\), 2 is '10' \\(\\d+\\)",
        "1 of 3 classes have no training image, .* mean nothing: 1 \\('3'\\)\\. ",
      ],
    ),
  ],
)
def test_classes_without_training_images_are_in_the_log_of_training(
  tmp_path, caplog, name, write, num_classes, patterns
):
  caplog.set_level(logging.DEBUG, logger="lrdit")
  data_dir = tmp_path / "data.npz"
  write(data_dir, np.random.default_rng(0).integers(0, 256, (60, 8, 8), np.uint8))
  fields = dict(data__data_dir=str(data_dir), data__num_classes=num_classes)
  config = tiny.tiny_config(data__name=name, **fields)
  train.Trainer(config, str(tmp_path / "run"), jax.devices()[:1]).files.close()
  log = (tmp_path / "run" / "train.log").read_text()
  for pattern in patterns:
    assert re.search(pattern, log), log
