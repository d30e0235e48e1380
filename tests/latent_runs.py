"""Runs on latents: configs for the tiny VAE, images on disk, and the command line."""

import subprocess
import sys

import jax
import numpy as np

from configs import cifar10
from lrdit.config.resolve import resolve
from tests import tiny

VAE = tiny.GOLDEN / "sd_vae_tiny"
SCALE = 0.18215  # of that VAE
NUM_IMAGES = 100


def write_images(path, count=NUM_IMAGES, seed=0):
  images = np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
  np.savez(path, image=images, label=np.arange(count) % 10)
  return path


def fields_for(images, **fields):
  """Return the fields of configs/cifar10.py that a tiny model on the tiny VAE's latents changes."""
  changed = {
    "data.name": "npz",
    "data.data_dir": str(images),
    "vae.downsample_factor": 8,
    "vae.path": str(VAE),
    "vae.batch_size": 8,
    "sampling.clip_x_0": False,
    "optimizer.warmup_steps": 0,
    "curriculum.enabled": False,
    "training.num_epochs": None,
  }
  fields = {name.replace("__", "."): value for name, value in fields.items()}
  return tiny.OVERRIDES | changed | fields


def make_config(images, **fields):
  config = cifar10.get_config().unlock()
  for field, value in fields_for(images, **fields).items():
    config.update_from_flattened_dict({field: value})
  return resolve(config)


def command(mode, images, *flags, **fields):
  given = [f"--config.{name}={value}" for name, value in fields_for(images, **fields).items()]
  config = "--config=configs/cifar10.py"
  return [sys.executable, "main.py", config, f"--mode={mode}", *given, *flags]


def run(arguments):
  options = dict(cwd=tiny.ROOT, env=tiny.environment(), timeout=120, check=False)
  return subprocess.run(arguments, capture_output=True, text=True, **options)


def one_device():
  return jax.devices()[:1]
