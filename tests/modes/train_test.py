"""Whole runs, through the real command line or in this process: stop anywhere, start again."""

import gzip
import json
import logging
import os
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

from lrdit.modes import evaluate, sample, train
from lrdit.train import muon, optimizer
from tests import tiny
from tests.command_line import run_in_process
from tests.trained import assert_same_run, final_state, train_one_device

# Long enough to be interrupted, and with everything that happens on the way.
LONG = (
  "--config.training.num_steps=60",
  "--config.checkpoint.every_steps=10",
  "--config.training.eval_every_steps=20",
)
RULES = sorted({*muon.FACTOR_UPDATES} - {"bands"})  # of Muon
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
    env=tiny.environment(num_devices, **tiny.READ_ONLY_CACHE),
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
  """Steps of four devices give those of one, and one goes on from their checkpoint."""
  with start(tmp_path, num_devices=4) as process:
    wait_for_line(process, "step 20/60")
    process.terminate()
    process.communicate()
  assert process.returncode == 75
  train.train(tiny.tiny_config(**LONG_CONFIG), str(tmp_path), jax.devices()[:1])
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


@pytest.mark.parametrize(
  "arm",
  [
    *(pytest.param(arm, marks=pytest.mark.slow) for arm in ("full", "narrow", "static")),
    "adaptive",
  ],
)
def test_every_arm_trains_samples_and_is_evaluated(tmp_path, arm, capsys, monkeypatch):
  flags = (
    "--config.training.sample_every_steps=4",
    "--config.sampling.png_files=True",
  )
  for mode in ("train", "sample", "evaluate"):
    argv = tiny.command(tmp_path, f"--mode={mode}", *flags, arg=f"method={arm}")[2:]
    status, stderr = run_in_process(capsys, monkeypatch, argv)
    assert status == 0, stderr
  assert "pixel_frechet_distance" in stderr
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
    ("--config.rank.last_n_blocks=1", "--config.model.depth=2", "--config.optimizer.name=lion"),
    ("--config.rank.match=total", "--config.rank.num_buckets=3"),
    ("--config.optimizer.factor_rates=fan_in", "--config.optimizer.weight_decay=0.1"),
  ],
  ids=lambda flags: flags[0],
)
def test_options_run_end_to_end(tmp_path, flags):
  for mode in ("train", "sample"):
    tiny.run_main(tmp_path, f"--mode={mode}", "--config.training.num_steps=3", *flags)
  assert np.isfinite(tiny.losses(tmp_path)).all()


@pytest.mark.parametrize(
  "rule", ["bands", *(pytest.param(r, marks=pytest.mark.slow) for r in RULES)]
)
def test_muon_resumes_to_the_bit(tmp_path, rule):
  fields = dict(optimizer__name="muon", optimizer__factor_update=rule)
  train_one_device(tmp_path / "whole", training__num_steps=6, **fields)
  for num_steps in (3, 6):
    train_one_device(tmp_path / "parts", training__num_steps=num_steps, **fields)
  assert_same_run(tmp_path / "parts", tmp_path / "whole", **fields)


@pytest.mark.slow
def test_galore_resumes_to_the_bit_within_a_gap(tmp_path):
  fields = dict(optimizer__name="galore", optimizer__galore_rank=4)
  fields |= dict(optimizer__galore_gap=4)
  train_one_device(tmp_path / "whole", training__num_steps=6, **fields)
  for num_steps in (3, 6):
    train_one_device(tmp_path / "parts", training__num_steps=num_steps, **fields)
  assert_same_run(tmp_path / "parts", tmp_path / "whole", **fields)


@pytest.mark.slow
def test_a_run_goes_on_in_another_dtype_and_logs_it(tmp_path, told):
  train_one_device(tmp_path, training__num_steps=4)
  train_one_device(tmp_path, training__num_steps=5, model__dtype="bfloat16", model__remat=True)
  assert np.isfinite(tiny.losses(tmp_path)).all()
  told = (tmp_path / "train.log").read_text()
  assert "from step 4 on: config.model.dtype is 'bfloat16', and was 'float32'" in told


