"""The optimizer, its learning rate and the moving average of the parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

# The float32 learning rate as a function of (step, step at which the warm-up began).
Schedule = Callable[[jax.typing.ArrayLike, jax.typing.ArrayLike], Float[Array, ""]]

OPTIMIZERS = ("adamw", "lion")
DECAYS = ("cosine", "constant")


def learning_rate_schedule(
  learning_rate: float, warmup_steps: int, num_steps: int, decay: str
) -> Schedule:
  """Return a linear warm-up to `learning_rate`, then the `decay`: cosine to 0, or constant.

  The first step already has a rate above 0; a cosine reaches 0 after `num_steps`. The result is a
  function of (step, start): `step` updates precede this one, and the warm-up, but not the decay,
  counts from step `start`.
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
  beta1: float | None = None,
  beta2: float | None = None,
  epsilon: float | None = None,
) -> optax.GradientTransformation:
  """Return the optimizer `name` after clipping of the global gradient norm.

  Its updates are for a learning rate of 1. The training step scales them, because optax's step
  counter cannot give a rate that counts from the start of a stage.

  Args:
    weight_decay: decoupled decay of matrices; vectors (biases) do not decay.
    grad_clip_norm: largest global norm; None turns clipping off.
    beta1, beta2: decay rates of the moments; None is (0.9, 0.999) for adamw, (0.9, 0.99) for lion.
    epsilon: term in adamw's denominator; None is 1e-8. lion has none.
  """
  make = {"adamw": optax.adamw, "lion": optax.lion}[name]
  constants = {"b1": beta1, "b2": beta2} | ({"eps": epsilon} if name == "adamw" else {})
  update = make(
    learning_rate=1.0,
    weight_decay=weight_decay,
    mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    **{key: value for key, value in constants.items() if value is not None},
  )
  clip = optax.identity() if grad_clip_norm is None else optax.clip_by_global_norm(grad_clip_norm)
  return optax.chain(clip, update)


def update_ema(ema_params: Any, params: Any, step: jax.Array, ema_decay: float) -> Any:
  """Return the average moved towards `params`, with warm-up.

  The decay is min(ema_decay, (1 + step) / (10 + step)), so that the initial parameters do not
  dominate an early average. `step` updates precede this one.
  """
  decay = jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))
  return jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), ema_params, params)
