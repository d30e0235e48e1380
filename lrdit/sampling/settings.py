"""The label rule and the fingerprint of a config's samples."""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from lrdit.sampling.sampler import LabelRule, Sampler, balanced_labels, random_labels


def make_label_rule(config: ConfigDict) -> LabelRule | None:
  """Return the rule of `sampling.labels`, or None for an unconditional model."""
  s, classes = config.sampling, config.data.num_classes
  if not classes:
    return None
  if s.labels == "balanced":
    return lambda index: balanced_labels(index, classes)
  if s.labels == "random":
    return lambda index: random_labels(s.seed, index, classes)
  return lambda index: np.full(len(index), int(s.labels), np.int32)


def make_settings(
  config: ConfigDict, sampler: Sampler, step: int, checkpoint_digest: str, vae_digest: str
) -> dict[str, Any]:
  """Return the settings that, with its index, determine a sample, as JSON.

  The digests are `checkpoints.digest` of the weights, and that of the decoding VAE or "".
  """
  s, plan = config.sampling, sampler.model.plan
  visited = [(bucket, end - first) for bucket, first, end in sampler.segments]
  return {
    "checkpoint_step": step,
    "checkpoint_digest": checkpoint_digest,
    "weights": "ema" if s.use_ema else "raw",
    "method": config.method,
    "solver": s.solver,
    "num_steps": s.num_steps,
    "first_timestep": int(sampler.table.t[0]),
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
