"""`--mode=sample`, on a checkpoint of noise."""

import json
import logging
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from PIL import Image

from lrdit.experiment import Experiment
from lrdit.modes import sample
from lrdit.runtime.errors import UserError
from lrdit.sampling.sampler import Sampler, random_labels
from lrdit.train import checkpoints
from tests import tiny
from tests.trained import make_noisy_run, save_checkpoint


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return make_noisy_run(tmp_path_factory.mktemp("sampled"))


@pytest.fixture(autouse=True)
def log_lines(caplog, monkeypatch):
  # start_logging() in other tests keeps records from the root logger.
  caplog.set_level(logging.DEBUG, logger="lrdit")
  return lambda: [record.getMessage() for record in caplog.records if record.name == "lrdit"]


def export(workdir, name, **fields):
  """Samples on one device; returns the export's directory."""
  fields = {f"sampling__{field}": value for field, value in fields.items()}
  config = tiny.tiny_config(sampling__name=name, **fields)
  sample.sample(config, str(workdir), jax.devices()[:1])
  return workdir / "samples" / name


def images(directory):
  """Bytes of samples.npz and of the PNG files."""
  paths = [directory / "samples.npz", *(directory / "png").glob("*")]
  return {path.name: path.read_bytes() for path in paths}


def metadata(directory):
  return json.loads((directory / "metadata.json").read_text())


# Enough batches, each of which takes long enough, to be killed in between.
LONG = dict(num_samples=60, num_steps=200, png_files=True)


def test_a_killed_export_goes_on_to_the_byte(workdir, tmp_path):
  shutil.copytree(workdir, tmp_path / "run")
  flags = [f"--config.sampling.{field}={value}" for field, value in LONG.items()]
  command = tiny.command(tmp_path / "run", "--mode=sample", *flags, "--config.sampling.name=long")
  killed = tmp_path / "run" / "samples" / "long"
  process = subprocess.Popen(
    command, cwd=tiny.ROOT, env=tiny.environment(), stderr=subprocess.PIPE, text=True
  )
  done = 0
  while done < 8 and process.poll() is None:
    time.sleep(0.005)
    if (killed / "progress.json").exists():
      done = json.loads((killed / "progress.json").read_text())["num_done"]
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL, "ended before it was killed"
  assert not (killed / "metadata.json").exists(), "killed too late to test anything"
  done = json.loads((killed / "progress.json").read_text())["num_done"]
  assert 8 <= done < 60
  env = tiny.environment(**tiny.SHOWING_IMPORTS)
  resumed = subprocess.run(
    command, cwd=tiny.ROOT, env=env, capture_output=True, text=True, check=True
  )
  needless = tiny.HEAVY | {"sklearn", "scipy", "tensorboard"}  # for data and metrics
  assert not needless & tiny.imported_packages(resumed.stderr)
  assert f"going on from {done} of 60 samples" in resumed.stderr
  undisturbed = export(tmp_path / "run", "undisturbed", **LONG)
  assert len(images(killed)) == 61
  assert images(killed) == images(undisturbed)
  assert (killed / "grid.png").read_bytes() == (undisturbed / "grid.png").read_bytes()
  assert (metadata(killed)["num_starts"], metadata(undisturbed)["num_starts"]) == (2, 1)
  assert metadata(killed)["num_drawn"] == 60


def test_more_samples_are_added_to_the_bit_and_a_finished_export_is_left_alone(
  workdir, monkeypatch, log_lines
):
  export(workdir, "longer")
  directory = export(workdir, "longer", num_samples=14)
  assert metadata(directory)["num_drawn"] == 10 + 6  # from 8, a multiple of the batch
  whole = export(workdir, "whole", num_samples=14)
  assert images(directory) == images(whole)
  monkeypatch.setattr(Sampler, "sample_batch", None)  # drawing would call it
  export(workdir, "longer", num_samples=14)
  assert log_lines()[-1].endswith("samples/longer: all 14 samples are there")
  export(workdir, "longer", num_samples=14, batch_size=6)
  cut = export(workdir, "whole", num_samples=5)
  assert np.load(cut / "samples.npz")["arr_0"].shape == (5, 8, 8, 3)


def test_the_path_of_a_sample_names_its_ranks(workdir):
  directory = export(workdir, "path", num_steps=4)
  path = json.loads((directory / "path.json").read_text())
  plan = Experiment(tiny.tiny_config()).plan
  t = np.asarray(path["timesteps"])
  assert (path["label"], path["steps"]) == (0, [0, 1, 2, 3])
  assert t.tolist() == Experiment(tiny.tiny_config(sampling__num_steps=4)).solver_table.t.tolist()
  assert path["ranks"] == {
    name: [ranks.active[bucket] for bucket in plan.bucket_of_timestep[t]]
    for name, ranks in plan.layers
  }
  with Image.open(directory / "path.png") as image:
    assert image.size == (4 * 48 + 3 * 2, 48)


def test_other_weights_of_the_same_step_start_over(workdir, tmp_path, log_lines):
  shutil.copytree(workdir, tmp_path / "run")
  directory = export(tmp_path / "run", "default")
  before = images(directory)
  shutil.rmtree(tmp_path / "run" / "checkpoints")
  save_checkpoint(tmp_path / "run", tiny.tiny_config(), scale=1.5)
  export(tmp_path / "run", "default")
  assert any("starting over" in line and "checkpoint_digest" in line for line in log_lines())
  assert images(directory) != before


