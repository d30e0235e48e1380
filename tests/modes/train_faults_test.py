"""What training does with faults of the data, the numbers, the workdir and the config."""

import dataclasses
import json
import logging
import os
import pathlib
import re
import shutil
import types
import zlib

import jax
import numpy as np
import pytest
from PIL import Image

from lrdit.config.run_config import read_changes
from lrdit.experiment import Experiment
from lrdit.modes import train
from lrdit.runtime.errors import UserError
from lrdit.runtime.locks import owned
from tests import tiny
from tests.trained import final_state, train_one_device


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
  fields = dict(checkpoint__every_steps=1, optimizer__grad_clip_norm=None, training__num_steps=6)
  spoilt = fields | dict(optimizer__learning_rate=1e15, optimizer__warmup_steps=1)
  path = tmp_path / "checkpoints" / "1"
  message = (
    f"the loss of step 2 is .*The parameters of the checkpoint of step 1 are already spoiled: "
    f"delete {path}, lower config.optimizer.learning_rate or .*, which goes on from the start"
  )
  with pytest.raises(UserError, match=message):
    train_one_device(tmp_path, **spoilt)
  shutil.rmtree(path)
  trainer = train.Trainer(tiny.tiny_config(**fields), str(tmp_path), jax.devices()[:1])
  assert trainer.initial_state().step == 0
  trainer.files.close()


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


def test_config_is_checked_before_the_workdir_is_touched(tmp_path):
  config = tiny.tiny_config(training__batch_size=6)
  with pytest.raises(UserError, match="not divisible by the 4 devices"):
    train.train(config, str(tmp_path / "run"))
  assert not pathlib.Path(tmp_path / "run").exists()


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
