"""The pure training and evaluation steps, which run under pmap with the axis `parallel.AXIS`.

Axes: b local batch, G timestep groups.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from lrdit.runtime.parallel import AXIS
from lrdit.train.curriculum import Curriculum
from lrdit.train.loss import Objective, batch_losses, group_sums
from lrdit.train.optimizer import Schedule, update_ema
from lrdit.train.state import TrainState, WindowMetrics


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

  def mean_loss(params):
    losses, t = batch_losses(params, objective, key, batch, teacher_params)
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
  teacher_params: Any = None,
  *,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  learning_rate: Schedule,
  curriculum: Curriculum,
  stage: int,
  ema_decay: float,
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
    stage: the state's own `stage.number`, static because its strata are.

  Returns:
    The state after the update, and a copy of its window that outlives the state's donation to
    the next step. Both are equal on every device.
  """
  step_key = jax.random.fold_in(key, state.step)
  objective = objective.with_strata(curriculum.stages[stage].strata)
  loss, (group_loss, group_count), grads, is_batch_finite = mean_gradient(
    state.params, objective, step_key, batch, curriculum.boundaries, teacher_params
  )
  warmup_start = state.stage.first_step if curriculum.restart_optimizer else 0
  rate = learning_rate(state.step, warmup_start)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  updates = jax.tree.map(lambda update: rate * update, updates)
  params = optax.apply_updates(state.params, updates)
  step = state.step + 1
  metrics = step_metrics(loss, grads, updates, rate, group_loss, group_count, is_batch_finite)
  window = state.window.add(metrics, step, log_every_steps)
  own = slice(*curriculum.stages[stage].groups)
  progress = state.stage.add(group_loss[own].sum(), group_count[own].sum(), step, curriculum)
  restart = (progress.number != stage) & curriculum.restart_optimizer
  new_state = TrainState(
    step=step,
    params=params,
    ema_params=update_ema(state.ema_params, params, state.step, ema_decay),
    opt_state=optax.tree.where(restart, optimizer.init(params), opt_state),
    window=window,
    stage=progress,
  )
  return new_state, window


def step_metrics(
  loss: Float[Array, ""],
  grads: Any,
  updates: Any,
  learning_rate: Float[Array, ""],
  group_loss: Float[Array, " G"],
  group_count: Int[Array, " G"],
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
    non_finite=jnp.where(flags.all(), 0, 1 + flags.argmin()).astype(jnp.int32),
  )


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