# A stage ends at its second or a later check; constant, so that a run can be prolonged.
STAGES = {
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
  logging.getLogger("lrdit").setLevel(logging.DEBUG)  # as main.py does
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


@pytest.mark.parametrize("after_start", [pytest.param(0, marks=pytest.mark.slow), 3])
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
  fields = {"training__num_steps": 2, "diffusion__num_train_timesteps": 20}
  train_one_device(tmp_path, "method=full", **fields)
  names = [name for name in tiny.read_metrics(tmp_path)[-1] if name.startswith("train/loss_t")]
  assert names[:2] == ["train/loss_t0000-0001", "train/loss_t0002-0003"]
  assert all(int(name[-4:]) < 20 for name in names)


@pytest.mark.parametrize("steps", [(2, 3), pytest.param((2, 2), marks=pytest.mark.slow)])
def test_a_profile_of_some_steps_is_written(tmp_path, steps):
  fields = {"training__num_steps": 4, "training__profile_steps": steps}
  train_one_device(tmp_path, "method=full", **fields)
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
  command = tiny.command(tmp_path, arg="method=full")
  process = subprocess.Popen(command, cwd=tiny.ROOT, env=tiny.environment(), stderr=theirs)
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


def test_the_learning_rate_in_the_metrics_is_the_one_applied(undisturbed):
  config = tiny.tiny_config(training__num_steps=60)
  schedule = optimizer.learning_rate_schedule(
    config.optimizer.learning_rate, config.optimizer.warmup_steps, 60, config.optimizer.decay
  )
  for line in tiny.read_metrics(undisturbed)[::20]:
    assert line["train/learning_rate"] == pytest.approx(
      float(schedule(line["step"] - 1, 0)), rel=1e-6
    )


def test_what_a_run_may_watch_and_regularize(tmp_path, monkeypatch, told):
  """Penalties, GaLore, microbatches, independent timesteps, gradient norms and sample metrics."""
  fields = {f"regularizer__{name}": 1e-4 for name in ("frobenius", "nuclear", "orthogonality")}
  fields |= {"training__num_steps": 2, "diffusion__timesteps": "iid"}
  fields |= {"optimizer__name": "galore", "optimizer__galore_rank": 4, "training__microbatch": 8}
  fields |= {f"training__{name}_every_steps": 2 for name in ("gradient_norms", "metrics")}
  fields |= {"training__metrics_samples": 8, "curriculum__boundaries": (0, 400, 1000)}
  fields |= {"optimizer__ema_power": 0.75, "sampling__num_steps": 2}
  measured, measure = [], train.Quality.measure

  def note(quality, params, step):
    measured.append(jax.tree.map(np.array, params))
    blown_up = jax.tree.map(lambda value: np.full_like(value, np.nan), params)
    assert measure(quality, blown_up, step) == {}
    return measure(quality, params, step)

  monkeypatch.setattr(train.Quality, "measure", note)
  train_one_device(tmp_path, **fields)
  state = final_state(tmp_path, **fields)
  for got, averaged in zip(*map(jax.tree.leaves, (measured, state.ema_params)), strict=True):
    np.testing.assert_array_equal(got, averaged)
  first, last = tiny.read_metrics(tmp_path)
  for name in ("frobenius", "nuclear"):
    assert first[f"train/penalty_{name}"] > last[f"train/penalty_{name}"] > 0
  assert last["train/penalty_orthogonality"] > first["train/penalty_orthogonality"]
  assert 0 < first["train/projection_loss"] < 1
  for group in ("t0000-0399", "t0400-0999"):
    assert last[f"train/example_grad_norm_mean_{group}"] > 0
    assert last[f"train/example_grad_norm_variance_{group}"] > 0
  assert last["eval/pixel_frechet_distance"] > 0
  assert "8 of the 8 samples of step 2 are not finite: they are not measured" in told.text
  assert not any(name.startswith(("eval/", "train/example_grad")) for name in first)
