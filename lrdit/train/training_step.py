"""The pure training and evaluation steps.

All randomness of an example is drawn from (seed, step, global example index),
so a run does not depend on how its batch is spread over devices.

Axes: B global batch, b local batch, H W image, C channels, G timestep groups.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from lrdit.diffusion import process
from lrdit.model.dit import DiT
from lrdit.model.low_rank import RankSelection
from lrdit.rank.strata import Strata, rank_groups, stratified_timesteps
from lrdit.runtime import parallel
from lrdit.runtime.parallel import AXIS
from lrdit.train.curriculum import Curriculum
from lrdit.train.optimizer import Schedule, update_ema
from lrdit.train.train_state import TrainState, WindowMetrics, first_non_finite, where_tree


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
  """What is trained: the model, its diffusion and how a batch is drawn.

  Attributes:
    model: the DiT with its rank plan.
    alphas_cumprod: (T,) float64.
    prediction: one of `diffusion.PREDICTIONS`.
    loss_weighting: one of `diffusion.LOSS_WEIGHTINGS`.
    min_snr_gamma: of the weighting `min_snr`.
    class_dropout_rate: probability of replacing a label by the null class.
    compute: one of `strata.COMPUTES`.
    strata: how the global batch B is spread over timesteps.
    num_devices: devices the batch is spread over.
  """

  model: DiT
  alphas_cumprod: Float[np.ndarray, " T"]
  prediction: str
  loss_weighting: str
  min_snr_gamma: float
  class_dropout_rate: float
  compute: str
  strata: Strata
  num_devices: int

  def without_augmentation(self) -> "Objective":
    """The same objective with every label kept, for evaluation."""
    return dataclasses.replace(self, class_dropout_rate=0.0)

  def with_strata(self, strata: Strata) -> "Objective":
    """The same objective on a stage's timesteps, for the same global batch."""
    return dataclasses.replace(self, strata=strata)


@dataclasses.dataclass(frozen=True)
class Draws:
  """The random choices for a local batch.

  Attributes:
    t: (b,) int32.
    eps: (b, H, W, C) float32 standard normal.
    drop: (b,) bool, label replaced by the null class.
    posterior_noise: (b, H, W, C) float32 standard normal, for latents.
  """

  t: Int[Array, " b"]
  eps: Float[Array, "b H W C"]
  drop: Bool[Array, " b"]
  posterior_noise: Float[Array, "b H W C"]


def draw(
  key: Key[Array, ""],
  index: Int[Array, " b"],
  image_shape: tuple[int, int, int],
  objective: Objective,
) -> Draws:
  """Draws per example, keyed by its global index alone.

  Args:
    key: key of the step.
    index: (b,) int32 global example index in [0, B).
    image_shape: (H, W, C).
    objective: for the strata and the dropout rate.
  """
  keys = jax.vmap(lambda j: jax.random.split(jax.random.fold_in(key, j), 4))(index)
  uniform = jax.vmap(jax.random.uniform)
  normal = jax.vmap(lambda k: jax.random.normal(k, image_shape))
  return Draws(
    t=stratified_timesteps(uniform(keys[:, 0]), index, objective.strata),
    eps=normal(keys[:, 1]),
    drop=uniform(keys[:, 2]) < objective.class_dropout_rate,
    posterior_noise=normal(keys[:, 3]),
  )


def select_ranks(objective: Objective, t: Int[Array, " b"]) -> RankSelection:
  """Static groups, and a bucket per example where the plan has several."""
  plan = objective.model.plan
  groups = rank_groups(plan, objective.compute, objective.strata, objective.num_devices)
  if plan.num_buckets == 1:
    return RankSelection(groups)
  return RankSelection(groups, jnp.asarray(plan.bucket_of_timestep)[t])


