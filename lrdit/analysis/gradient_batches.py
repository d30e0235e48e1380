"""The batches whose gradients are analyzed: one set of examples under the data and three nulls.

All groups and conditions share N examples, their order and their noise eps. They differ in the
timesteps and, in the last two conditions, in the target:

data: example j's timestep is sampled from one of N equal parts of the group.
shuffled: the G timesteps of each example are dealt out to the groups anew, so a group's timesteps
  are spread over [0, T). What still differs between groups is sampling noise.
noise: as data, but the target is noise that is independent of the input. In a trained model the
  noise averages out over the batch, and mostly the gradient towards an output of zero is left: it
  still knows what the model has learned.
residual: as data, but each example's error, output minus target, is replaced by normal noise whose
  standard deviation is the error's root mean square. The rank that is left comes from the batch
  size, the activations and the architecture alone.

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

# Keep the random numbers of different uses apart from each other.
_IMAGE_STREAM, _TIMESTEP_STREAM, _SHUFFLE_STREAM = range(3)


@dataclasses.dataclass(frozen=True)
class Examples:
  """What all groups and conditions share.

  Attributes:
    x_0: (N, H, W, C) float32; latents are sampled from their distribution once.
    y: (N,) int32 labels, or None for an unconditional model.
    eps: (N, H, W, C) float32 standard normal.
    target_noise: (N, H, W, C) float32 standard normal, for "noise" and "residual".
  """

  x_0: Float[np.ndarray, "N H W C"]
  y: Int[np.ndarray, " N"] | None
  eps: Float[np.ndarray, "N H W C"]
  target_noise: Float[np.ndarray, "N H W C"]


def sample_examples(source: Source, num_examples: int, num_classes: int, seed: int) -> Examples:
  """Return the first examples of a shuffled order, with their noise.

  The first b examples are the same whatever `num_examples`.

  Args:
    source: the training split.
    num_examples: N.
    num_classes: of the model; 0 if it is unconditional.
    seed: of order and noise.

  Raises:
    UserError: the source has fewer examples.
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
  """Return a permutation of [0, N) of which every beginning is spread over [0, N).

  It ranks van der Corput's sequence in base 2, which is bit reversal where N is a power of 2.
  """
  numbers, reversed_bits = np.arange(num_examples), np.zeros(num_examples)
  for place in range(num_examples.bit_length()):
    reversed_bits += (numbers >> place & 1) / 2 ** (place + 1)
  return np.argsort(np.argsort(reversed_bits))


def group_timesteps(
  boundaries: Sequence[int], num_examples: int, seed: int
) -> Int[np.ndarray, "G N"]:
  """Return each example's timestep in each group, stratified as training's timesteps are.

  Args:
    boundaries: (G + 1,) ascending; group i is [boundaries[i], boundaries[i + 1]).
    num_examples: N.
    seed: of the timesteps within their strata.

  Returns:
    (G, N) int64; the timesteps of the first b examples are spread over the group for every b.
  """
  edges = np.asarray(boundaries, np.int64)[:, None]
  uniform = np.random.default_rng([seed, _TIMESTEP_STREAM]).random((len(edges) - 1, num_examples))
  share = (spread_order(num_examples) + uniform) / num_examples
  t = edges[:-1] + (share * np.diff(edges, axis=0)).astype(np.int64)
  return np.minimum(t, edges[1:] - 1)


def shuffle_timesteps(t: Int[np.ndarray, "G N"], seed: int) -> Int[np.ndarray, "G N"]:
  """Deal out each example's timesteps to the groups at random.

  Each group gets every example once, so groups differ in their timesteps alone.
  """
  return np.random.default_rng([seed, _SHUFFLE_STREAM]).permuted(t, axis=0)


def condition_batch(
  condition: str, objective: Objective, examples: Examples, t: Int[np.ndarray, " N"]
) -> dict[str, np.ndarray]:
  """Return a group's inputs and targets, as `example_losses` of training has them.

  Args:
    condition: one of `CONDITIONS`.
    objective: of the run.
    examples: shared by all groups.
    t: (N,) of the group, a row of `group_timesteps`, or of `shuffle_timesteps` for "shuffled".

  Returns:
    "x_t" and "target" (N, H, W, C) float32, "t" (N,) int32, "weight" (N,) float32 of the squared
    errors; of a conditional model "y" (N,) int32, and for "residual" "residual_noise" (N, H, W, C).
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
    batch["target"] = _noise_target(prediction, examples, signal, noise)
  if condition == "residual":
    batch["residual_noise"] = examples.target_noise
  return batch


def _noise_target(
  prediction: str,
  examples: Examples,
  signal: Float[np.ndarray, "N 1 1 1"],
  noise: Float[np.ndarray, "N 1 1 1"],
) -> Float[np.ndarray, "N H W C"]:
  """Return noise of the variance that the true target has at each timestep.

  An example's noise is the same in all groups, as its eps is.
  """
  spread, zero, one = np.float32(examples.x_0.std()), np.float32(0), np.float32(1)
  # The target is linear in x_0 and eps, which are independent: their variances add up.
  from_x_0, from_eps = (
    process.training_target(prediction, x_0, eps, signal, noise)
    for x_0, eps in ((spread, zero), (zero, one))
  )
  return examples.target_noise * np.hypot(from_x_0, from_eps)
