"""The optimiser and the moving average of the parameters."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

# float32 learning rate of (step, step the warm-up began at).
Schedule = Callable[[jax.typing.ArrayLike, jax.typing.ArrayLike], Float[Array, ""]]

OPTIMIZERS = ("adamw", "lion")
DECAYS = ("cosine", "constant")


def learning_rate_schedule(
  learning_rate: float, warmup_steps: int, num_steps: int, decay: str
) -> Schedule:
  """Linear warm-up to `learning_rate`, then cosine decay to 0 or a constant.

  Args:
    learning_rate: peak, per step.
    warmup_steps: steps of warm-up; the first step already moves.
    num_steps: total steps, at the end of which a cosine reaches 0.
    decay: one of `DECAYS`.

  Returns:
    float32 rate of (step, start): `step` updates were applied before, and the
    warm-up counts from step `start`; the decay does not begin again with it.
  """
  if decay == "cosine":
    share = optax.cosine_decay_schedule(1.0, max(1, num_steps - warmup_steps))
  else:
    share = optax.constant_schedule(1.0)
  first = learning_rate / max(1, warmup_steps)
  warmup = optax.linear_schedule(first, learning_rate, max(1, warmup_steps - 1))

  def rate(step: jax.typing.ArrayLike, start: jax.typing.ArrayLike) -> Float[Array, ""]:
    return warmup(step - start) * share(jnp.maximum(step - warmup_steps, 0))

  return rate


def make_optimizer(
  name: str,
  weight_decay: float,
  grad_clip_norm: float | None,
  *,
  beta1: float = 0.9,
  beta2: float | None = None,
  epsilon: float = 1e-8,
) -> optax.GradientTransformation:
  """Clips the global gradient norm, then applies the named optimiser.

  Its updates are for a learning rate of 1: the training step scales them, since
  a rate that counts from the start of a stage is no function of optax's counter.

  Args:
    name: one of `OPTIMIZERS`.
    weight_decay: decoupled decay of matrices; vectors (biases) do not decay.
    grad_clip_norm: largest global norm; None turns clipping off.
    beta1, beta2: decays of the moments; None is the optimizer's own default.
    epsilon: of AdamW; Lion has none.
  """
  make = {"adamw": functools.partial(optax.adamw, eps=epsilon), "lion": optax.lion}[name]
  decays = {"b1": beta1} | ({} if beta2 is None else {"b2": beta2})
  update = make(
    learning_rate=1.0,
    **decays,
    weight_decay=weight_decay,
    mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
  )
  clip = optax.clip_by_global_norm(grad_clip_norm) if grad_clip_norm else optax.identity()
  return optax.chain(clip, update)


def update_ema(ema_params: Any, params: Any, step: jax.Array, ema_decay: float) -> Any:
  """Moves the average towards `params`, with warm-up.

  The decay is min(ema_decay, (1 + step) / (10 + step)), so that an early
  average is not dominated by the initial parameters.

  Args:
    ema_params, params: equal trees.
    step: int32, updates applied before this one.
    ema_decay: in [0, 1).
  """
  decay = jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))
  return jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), ema_params, params)
