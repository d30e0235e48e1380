"""What a training run carries from step to step, all of it checkpointed."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

NEVER = jnp.iinfo(jnp.int32).max


@flax.struct.dataclass
class WindowMetrics:
  """Sums over the steps of one line of metrics.

  They are part of the state, so that a resumed run writes the lines of an
  uninterrupted one.

  Attributes:
    loss, grad_norm: float32 sums over steps.
    count: int32 number of steps.
    non_finite_step: int32, the first step whose loss, gradient or update was
      not finite; `NEVER` if none.
  """

  loss: Float[Array, ""]
  grad_norm: Float[Array, ""]
  count: Int[Array, ""]
  non_finite_step: Int[Array, ""]

  @classmethod
  def empty(cls) -> "WindowMetrics":
    """No steps yet."""
    zero = jnp.zeros((), jnp.float32)
    return cls(zero, zero, jnp.zeros((), jnp.int32), jnp.full((), NEVER, jnp.int32))

  def add(
    self,
    loss: Float[Array, ""],
    grad_norm: Float[Array, ""],
    is_finite: Bool[Array, ""],
    step: Int[Array, ""],
    log_every_steps: int,
  ) -> "WindowMetrics":
    """With the scalars of step number `step` (from 1) added.

    The first step after a multiple of `log_every_steps` starts new sums.
    """
    finite = is_finite & jnp.isfinite(grad_norm)
    going_on = (step - 1) % log_every_steps != 0
    return WindowMetrics(
      loss=jnp.where(going_on, self.loss, 0.0) + loss,
      grad_norm=jnp.where(going_on, self.grad_norm, 0.0) + grad_norm,
      count=jnp.where(going_on, self.count, 0) + 1,
      non_finite_step=jnp.minimum(self.non_finite_step, jnp.where(finite, NEVER, step)),
    )


@flax.struct.dataclass
class TrainState:
  """The state of a run after `step` updates.

  Attributes:
    step: int32 updates applied.
    params: float32 parameters ("raw").
    ema_params: their exponential moving average.
    opt_state: optax state.
    window: sums for the next line of metrics.
  """

  step: Int[Array, ""]
  params: Any
  ema_params: Any
  opt_state: Any
  window: WindowMetrics


def create_train_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
  """The state before the first update; the average starts at `params`."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    ema_params=jax.tree.map(jnp.copy, params),
    opt_state=optimizer.init(params),
    window=WindowMetrics.empty(),
  )
