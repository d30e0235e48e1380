"""Measures a trained model: held-out loss, and the quality of exported samples."""

import functools
import logging
import math
import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lrdit import builders, input_pipeline, metrics, parallel, training_step
from lrdit.checkpoints import Checkpoints
from lrdit.errors import UserError
from lrdit.sample import load_export
from lrdit.sources import Source
from lrdit.train import mean_eval_loss
from lrdit.workdir import open_workdir, write_json

log = logging.getLogger("lrdit")

# Beyond this an SVM on raw pixels takes hours.
MAX_REAL_VALUES = 1 << 24


def held_out_loss(config: ConfigDict, params: Any, devices: parallel.Devices) -> float:
  """Mean loss on the held-out split with the noise and timesteps of training's
  own evaluation, so both give the same figure.

  Args:
    config: resolved.
    params: parameters on the host.
    devices: devices to use.
  """
  objective = builders.make_objective(config, devices).without_augmentation()
  step = functools.partial(training_step.eval_step, objective=objective)
  batch_size = config.training.batch_size
  batches = input_pipeline.eval_batches(
    builders.make_source(config, "eval"),
    parallel.batch_slots(batch_size, devices),
    batch_size,
  )
  return mean_eval_loss(
    parallel.pmap(step, devices),
    parallel.replicate(params, devices),
    batches,
    jax.random.key(config.seed),
  )


def sample_quality(config: ConfigDict, step: int, directory: pathlib.Path) -> dict[str, Any]:
  """An export's metadata and its figures against the real images, on raw pixels.

  The reference of the Frechet distance is the whole dataset; the classifier is
  fitted on the training split, and its accuracy on the held-out one given too.

  Args:
    config: resolved.
    step: of the checkpoint that is evaluated.
    directory: of the export.

  Raises:
    UserError: the export is missing, damaged, too small, or of other weights.
  """
  samples, labels, metadata = load_export(directory)
  weights = _weights(config)
  if (metadata["checkpoint_step"], metadata["weights"]) != (step, weights):
    raise UserError(
      f"the samples under {directory} are of step {metadata['checkpoint_step']} "
      f"({metadata['weights']} weights), not of step {step} ({weights}): run the same command with "
      "--mode=sample again"
    )
  if len(samples) < 2:
    raise UserError(
      f"{directory} holds one sample: a distance needs config.sampling.num_samples>=2"
    )
  if config.vae.downsample_factor:
    log.warning("no figures of the samples: over raw pixels they are for models on pixels")
    return metadata
  splits = [builders.make_source(config, split) for split in ("train", "eval")]
  num_values = sum(len(split) for split in splits) * math.prod(splits[0].image_shape)
  if num_values > MAX_REAL_VALUES:
    log.warning(
      "no figures of the samples: over raw pixels they are for small images (at most %d values "
      "in all, here %d)",
      MAX_REAL_VALUES,
      num_values,
    )
    return metadata
  images = samples[..., : config.data.num_channels] / 127.5 - 1.0
  train, held_out = (_read_all(split) for split in splits)
  real = np.concatenate([train["image"], held_out["image"]])
  figures = {
    "pixel_frechet_distance": metrics.frechet_distance(
      *(metrics.gaussian_statistics(x.reshape(len(x), -1)) for x in (images, real))
    )
  }
  if labels is not None:
    classifier = metrics.fit_svm(train["image"], train["label"])
    accuracy = functools.partial(metrics.recognition_accuracy, classifier)
    figures["svm_recognition_accuracy"] = accuracy(images, labels)
    figures["svm_recognition_accuracy_of_held_out_images"] = accuracy(
      held_out["image"], held_out["label"]
    )
  for name, value in figures.items():
    log.info("%s %.4f", name, value)
  return metadata | figures


def _weights(config: ConfigDict) -> str:
  return "ema" if config.sampling.use_ema else "raw"


def _read_all(source: Source) -> dict[str, np.ndarray]:
  """A whole split: "image" (N, H, W, C) in [-1, 1] and "label" (N,)."""
  return source.gather(np.arange(len(source)), np.zeros(len(source), bool))


def evaluate(config: ConfigDict, workdir: str, devices: parallel.Devices | None = None) -> None:
  """Runs `--mode=evaluate`: writes and prints evaluation.json.

  Args:
    config: resolved.
    workdir: of a trained run with an export named `sampling.name`.
    devices: devices to use; all by default.

  Raises:
    UserError: no checkpoint or no export.
  """
  devices = devices or jax.local_devices()
  path = open_workdir(workdir, config, create=False)
  checkpoints = Checkpoints(path)
  step, params = checkpoints.restore_params(
    builders.params_template(config), config.sampling.use_ema
  )
  checkpoints.close()
  loss = held_out_loss(config, params, devices)
  log.info("held-out loss %.5f", loss)
  evaluation = {
    "checkpoint_step": step,
    "weights": _weights(config),
    "held_out_loss": loss,
    "samples": sample_quality(config, step, path / "samples" / config.sampling.name),
  }
  write_json(path / "evaluation.json", evaluation)
  log.info("%s", path / "evaluation.json")
