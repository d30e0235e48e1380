"""The training loss: a batch's noise and timesteps, and the loss of each example.

All randomness of an example comes from (seed, step, global example index), so a run does not
depend on the number of devices.

Axes: B global batch, b local batch, H W image, C channels, G timestep groups.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from lrdit.diffusion import process
from lrdit.model.dit import DiT
from lrdit.model.low_rank import RankSelection, apply_by_group
from lrdit.rank.strata import Strata, rank_groups, stratified_timesteps
from lrdit.runtime import parallel


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
  """The model, its diffusion process, and how a batch samples them."""

  model: DiT
  alphas_cumprod: Float[np.ndarray, " T"]  # float64
  prediction: str  # one of `process.PREDICTIONS`
  loss_weighting: str  # one of `process.LOSS_WEIGHTINGS`
  min_snr_gamma: float  # constant of the weighting `min_snr`
  class_dropout_rate: float  # probability of replacing a label by the null class
  compute: str  # one of `strata.COMPUTES`
  strata: Strata  # timesteps of the global batch's slots
  num_devices: int  # number of devices that share the batch
  microbatches: int = 1  # parts of a device's share whose gradients are computed one by one
  variance_floor: str = "beta"  # one of `process.VARIANCE_FLOORS`
  teacher: DiT | None = None  # the dense model of distillation
  distillation: float = 0.0  # weight of the squared distance from its output

  @property
  def num_shares(self) -> int:
    """The number of equal parts of the global batch that are each computed at once."""
    return self.num_devices * self.microbatches

  @property
  def rank_groups(self) -> tuple[tuple[int, int], ...]:
    """The static (examples, rank bucket) of each group of a share."""
    return rank_groups(self.model.plan, self.compute, self.strata, self.num_shares)

  def without_augmentation(self) -> "Objective":
    """Return the objective for evaluation, which keeps every label and splits no batch."""
    return dataclasses.replace(self, class_dropout_rate=0.0, microbatches=1)

  def with_strata(self, strata: Strata) -> "Objective":
    """Return the objective on a stage's timesteps, for the same global batch."""
    return dataclasses.replace(self, strata=strata)


@dataclasses.dataclass(frozen=True)
class StepNoise:
  """The random choices of one step for a local batch; float32 and int32."""

  t: Int[Array, " b"]  # timesteps in [0, T)
  eps: Float[Array, "b H W C"]  # standard normal
  drop: Bool[Array, " b"]  # whether the null class replaces the label
  posterior_noise: Float[Array, "b H W C"]  # standard normal, for latents


def draw_step_noise(
  key: Key[Array, ""],
  index: Int[Array, " b"],
  image_shape: tuple[int, int, int],
  objective: Objective,
) -> StepNoise:
  """Sample each example's noise from the step's key and the global `index` in [0, B) alone."""
  keys = jax.vmap(lambda j: jax.random.split(jax.random.fold_in(key, j), 4))(index)
  uniform = jax.vmap(jax.random.uniform)
  normal = jax.vmap(lambda k: jax.random.normal(k, image_shape))
  return StepNoise(
    t=stratified_timesteps(uniform(keys[:, 0]), index, objective.strata),
    eps=normal(keys[:, 1]),
    drop=uniform(keys[:, 2]) < objective.class_dropout_rate,
    posterior_noise=normal(keys[:, 3]),
  )


def predict(
  objective: Objective,
  params: Any,
  x_t: Float[Array, "b H W C"],
  t: Int[Array, " b"],
  y: Int[Array, " b"] | None,
) -> Float[Array, "b H W C_out"]:
  """Return the model's output at each example's rank, group by group."""

  def apply(selection: RankSelection, *inputs: Any) -> Float[Array, "b H W C_out"]:
    return objective.model.apply({"params": params}, *inputs, selection)

  plan = objective.model.plan
  bucket = None if plan.num_buckets == 1 else jnp.asarray(plan.bucket_of_timestep)[t]
  return apply_by_group(apply, objective.rank_groups, bucket, x_t, t, y)


