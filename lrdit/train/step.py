"""The pure training and evaluation steps, which run under pmap with the axis `parallel.AXIS`.

Axes: b local batch, G timestep groups.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from lrdit.runtime.parallel import AXIS
from lrdit.train.curriculum import Curriculum
from lrdit.train.loss import Objective, batch_losses, group_sums
from lrdit.train.optimizer import Schedule, projection_loss, update_ema
from lrdit.train.regularizers import Weights, add_penalties
from lrdit.train.state import TrainState, WindowMetrics

PROJECTION_LOSS = "projection_loss"  # in the window's `extra` if the optimizer is galore


def mean_gradient(
  params: Any,
  objective: Objective,
  key: Key[Array, ""],
  batch: dict[str, Array],
  boundaries: tuple[int, ...],
  teacher_params: Any = None,
) -> tuple[Float[Array, ""], tuple[Float[Array, " G"], Int[Array, " G"]], Any, Bool[Array, ""]]:
  """Return the loss, `group_sums`, gradient and finiteness of the global batch.

  The arguments are those of `batch_losses` and `group_sums`.
  """

  def mean_loss(params, part, microbatch):
    losses, t = batch_losses(params, objective, key, part, microbatch, teacher_params)
    return losses.mean(), group_sums(losses, t, jnp.ones_like(t, bool), boundaries)

  gradient = functools.partial(jax.value_and_grad(mean_loss, has_aux=True), params)
  if objective.microbatches == 1:
    (loss, groups), grads = gradient(batch, 0)
  else:
    (loss, groups), grads = _sum_over_microbatches(gradient, batch, objective.microbatches)
    loss, grads = jax.tree.map(lambda x: x / objective.microbatches, (loss, grads))
  loss, grads = jax.lax.pmean((loss, grads), AXIS)
  is_bad = ~jnp.stack([jnp.isfinite(values).all() for values in batch.values()]).all()
  groups, num_bad = jax.lax.psum((groups, is_bad.astype(jnp.int32)), AXIS)
  return loss, groups, grads, num_bad == 0


def _sum_over_microbatches(
  function: Callable[[dict[str, Array], Int[Array, ""] | int], Any],
  batch: dict[str, Array],
  microbatches: int,
) -> Any:
  """Return the sum of the outputs for each part of a device's batch; slot i is of part i % M."""
  parts = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)

  def add(total: Any, numbered: tuple[dict[str, Array], Int[Array, ""]]) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, total, function(*numbered)), None

  shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts), 0)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return jax.lax.scan(add, zeros, (parts, jnp.arange(microbatches)))[0]


def train_step(
  state: TrainState,
  batch: dict[str, Array],
  key: Key[Array, ""],
  teacher_params: Any = None,
  *,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  learning_rate: Schedule,
  curriculum: Curriculum,
  regularizers: Weights,
  stage: int,
  ema_decay: float,
  ema_power: float | None,
  log_every_steps: int,
) -> tuple[TrainState, WindowMetrics]:
  """Apply one update.

  Args:
    state: replicated state.
    batch: this device's share, as in `batch_losses`.
    key: the run's key, the same on every device.
    teacher_params: replicated, as in `batch_losses`.
    objective: the loss; the stage replaces its strata.
    optimizer: optax chain for a learning rate of 1.
    regularizers: of the factors of `objective.model`; () for a dense model.
    stage: the state's own `stage.number`, static because its strata are.

  Returns:
    The next state, and a copy of its window that outlives its donation; equal on every device.
  """
  step_key = jax.random.fold_in(key, state.step)
  objective = objective.with_strata(curriculum.stages[stage].strata)
  loss, (group_loss, group_count), grads, is_batch_finite = mean_gradient(
    state.params, objective, step_key, batch, curriculum.boundaries, teacher_params
  )
  extra, grads = add_penalties(grads, state.params, objective.model.plan, regularizers)
  warmup_start = state.stage.first_step if curriculum.restart_optimizer else 0
  decay_start = state.stage.first_step if curriculum.restart_decay else 0
  rate = learning_rate(state.step, warmup_start, decay_start)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  updates = jax.tree.map(lambda update: rate * update, updates)
  params = optax.apply_updates(state.params, updates)
  step = state.step + 1
  if PROJECTION_LOSS in state.window.extra:
    extra[PROJECTION_LOSS] = projection_loss(grads, opt_state)
  sums = loss, group_loss, group_count, extra, grads, updates, rate, is_batch_finite
  window = state.window.add(step_metrics(*sums), step, log_every_steps)
  own = slice(*curriculum.stages[stage].groups)
  progress = state.stage.add(group_loss[own].sum(), group_count[own].sum(), step, curriculum)
  restart = (progress.number != stage) & curriculum.restart_optimizer
  new_state = TrainState(
    step=step,
    params=params,
    ema_params=update_ema(state.ema_params, params, state.step, ema_decay, ema_power),
    opt_state=optax.tree.where(restart, optimizer.init(params), opt_state),
    window=window,
    stage=progress,
  )
  return new_state, window


