"""Measures a trained model: held-out loss, and the quality of exported samples."""

import functools
import logging
import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lrdit import builders, input_pipeline, metrics, parallel, training_step
from lrdit.checkpoints import Checkpoints
from lrdit.errors import UserError
from lrdit.sample import load_export
from lrdit.train import mean_eval_loss
from lrdit.workdir import open_workdir, write_json

log = logging.getLogger("lrdit")


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


def sample_quality(config: ConfigDict, directory: pathlib.Path) -> dict[str, float]:
  """Figures of an export against the real images, on their raw pixels.

  The reference of the Frechet distance is the whole dataset; the classifier is
  fitted on the training split, and its accuracy on the held-out one given too.

  Args:
    config: resolved.
    directory: of the export.
  """
  samples, labels, _ = load_export(directory)
  train = builders.make_source(config, "train")
  held_out = builders.make_source(config, "eval")
  images = samples[..., : config.data.num_channels].astype(np.float64) / 127.5 - 1.0

  def statistics(x):
    return metrics.gaussian_statistics(x.reshape(len(x), -1))

  real = np.concatenate([train.images, held_out.images])
  distance = metrics.frechet_distance(statistics(images), statistics(real))
  figures = {"pixel_frechet_distance": distance}
  if labels is not None:
    classifier = metrics.fit_svm(train.images, train.labels)
    accuracy = functools.partial(metrics.recognition_accuracy, classifier)
    figures["svm_recognition_accuracy"] = accuracy(images, labels)
    figures["svm_recognition_accuracy_of_held_out_images"] = accuracy(
      held_out.images, held_out.labels
    )
  return figures


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
  directory = path / "samples" / config.sampling.name
  if not (directory / "metadata.json").exists():
    raise UserError(f"no samples under {directory}: run the same command with --mode=sample first")
  checkpoints = Checkpoints(path)
  step, params = checkpoints.restore_params(
    builders.params_template(config), config.sampling.use_ema
  )
  checkpoints.close()
  evaluation = {
    "checkpoint_step": step,
    "weights": "ema" if config.sampling.use_ema else "raw",
    "held_out_loss": held_out_loss(config, params, devices),
    "samples": load_export(directory)[2] | sample_quality(config, directory),
  }
  write_json(path / "evaluation.json", evaluation)
  log.info("held-out loss %.5f", evaluation["held_out_loss"])
  for name, value in evaluation["samples"].items():
    if name.startswith(("pixel_", "svm_")):
      log.info("%s %.4f", name, value)
  log.info("%s", path / "evaluation.json")
