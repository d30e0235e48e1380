"""Workdirs as training, sampling and evaluation leave them, made by hand in milliseconds."""

import json

import numpy as np
from PIL import Image

from tests import tiny

METADATA = {
  "checkpoint_step": 8,
  "weights": "ema",
  "num_samples": 20,
  "has_labels": True,
  "num_drawn": 30,
  "solver": "ddim",
  "num_steps": 10,
  "eta": 0.0,
  "guidance_scale": 1.0,
  "clip_x_0": True,
  "seed": 0,
  "labels": "balanced",
  "dtype": "float32",
  "wall_clock_seconds": 4.0,
  "compile_seconds": 2.5,
  "backend": "cpu",
  "num_devices": 1,
  "jax": "0.10.2",
}
HELD_OUT = {"draws": 4, "examples": 299, "seed": 0, "batch_size": 16, "dtype": "float32"}
HELD_OUT |= {"data": {"name": "digits", "split": "test"}}
SOFTWARE = {"python": "3.12.3", "jax": "0.10.2", "flax": "0.12.1", "lrdit": "1.5", "backend": "cpu"}
REFERENCE = {"split": "train", "num_images": 1498}
PATH = {"label": 0, "steps": [0, 9], "timesteps": [900, 0], "ranks": {"blocks_1/mlp/fc1": [3, 8]}}


def write(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value))


def edit(path, change):
  """Rewrite a JSON file after `change` has changed its value in place."""
  value = json.loads(path.read_text())
  change(value)
  write(path, value)


def losses(loss):
  groups = [
    {"t_first": 0, "t_last": 499, "loss": 1.5 * loss, "examples": 150},
    {"t_first": 500, "t_last": 999, "loss": 0.5 * loss, "examples": 149},
  ]
  return {"loss": loss, "groups": groups}


def make_samples(workdir, name="default", accuracy=0.9, distance=20.0, digest="ab", **metadata):
  """Write a set of 20 samples; returns what evaluation.json holds of it."""
  metadata, directory = METADATA | metadata, workdir / "samples" / name
  images = np.random.default_rng(metadata["seed"]).integers(0, 256, (20, 8, 8, 3), np.uint8)
  write(directory / "metadata.json", metadata)
  np.savez(directory / "samples.npz", arr_0=images, arr_1=np.arange(20) % 10)
  write(directory / "path.json", PATH)
  Image.fromarray(np.concatenate(images[:2], axis=1)).save(directory / "path.png")
  metrics = {
    "classifier_recognition_accuracy": accuracy,
    "classifier_recognition_accuracy_of_held_out_images": 0.987,
    "classifier_num_samples": 20,
    "inception_frechet_distance": distance,
  }
  extractors = {"classifier": {"digest": digest}, "inception": {"digest": "1"}}
  evaluated = {"metadata": metadata, "figures": metrics, "extractors": extractors}
  return evaluated | {"reference": REFERENCE}


def make_run(workdir, method="full", seed=0, loss=0.2, accuracy=0.9, rate=100.0, samples=None):
  """Write the workdir of a run of 8 steps with everything in it; returns its path as text."""
  config = tiny.tiny_config(f"method={method}", seed=seed, **tiny.DEEPER).to_dict()
  write(workdir / "config.json", config)
  write(workdir / "data.json", {"train": {"name": "digits"}, "eval": {"name": "digits"}})
  lines = [
    {"step": 4, "train/loss": 0.9},
    {"step": 8, "train/loss": 2 * loss, "train/images_per_second": rate, "eval/loss": loss},
  ]
  lines[1] |= {"train/loss_t0000-0499": 3 * loss, "train/loss_t0500-0999": loss}
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  if samples is None:
    samples = {"default": make_samples(workdir, accuracy=accuracy, distance=100 * loss)}
  evaluation = {
    "checkpoint_step": 8,
    "held_out": HELD_OUT | {"raw": losses(1.1 * loss), "ema": losses(loss)},
    "samples": samples,
    "software": SOFTWARE,
    "settings": config["evaluation"] | {"max_features": 77},
  }
  write(workdir / "evaluation.json", evaluation)
  return str(workdir)