def example_losses(
  params: Any,
  objective: Objective,
  x_0: Float[Array, "b H W C"],
  y: Int[Array, " b"] | None,
  draws: Draws,
) -> Float[Array, " b"]:
  """Weighted loss of each example: squared error, plus L_vlb with learn_sigma.

  The hybrid objective is Nichol and Dhariwal 2021, eq. 16, with the
  bound rescaled by T / 1000 as in that paper's code.

  Args:
    params: model parameters.
    objective: what is trained.
    x_0: (b, H, W, C) clean images in [-1, 1].
    y: (b,) labels with the null class applied, or None.
    draws: the batch's random choices.

  Returns:
    (b,) float32.
  """
  alphas_cumprod = objective.alphas_cumprod
  shape = objective.model.shape

  def at_t(values):
    return jnp.asarray(values, jnp.float32)[draws.t][:, None, None, None]

  signal, noise = at_t(alphas_cumprod**0.5), at_t((1 - alphas_cumprod) ** 0.5)
  x_t = process.q_sample(x_0, draws.eps, signal, noise)
  selection = select_ranks(objective, draws.t)
  output = objective.model.apply({"params": params}, x_t, draws.t, y, selection)
  prediction, coordinate = output[..., : shape.channels], output[..., shape.channels :]
  target = process.training_target(objective.prediction, x_0, draws.eps, signal, noise)
  losses = jnp.square(prediction - target).mean(axis=(1, 2, 3))
  weights = process.loss_weights(
    objective.loss_weighting, objective.prediction, alphas_cumprod, objective.min_snr_gamma
  )
  losses = losses * at_t(weights)[:, 0, 0, 0]
  if not shape.learn_sigma:
    return losses
  predicted_x_0, _ = process.predict_x_0_eps(
    objective.prediction, jax.lax.stop_gradient(prediction), x_t, signal, noise
  )
  q = process.posterior(alphas_cumprod, np.append(1.0, alphas_cumprod[:-1]))
  low, high = (at_t(bound) for bound in q.log_variance_range)
  share = (coordinate + 1) / 2
  bound = process.variational_bound(
    true_mean=at_t(q.on_x_0) * x_0 + at_t(q.on_x_t) * x_t,
    log_true_variance=low,
    mean=at_t(q.on_x_0) * predicted_x_0 + at_t(q.on_x_t) * x_t,
    log_variance=share * high + (1 - share) * low,
    x_0=x_0,
    is_last=(draws.t == 0)[:, None, None, None],
  )
  return losses + bound * (len(alphas_cumprod) / 1000.0)


def batch_losses(
  params: Any, objective: Objective, key: Key[Array, ""], batch: dict[str, Array]
) -> tuple[Float[Array, " b"], Int[Array, " b"]]:
  """Losses and timesteps of a device's share of a global batch under training's draws.

  Args:
    params: model parameters.
    objective: what is trained.
    key: key of the step.
    batch: "image" (b, H, W, C) float32 and "label" (b,) int32; where the images
      are the means of latents, also "std" (b, H, W, C), and x_0 is drawn.

  Returns:
    (b,) float32 and (b,) int32. Runs under an axis named `AXIS`.
  """
  x_0, y = batch["image"], batch["label"]
  index = parallel.global_index(jax.lax.axis_index(AXIS), x_0.shape[0], objective.num_devices)
  draws = draw(key, index, x_0.shape[1:], objective)
  if "std" in batch:
    x_0 = x_0 + batch["std"] * draws.posterior_noise
  num_classes = objective.model.shape.num_classes
  y = jnp.where(draws.drop, num_classes, y) if num_classes else None
  return example_losses(params, objective, x_0, y, draws), draws.t


def group_sums(
  losses: Float[Array, " b"],
  t: Int[Array, " b"],
  counts: Bool[Array, " b"],
  boundaries: tuple[int, ...],
) -> tuple[Float[Array, " G"], Int[Array, " G"]]:
  """Sum of losses and number of examples of each timestep group.

  Args:
    losses: (b,) float32.
    t: (b,) int32.
    counts: (b,) bool, False for padding.
    boundaries: (G + 1,) rising; group i is [boundaries[i], boundaries[i + 1]).
  """
  edges = jnp.asarray(boundaries, jnp.int32)
  is_member = (t[:, None] >= edges[:-1]) & (t[:, None] < edges[1:]) & counts[:, None]
  return jnp.where(is_member, losses[:, None], 0.0).sum(0), is_member.sum(0, dtype=jnp.int32)