def step_metrics(
  loss: Float[Array, ""],
  group_loss: Float[Array, " G"],
  group_count: Int[Array, " G"],
  extra: dict[str, Float[Array, ""]],
  grads: Any,
  updates: Any,
  learning_rate: Float[Array, ""],
  is_batch_finite: Bool[Array, ""],
) -> WindowMetrics:
  """Return the window of a single step.

  A sum of squares is finite only if every element is. The update's norm is therefore checked as
  well, so that no checkpoint can hold parameters that are not finite.
  """
  grad_norm, update_norm = optax.tree.norm(grads), optax.tree.norm(updates)
  finite = [jnp.isfinite(value) for value in (loss, grad_norm, update_norm)]
  flags = jnp.stack([is_batch_finite, *finite])  # in the order of `NON_FINITE_QUANTITIES`
  return WindowMetrics(
    loss=loss,
    grad_norm=grad_norm,
    count=jnp.ones((), jnp.int32),
    learning_rate=learning_rate,
    group_loss=group_loss,
    group_count=group_count,
    extra=extra,
    non_finite=jnp.where(flags.all(), 0, 1 + flags.argmin()).astype(jnp.int32),
  )


def gradient_norms(
  params: Any,
  batch: dict[str, Array],
  key: Key[Array, ""],
  *,
  objective: Objective,
  boundaries: tuple[int, ...],
) -> tuple[Float[Array, " G"], Float[Array, " G"], Int[Array, " G"]]:
  """Return the sums of single examples' gradient norms and of their squares, and the counts.

  They are of each timestep group, over all devices, and equal on every device. `batch` and `key`
  are as in `batch_losses`. The gradients are of one example at a time, so that memory does not
  grow, and at the largest rank with a mask.
  """
  size = len(batch["label"])
  single = dataclasses.replace(objective, microbatches=size)

  def norm(numbered: tuple[Int[Array, ""], dict[str, Array]]) -> tuple[Array, Array]:
    def loss(params: Any) -> tuple[Array, Array]:
      losses, t = batch_losses(params, single, key, numbered[1], numbered[0])
      return losses[0], t[0]

    grads, t = jax.grad(loss, has_aux=True)(params)
    return optax.tree.norm(grads), t

  examples = jax.tree.map(lambda x: x[:, None], batch)
  norms, t = jax.lax.map(norm, (jnp.arange(size), examples))
  is_one = jnp.ones_like(t, bool)
  total, count = group_sums(norms, t, is_one, boundaries)
  squares, _ = group_sums(jnp.square(norms), t, is_one, boundaries)
  return jax.lax.psum((total, squares, count), AXIS)


def eval_step(
  params: Any,
  batch: dict[str, Array],
  key: Key[Array, ""],
  *,
  objective: Objective,
  boundaries: tuple[int, ...],
) -> tuple[Float[Array, " G"], Int[Array, " G"]]:
  """Return the summed losses and numbers of held-out examples of each timestep group.

  They are float32 and int32, over all devices, and equal on every device. `batch` is as in
  `train_step`, plus "weight" (b,) float32, 0 for padding. `key` determines noise and timesteps.
  """
  losses, t = batch_losses(params, objective, key, batch)
  return jax.lax.psum(group_sums(losses, t, batch["weight"] > 0, boundaries), AXIS)