def test_a_chosen_checkpoint_is_sampled_beside_the_newest(workdir, tmp_path):
  shutil.copytree(workdir / "checkpoints", tmp_path / "run" / "checkpoints")
  shutil.copy(workdir / "config.json", tmp_path / "run")
  config = tiny.tiny_config()
  save_checkpoint(tmp_path / "run", config, step=12, scale=1.5, keep=2)
  for checkpoint in ("", "8"):
    sample.sample(config, str(tmp_path / "run"), jax.devices()[:1], checkpoint=checkpoint)
  newest = tmp_path / "run" / "samples" / "default"
  chosen = tmp_path / "run" / "steps" / "8" / "samples" / "default"
  assert [metadata(d)["checkpoint_step"] for d in (newest, chosen)] == [12, 8]
  assert images(chosen) == images(export(workdir, "default")) != images(newest)


@pytest.mark.parametrize(
  ("rule", "expected"),
  [
    ("balanced", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ("7", [7] * 10),
    ("random", random_labels(0, np.arange(10), 10).tolist()),
  ],
)
def test_labels_are_those_asked_for_and_those_used(workdir, monkeypatch, rule, expected):
  used = []
  sample_batch = Sampler.sample_batch

  def recording(self, params, index, labels, path):
    used.extend(labels.tolist())
    return sample_batch(self, params, index, labels, path)

  monkeypatch.setattr(Sampler, "sample_batch", recording)
  directory = export(workdir, f"labels_{rule}", labels=rule)
  with np.load(directory / "samples.npz") as arrays:
    assert arrays["arr_1"].tolist() == used[:10] == expected
  assert metadata(directory)["labels"] == rule


@pytest.mark.parametrize(
  ("fields", "fix"),
  [
    (dict(), "train longer, or again with a lower config.optimizer.learning_rate"),
    (dict(guidance_scale=1000.0), "lower config.sampling.guidance_scale=1000.0; or train"),
    (dict(clip_x_0=False, use_ema=False), "set config.sampling.clip_x_0=True; or train"),
  ],
)
def test_a_sample_that_is_not_finite_stops_the_export(workdir, monkeypatch, fields, fix):
  sample_batch = Sampler.sample_batch

  def broken(self, params, index, labels, path):
    x_0 = np.array(sample_batch(self, params, index, labels, path))
    x_0[index == 5] = np.nan
    x_0[(index == 10) | (index == 11)] = np.inf  # padding of the last batch: never kept
    return x_0

  monkeypatch.setattr(Sampler, "sample_batch", broken)
  name = f"bad_{len(fix)}"
  with pytest.raises(UserError, match=r"sample 5 of the (averaged|raw) weights of step 8") as error:
    export(workdir, name, **fields)
  assert fix in str(error.value)
  assert not (workdir / "samples" / name / "metadata.json").exists()
  monkeypatch.setattr(Sampler, "sample_batch", sample_batch)
  assert metadata(export(workdir, name, **fields))["num_drawn"] == 10


def test_a_guidance_of_1000_is_logged(workdir, log_lines):
  directory = export(workdir, "guided", guidance_scale=1000.0)
  assert metadata(directory)["is_mostly_saturated"]
  assert metadata(directory)["saturated_share"] > 0.5
  assert any("lower config.sampling.guidance_scale" in line for line in log_lines())


# Another value of every field of `sampling`; these define no sample.
FREE = {"num_samples": 5, "batch_size": 8, "name": "x", "png_files": True}
DEFINING = {
  "solver": "ddpm",
  "num_steps": 9,
  "eta": 0.5,
  "guidance_scale": 2.0,
  "clip_x_0": False,
  "seed": 1,
  "labels": "random",
  "use_ema": False,
  "guidance_channels": 1,
  "guidance_min_noise": 0.3,
  "guidance_max_noise": 5.0,
}


def test_every_field_that_defines_a_sample_is_among_the_settings():
  config = tiny.tiny_config()
  assert set(config.sampling) == FREE.keys() | DEFINING.keys()

  def settings(step=8, params=None, vae_digest="", **fields):
    experiment = Experiment(tiny.tiny_config(**fields))
    params = {"a": np.zeros(3, np.float32)} if params is None else params
    return experiment.sample_settings(step, checkpoints.digest(params), vae_digest)

  base = settings()
  for field, value in FREE.items():
    assert settings(**{f"sampling__{field}": value}) == base, field
  for field, value in DEFINING.items():
    assert settings(**{f"sampling__{field}": value}) != base, field
  others = [
    settings(step=9),
    settings(params={"a": np.array([0, 0, 1e-9], np.float32)}),
    settings(params={"b": np.zeros(3, np.float32)}),
    settings(vae_digest="ab"),
    settings(model__dtype="bfloat16"),
    settings(diffusion__noise_schedule="linear"),
    settings(diffusion__prediction="epsilon"),
    settings(rank__min_ratio=0.5),
  ]
  assert base not in others