def mean_gradient(
  params: Any,
  objective: Objective,
  key: Key[Array, ""],
  batch: dict[str, Array],
  boundaries: tuple[int, ...],
) -> tuple[Float[Array, ""], tuple[Float[Array, " G"], Int[Array, " G"]], Any, Bool[Array, ""]]:
  """Mean loss over the global batch, `group_sums` over it, and the mean's gradient.

  Args:
    params, objective, key, batch: as in `batch_losses`.
    boundaries: as in `group_sums`.

  Returns:
    loss, group sums, gradient, and whether the global batch is finite.
  """

  def mean_loss(params):
    losses, t = batch_losses(params, objective, key, batch)
    return losses.mean(), group_sums(losses, t, jnp.ones_like(t, bool), boundaries)

  (loss, groups), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
  loss, grads = jax.lax.pmean((loss, grads), AXIS)
  is_bad = ~jnp.stack([jnp.isfinite(values).all() for values in batch.values()]).all()
  groups, num_bad = jax.lax.psum((groups, is_bad.astype(jnp.int32)), AXIS)
  return loss, groups, grads, num_bad == 0


def train_step(
  state: TrainState,
  batch: dict[str, Array],
  key: Key[Array, ""],
  *,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  learning_rate: Schedule,
  curriculum: Curriculum,
  stage: int,
  ema_decay: float,
  log_every_steps: int,
) -> tuple[TrainState, WindowMetrics]:
  """One update. Runs under pmap with the axis `AXIS`.

  Args:
    state: replicated state.
    batch: this device's share, as in `batch_losses`.
    key: the run's key, the same on every device.
    objective: what is trained, on any strata.
    optimizer: the optax chain, for a learning rate of 1.
    learning_rate: of (step, start of the warm-up).
    curriculum: the stages of the run.
    stage: the state's own `stage.number`; static, as are the stage's strata.
    ema_decay: decay of the average, in [0, 1).
    log_every_steps: steps whose metrics are averaged.

  Returns:
    The state after the update, and its window once more, which can be read after the
    state has been donated to the next step. Both are equal on every device.
  """
  step_key = jax.random.fold_in(key, state.step)
  objective = objective.with_strata(curriculum.stages[stage].strata)
  loss, (group_loss, group_count), grads, is_batch_finite = mean_gradient(
    state.params, objective, step_key, batch, curriculum.boundaries
  )
  warmup_start = state.stage.first_step if curriculum.restart_optimizer else 0
  rate = learning_rate(state.step, warmup_start)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  updates = jax.tree.map(lambda update: rate * update, updates)
  params = optax.apply_updates(state.params, updates)
  # A sum of squares is finite only if every element is: the new parameters are
  # checked as well, so that no checkpoint can hold anything else.
  grad_norm, update_norm = optax.tree.norm(grads), optax.tree.norm(updates)
  finite = (jnp.isfinite(value) for value in (loss, grad_norm, update_norm))
  window = state.window.add(
    loss=loss,
    grad_norm=grad_norm,
    learning_rate=rate,
    group_loss=group_loss,
    group_count=group_count,
    non_finite=first_non_finite(is_batch_finite, *finite),
    step=state.step + 1,
    log_every_steps=log_every_steps,
  )
  own = slice(*curriculum.stages[stage].groups)
  progress = state.stage.add(
    group_loss[own].sum(), group_count[own].sum(), state.step + 1, curriculum
  )
  restart = (progress.number != stage) & curriculum.restart_optimizer
  new_state = TrainState(
    step=state.step + 1,
    params=params,
    ema_params=update_ema(state.ema_params, params, state.step, ema_decay),
    opt_state=where_tree(restart, optimizer.init(params), opt_state),
    window=window,
    stage=progress,
  )
  return new_state, window


def eval_step(
  params: Any,
  batch: dict[str, Array],
  key: Key[Array, ""],
  *,
  objective: Objective,
  boundaries: tuple[int, ...],
) -> tuple[Float[Array, " G"], Int[Array, " G"]]:
  """Sum of held-out losses and number of examples of each timestep group, over all devices.

  Args:
    params: replicated parameters.
    batch: as in `train_step`, plus "weight" (b,) float32, 0 for padding.
    key: fixes noise and timesteps; the same key gives the same figures.
    objective: as trained, without label dropout and flips.
    boundaries: as in `group_sums`.

  Returns:
    (G,) float32 and (G,) int32, equal on every device.
  """
  losses, t = batch_losses(params, objective, key, batch)
  return jax.lax.psum(group_sums(losses, t, batch["weight"] > 0, boundaries), AXIS)
