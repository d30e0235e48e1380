"""Exports samples of a trained model for evaluation by any tool."""

import logging
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lrdit import builders, checkpoints, parallel, sampler
from lrdit.export import ExportWriter
from lrdit.progress import make_bar
from lrdit.workdir import open_workdir, read_data

log = logging.getLogger("lrdit")


def make_label_rule(config: ConfigDict) -> sampler.LabelRule | None:
  """(B,) sample indices to (B,) int32 labels; None for an unconditional model."""
  s, classes = config.sampling, config.data.num_classes
  if not classes:
    return None
  if s.labels == "balanced":
    return lambda index: sampler.balanced_labels(index, classes)
  if s.labels == "random":
    return lambda index: sampler.random_labels(s.seed, index, classes)
  return lambda index: np.full(len(index), int(s.labels), np.int32)


def make_settings(
  config: ConfigDict, drawn: sampler.Sampler, step: int, params: Any, vae_digest: str
) -> dict[str, Any]:
  """All that defines a sample beside its index; a figure measured is quoted with it.

  Args:
    config: resolved.
    drawn: what draws the samples.
    step: of the checkpoint.
    params: its weights, on the host.
    vae_digest: of the VAE that decodes; "" for pixels.
  """
  s, plan = config.sampling, drawn.model.plan
  visited = [(bucket, end - first) for bucket, first, end in drawn.segments]
  return {
    "checkpoint_step": step,
    "checkpoint_digest": checkpoints.digest(params),
    "weights": "ema" if s.use_ema else "raw",
    "method": config.method,
    "solver": s.solver,
    "num_steps": s.num_steps,
    "eta": s.eta,
    "guidance_scale": s.guidance_scale,
    "clip_x_0": s.clip_x_0,
    "seed": s.seed,
    "labels": s.labels if config.data.num_classes else None,
    "dtype": config.model.dtype,
    "prediction": config.diffusion.prediction,
    "noise_schedule": config.diffusion.noise_schedule,
    "num_train_timesteps": config.diffusion.num_train_timesteps,
    "rank_table": {name: list(ranks.active) for name, ranks in plan.layers},
    "solver_steps_per_bucket": [
      sum(n for b, n in visited if b == bucket) for bucket in range(plan.num_buckets)
    ],
    "vae_digest": vae_digest or None,
  }


def sample(config: ConfigDict, workdir: str, devices: parallel.Devices | None = None) -> None:
  """Runs `--mode=sample`: exactly `sampling.num_samples` images.

  An export that was stopped goes on where it was; a finished one is left alone.

  Args:
    config: resolved.
    workdir: of a trained run.
    devices: devices to sample on; all by default.

  Raises:
    UserError: no checkpoint, another model's workdir, a full disk, and the like.
  """
  devices, s = devices or jax.local_devices(), config.sampling
  drawn = builders.make_sampler(config, devices)
  path = open_workdir(workdir, config, create=False)
  restored = checkpoints.Checkpoints(path)
  step, params = restored.restore_params(builders.params_template(config), s.use_ema)
  restored.close()
  vae_digest = read_data(path)["train"]["vae"] if config.vae.downsample_factor else ""
  to_pixels = builders.make_to_pixels(config, devices, vae_digest)
  label_rule = make_label_rule(config)
  with ExportWriter(
    path / "samples" / s.name,
    settings=make_settings(config, drawn, step, params, vae_digest),
    software={"backend": jax.default_backend(), "jax": jax.__version__},
    num_samples=s.num_samples,
    image_size=config.data.image_size,
    batch_size=s.batch_size,
    png_files=s.png_files,
  ) as writer:
    if writer.is_finished:
      log.info("%s: all %d samples are there", writer.directory, s.num_samples)
      return
    if writer.num_done:
      log.info(
        "%s: going on from %d of %d samples", writer.directory, writer.num_done, s.num_samples
      )
    with make_bar(s.num_samples, writer.num_done, "image") as bar:
      for batch in drawn.sample(params, label_rule, s.num_samples, writer.num_done):
        writer.append(to_pixels(batch))
        bar.update(len(batch))
    machine = {"batch_size": s.batch_size, "num_devices": len(devices)}
    metadata = writer.finish(label_rule, machine)
  log.info(
    "%d samples of step %d in %.1f s: %s",
    s.num_samples,
    step,
    metadata["wall_clock_seconds"],
    writer.directory,
  )
