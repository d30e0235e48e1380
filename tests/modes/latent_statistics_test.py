"""What `--mode=encode` says about the latents that it wrote."""

import json

import numpy as np
import pytest
from PIL import Image

from lrdit.experiment import Experiment
from lrdit.model.vae import unscale_latents
from lrdit.modes import encode
from tests.latent_runs import make_config, one_device, write_images


def test_finished_latents_have_statistics_and_a_round_trip(tmp_path):
  config = make_config(write_images(tmp_path / "images.npz"), data__flip=False)
  directory = tmp_path / "latents"
  encode.encode(config, str(directory), one_device())
  found = json.loads((directory / "statistics.json").read_text())

  fields = {"vae__latents_dir": str(directory), "data__flip": False}
  experiment = Experiment(make_config(tmp_path / "images.npz", **fields))
  source, held_out = experiment.source("train"), experiment.source("eval")
  every = [s.gather(np.arange(len(s)), np.zeros(len(s), bool)) for s in (source, held_out)]
  assert (found["train_examples"], found["round_trip_examples"]) == (len(source), len(held_out))
  # By sampling: x_0 is the mean and noise of the posterior's standard deviation.
  noise = np.random.default_rng(0).standard_normal((50, *every[0]["image"].shape))
  x_0 = every[0]["image"] + every[0]["std"] * noise
  assert found["std"] == pytest.approx(x_0.std(), rel=0.01)
  np.testing.assert_allclose(found["channel_means"], x_0.mean(axis=(0, 1, 2, 3)), atol=0.01)
  np.testing.assert_allclose(found["channel_stds"], x_0.std(axis=(0, 1, 2, 3)), rtol=0.02)

  runner = experiment.vae_runner(one_device())
  decoded = runner.decode(unscale_latents(runner.config, every[1]["image"])).clip(-1, 1)
  images = experiment.image_source("eval")
  pixels = images.gather(np.arange(len(images)), np.zeros(len(images), bool))["image"]
  psnr = 10 * np.log10(4 / np.square(decoded - pixels).mean())
  assert found["round_trip_psnr"] == pytest.approx(psnr, abs=0.01)
  with Image.open(directory / "round_trip.png") as picture:
    assert picture.height > 2 * 32
