"""Second moments of the inputs of a model's layers on noisy training data.

Axes: N examples, B batch, D_in width.
"""

from collections.abc import Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from lrdit.data import pipeline
from lrdit.data.source import Source
from lrdit.diffusion import process
from lrdit.model.low_rank import Dense, RankSelection
from lrdit.train.loss import Objective


def input_moments(
  objective: Objective,
  params: Any,
  source: Source,
  names: Collection[str],
  timesteps: Int[np.ndarray, " t"],
  num_examples: int,
  batch_size: int,
  seed: int,
) -> dict[str, Float[np.ndarray, "D_in D_in"]]:
  """Return E[x x^T] over the inputs x of the named dense layers, float32.

  The examples are the first N of a shuffled order, in whole batches of B, with timesteps spread
  over `timesteps`. `objective` has the dense model of `params`; it drops labels as in training.
  """

  @jax.jit
  def batch_moments(params, x_t, t, y):
    found = {}

    def note(call, args, kwargs, context):
      name = "/".join(context.module.path)
      if isinstance(context.module, Dense) and name in names:
        x = args[0].reshape(-1, args[0].shape[-1]).astype(jnp.float32)
        found[name] = x.T @ x / len(x)
      return call(*args, **kwargs)

    with nn.intercept_methods(note):
      objective.model.apply({"params": params}, x_t, t, y, RankSelection())
    return found

  rng, count = np.random.default_rng([seed, int(timesteps[0])]), -(-num_examples // batch_size)
  total: Any = None
  for number in range(count):
    batch = noisy_batch(objective, source, timesteps, number, batch_size, rng, seed)
    moments = batch_moments(params, *batch)
    total = moments if total is None else jax.tree.map(jnp.add, total, moments)
  return {name: np.asarray(value) / count for name, value in total.items()}


def noisy_batch(
  objective: Objective,
  source: Source,
  timesteps: Int[np.ndarray, " t"],
  number: int,
  batch_size: int,
  rng: np.random.Generator,
  seed: int,
) -> tuple[Float[np.ndarray, "B H W C"], Int[np.ndarray, " B"], Int[np.ndarray, " B"] | None]:
  """Return the noisy images, timesteps and labels of one batch; labels None without classes."""
  slots = np.arange(batch_size)
  index = pipeline.example_index(seed, number * batch_size + slots, len(source))
  batch = source.gather(index, np.zeros(batch_size, bool))
  x_0 = batch["image"]
  if "std" in batch:
    x_0 = x_0 + batch["std"] * rng.standard_normal(x_0.shape, np.float32)
  share = (rng.permutation(batch_size) + rng.random(batch_size)) / batch_size
  t = timesteps[np.minimum((share * len(timesteps)).astype(int), len(timesteps) - 1)]
  alpha_bar = objective.alphas_cumprod[t][:, None, None, None]
  signal, noise = (np.asarray(x**0.5, np.float32) for x in (alpha_bar, 1 - alpha_bar))
  eps = rng.standard_normal(x_0.shape, np.float32)
  num_classes, y = objective.model.shape.num_classes, None
  if num_classes:
    drop = rng.random(batch_size) < objective.class_dropout_rate
    y = np.where(drop, num_classes, batch["label"]).astype(np.int32)
  return process.q_sample(x_0, eps, signal, noise), t.astype(np.int32), y