def example_losses(
  params: Any,
  objective: Objective,
  x_0: Float[Array, "b H W C"],
  y: Int[Array, " b"] | None,
  noise: StepNoise,
  teacher_params: Any = None,
) -> Float[Array, " b"]:
  """Return the weighted loss of each example: squared error, plus L_vlb with learn_sigma.

  With `teacher_params`, the squared distance from the teacher's output is added to the error.

  The hybrid objective is eq. 16 of Nichol and Dhariwal 2021, with the bound rescaled by T / 1000
  as in that paper's code.

  Args:
    x_0: clean images in [-1, 1].
    y: labels with the null class applied, or None.
  """
  alphas_cumprod, shape = objective.alphas_cumprod, objective.model.shape

  def at_t(values):
    return jnp.asarray(values, jnp.float32)[noise.t][:, None, None, None]

  signal, sigma = at_t(alphas_cumprod**0.5), at_t((1 - alphas_cumprod) ** 0.5)
  x_t = process.q_sample(x_0, noise.eps, signal, sigma)
  output = predict(objective, params, x_t, noise.t, y)
  prediction, coordinate = output[..., : shape.channels], output[..., shape.channels :]
  target = process.training_target(objective.prediction, x_0, noise.eps, signal, sigma)
  losses = jnp.square(prediction - target).mean(axis=(1, 2, 3))
  if teacher_params is not None:
    taught = objective.teacher.apply({"params": teacher_params}, x_t, noise.t, y, RankSelection())
    distance = jnp.square(output - taught).mean(axis=(1, 2, 3))
    losses = losses + objective.distillation * distance
  weights = process.loss_weights(
    objective.loss_weighting, objective.prediction, alphas_cumprod, objective.min_snr_gamma
  )
  losses = losses * at_t(weights)[:, 0, 0, 0]
  if not shape.learn_sigma:
    return losses
  # The bound trains the variance alone; `coordinate` in [-1, 1] interpolates its logarithm.
  predicted_x_0, _ = process.predict_x_0_eps(
    objective.prediction, jax.lax.stop_gradient(prediction), x_t, signal, sigma
  )
  q = process.posterior(alphas_cumprod, np.append(1.0, alphas_cumprod[:-1]))
  low, high = (at_t(bound) for bound in q.log_variance_range(objective.variance_floor))
  share = (coordinate + 1) / 2
  bound = process.variational_bound(
    true_mean=at_t(q.on_x_0) * x_0 + at_t(q.on_x_t) * x_t,
    log_true_variance=low,
    mean=at_t(q.on_x_0) * predicted_x_0 + at_t(q.on_x_t) * x_t,
    log_variance=share * high + (1 - share) * low,
    x_0=x_0,
    is_last=(noise.t == 0)[:, None, None, None],
  )
  return losses + bound * (len(alphas_cumprod) / 1000.0)


def batch_losses(
  params: Any,
  objective: Objective,
  key: Key[Array, ""],
  batch: dict[str, Array],
  microbatch: Int[Array, ""] | int = 0,
  teacher_params: Any = None,
) -> tuple[Float[Array, " b"], Int[Array, " b"]]:
  """Return the float32 losses and int32 timesteps of a microbatch of a device's share of a batch.

  Runs under an axis named `parallel.AXIS`.

  Args:
    key: key of the step.
    batch: "image" (b, H, W, C) float32 and "label" (b,) int32. With "std" (b, H, W, C), images
      are latent means and x_0 is sampled.
    microbatch: its number. Microbatches interleave their slots as devices do, so that all of them
      have the same static rank groups, and each counts as a device of its own.
    teacher_params: those of `objective.teacher`; None leaves distillation out.
  """
  x_0, y = batch["image"], batch["label"]
  share = microbatch * objective.num_devices + jax.lax.axis_index(parallel.AXIS)
  index = parallel.global_index(share, x_0.shape[0], objective.num_shares)
  noise = draw_step_noise(key, index, x_0.shape[1:], objective)
  if "std" in batch:
    x_0 = x_0 + batch["std"] * noise.posterior_noise
  num_classes = objective.model.shape.num_classes
  y = jnp.where(noise.drop, num_classes, y) if num_classes else None
  return example_losses(params, objective, x_0, y, noise, teacher_params), noise.t


def group_sums(
  losses: Float[Array, " b"],
  t: Int[Array, " b"],
  counts: Bool[Array, " b"],
  boundaries: tuple[int, ...],
) -> tuple[Float[Array, " G"], Int[Array, " G"]]:
  """Return the sum of losses and the number of examples of each timestep group.

  Examples whose `counts` is False are padding. Group i is [boundaries[i], boundaries[i + 1]).
  """
  edges = jnp.asarray(boundaries, jnp.int32)
  is_member = (t[:, None] >= edges[:-1]) & (t[:, None] < edges[1:]) & counts[:, None]
  return jnp.where(is_member, losses[:, None], 0.0).sum(0), is_member.sum(0, dtype=jnp.int32)
