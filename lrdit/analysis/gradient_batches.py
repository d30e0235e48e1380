"""Batches for the gradient analysis: one set of examples under the data and three nulls.

All groups and conditions share N examples, their order and their noise eps. They differ in their
timesteps and, in the last two conditions, in their targets:

data: each example's timestep is sampled from its own one of N equal parts of the group.
shuffled: each example's G timesteps are permuted over the groups, so every group covers [0, T)
  and groups differ only by sampling noise.
noise: as data, but the target is noise independent of the input. In a trained model this noise
  averages out over the batch and leaves mostly the gradient towards an output of zero, which
  still depends on what the model has learned.
residual: as data, but normal noise of the same root mean square replaces each example's residual,
  output minus target. The remaining rank comes only from the batch size, the activations and the
  architecture.

Axes: N examples, H W image, C channels, G timestep groups, T timesteps.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from lrdit.data import pipeline
from lrdit.data.source import Source
from lrdit.diffusion import process
from lrdit.runtime.errors import UserError
from lrdit.train.loss import Objective

CONDITIONS = ("data", "shuffled", "noise", "residual")

# Independent random streams.
_IMAGE_STREAM, _TIMESTEP_STREAM, _SHUFFLE_STREAM = range(3)


@dataclasses.dataclass(frozen=True)
class Examples:
  """The examples that all groups and conditions share; arrays are float32, labels int32."""

  x_0: Float[np.ndarray, "N H W C"]  # latents are sampled from their distribution once
  y: Int[np.ndarray, " N"] | None  # None for an unconditional model
  eps: Float[np.ndarray, "N H W C"]  # standard normal
  target_noise: Float[np.ndarray, "N H W C"]  # standard normal, for "noise" and "residual"


def sample_examples(source: Source, num_examples: int, num_classes: int, seed: int) -> Examples:
  """Return the first N examples of a shuffled order, with their noise.

  The first b examples do not depend on N. `num_classes` is 0 for an unconditional model.

  Raises:
    UserError: the source has fewer than N examples.
  """
  if num_examples > len(source):
    raise UserError(
      f"gradients of batches of {num_examples} need as many examples, and the training split has "
      f"{len(source)}: use smaller batch sizes"
    )
  index = pipeline.example_index(seed, np.arange(num_examples), len(source))
  batch = source.gather(index, np.zeros(num_examples, bool))
  rng = np.random.default_rng([seed, _IMAGE_STREAM])
  shape = (num_examples, 3, *batch["image"].shape[1:])
  eps, target_noise, posterior_noise = np.moveaxis(rng.standard_normal(shape, np.float32), 1, 0)
  x_0 = batch["image"]
  if "std" in batch:
    x_0 = x_0 + batch["std"] * posterior_noise
  return Examples(x_0, batch["label"] if num_classes else None, eps, target_noise)


def spread_order(num_examples: int) -> Int[np.ndarray, " N"]:
  """Return a permutation of [0, N), every prefix of which is spread (van der Corput, base 2)."""
  numbers, reversed_bits = np.arange(num_examples), np.zeros(num_examples)
  for place in range(num_examples.bit_length()):
    reversed_bits += (numbers >> place & 1) / 2 ** (place + 1)
  return np.argsort(np.argsort(reversed_bits))


def group_timesteps(
  boundaries: Sequence[int], num_examples: int, seed: int
) -> Int[np.ndarray, "G N"]:
  """Return each example's int64 timestep in each group, stratified as in training.

  Group i is [boundaries[i], boundaries[i + 1]). For every b, the timesteps of the first b examples
  are spread over the group.
  """
  edges = np.asarray(boundaries, np.int64)[:, None]
  uniform = np.random.default_rng([seed, _TIMESTEP_STREAM]).random((len(edges) - 1, num_examples))
  share = (spread_order(num_examples) + uniform) / num_examples
  t = edges[:-1] + (share * np.diff(edges, axis=0)).astype(np.int64)
  return np.minimum(t, edges[1:] - 1)


def shuffle_timesteps(t: Int[np.ndarray, "G N"], seed: int) -> Int[np.ndarray, "G N"]:
  """Permute each example's timesteps over the groups, so that each group keeps every example."""
  return np.random.default_rng([seed, _SHUFFLE_STREAM]).permuted(t, axis=0)


def condition_batch(
  condition: str, objective: Objective, examples: Examples, t: Int[np.ndarray, " N"]
) -> dict[str, np.ndarray]:
  """Return a group's inputs and targets, as in training's `example_losses`.

  `t` is the group's row of `group_timesteps`, or of `shuffle_timesteps` for "shuffled". The result
  has "x_t" and "target" (N, H, W, C) float32, "t" (N,) int32, and "weight" (N,) float32 for the
  squared errors; also "y" (N,) int32 for a conditional model, and "residual_noise" for "residual".
  """
  alphas_cumprod, prediction = objective.alphas_cumprod, objective.prediction

  def at_t(values: Float[np.ndarray, " T"]) -> Float[np.ndarray, "N 1 1 1"]:
    return values.astype(np.float32)[t][:, None, None, None]

  signal, noise = at_t(alphas_cumprod**0.5), at_t((1 - alphas_cumprod) ** 0.5)
  weights = process.loss_weights(
    objective.loss_weighting, prediction, alphas_cumprod, objective.min_snr_gamma
  )
  batch = {
    "x_t": process.q_sample(examples.x_0, examples.eps, signal, noise),
    "t": t.astype(np.int32),
    "target": process.training_target(prediction, examples.x_0, examples.eps, signal, noise),
    "weight": weights.astype(np.float32)[t],
  }
  if examples.y is not None:
    batch["y"] = examples.y
  if condition == "noise":
    # The target is linear in x_0 and eps. They are independent, so their variances add up.
    spread, zero, one = np.float32(examples.x_0.std()), np.float32(0), np.float32(1)
    from_x_0 = process.training_target(prediction, spread, zero, signal, noise)
    from_eps = process.training_target(prediction, zero, one, signal, noise)
    batch["target"] = examples.target_noise * np.hypot(from_x_0, from_eps)
  if condition == "residual":
    batch["residual_noise"] = examples.target_noise
  return batch
