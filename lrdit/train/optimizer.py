"""The optimizer, its learning rate and the moving average of the parameters."""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lrdit.rank.plan import RankPlan
from lrdit.train.muon import MuonOptions
from lrdit.train.muon import muon as make_muon

# The float32 learning rate as a function of (step, the steps at which warm-up and decay began).
Schedule = Callable[..., Float[Array, ""]]

OPTIMIZERS = ("adamw", "lion", "muon", "galore")
FACTOR_RATES = ("equal", "fan_in")
DECAYS = ("cosine", "constant")


def learning_rate_schedule(
  learning_rate: float,
  warmup_steps: int,
  num_steps: int,
  decay: str,
  decay_after: int | None = None,
) -> Schedule:
  """Return a linear warm-up to `learning_rate`, then the `decay`: cosine to 0, or constant.

  The first step already has a rate above 0; a cosine reaches 0 after `num_steps`. The result is a
  function of (step, warmup_start, decay_start): `step` updates precede this one, a warm-up begins
  at `warmup_start`, and a decay `decay_after` steps, by default the warm-up's, after `decay_start`.
  """
  decay_after = warmup_steps if decay_after is None else decay_after
  first = learning_rate / max(1, warmup_steps)
  warmup = optax.linear_schedule(first, learning_rate, max(1, warmup_steps - 1))

  def rate(
    step: jax.typing.ArrayLike,
    warmup_start: jax.typing.ArrayLike,
    decay_start: jax.typing.ArrayLike = 0,
  ) -> Float[Array, ""]:
    start = decay_start + decay_after
    length = jnp.maximum(1, num_steps - start).astype(jnp.float32)
    done = jnp.minimum(jnp.maximum(step - start, 0), length)
    share = 0.5 * (1 + jnp.cos(jnp.pi * done / length)) if decay == "cosine" else 1.0
    return warmup(step - warmup_start) * share

  return rate


def make_optimizer(
  name: str,
  weight_decay: float,
  grad_clip_norm: float | None,
  *,
  plan: RankPlan,
  muon: MuonOptions,
  beta1: float | None = None,
  beta2: float | None = None,
  epsilon: float | None = None,
  factor_rates: str = "equal",
  galore_rank: int = 128,
  galore_gap: int = 200,
) -> optax.GradientTransformation:
  """Return the optimizer `name` after clipping of the global gradient norm.

  Its updates are for a learning rate of 1. The training step scales them, because optax's step
  counter cannot give a rate that counts from the start of a stage.

  Args:
    weight_decay: decoupled decay of matrices; vectors (biases) do not decay.
    grad_clip_norm: largest global norm; None turns clipping off.
    plan: the model's ranks.
    muon: the options of muon; the parameters that it leaves follow adamw with these constants:
    beta1, beta2: decay rates of the moments; None is (0.9, 0.999) for adamw, (0.9, 0.99) for lion.
    epsilon: term in adamw's denominator; None is 1e-8. lion has none.
    factor_rates: one of `FACTOR_RATES`; "fan_in" multiplies the updates of `up` by D_in / R.
    galore_rank, galore_gap: of `galore`, which applies to matrices; adamw updates all else.
  """
  make = optax.lion if name == "lion" else optax.adamw
  constants = {"b1": beta1, "b2": beta2} | ({} if name == "lion" else {"eps": epsilon})
  update = make(
    learning_rate=1.0,
    weight_decay=weight_decay,
    mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    **{key: value for key, value in constants.items() if value is not None},
  )
  if name == "muon":
    update = make_muon(plan, muon, weight_decay, update)
  if name == "galore":
    moments = {key: value for key, value in constants.items() if value is not None}
    projected = galore(galore_rank, galore_gap, weight_decay, optax.scale_by_adam(**moments))
    update = optax.partition({"matrix": projected, "other": update}, _matrices)
  clip = optax.identity() if grad_clip_norm is None else optax.clip_by_global_norm(grad_clip_norm)
  chained = optax.chain(clip, update)
  return chained if factor_rates == "equal" else with_fan_in_rates(plan, chained)


def _matrices(params: Any) -> Any:
  return jax.tree.map(lambda p: "matrix" if p.ndim == 2 else "other", params)


def galore(
  rank: int, gap: int, weight_decay: float, moments: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Return GaLore for a learning rate of 1 (Zhao et al. 2024, arXiv 2403.03507), of matrices only.

  Each matrix's gradient is projected to the leading singular vectors, `rank` at most, that its own
  gradient had at the last multiple of `gap` steps; `moments` are of the projection. They are kept
  when the projection changes, as there. Fresh moments begin with a new projection.
  """
  return optax.chain(
    optax.contrib.scale_by_galore(rank, gap, base_optimizer=moments),
    optax.add_decayed_weights(weight_decay),
    optax.scale(-1.0),
  )


def projection_loss(grads: Any, opt_state: Any) -> Float[Array, ""]:
  """Return the share of the matrices' squared gradient that GaLore's projections leave out.

  `opt_state` is the state after the update by `grads`, which may be scaled.
  """
  total = kept = jnp.zeros(())
  by_path = dict(jax.tree_util.tree_leaves_with_path(grads))
  projections = optax.tree.get(opt_state, "projector")
  for path, projection in jax.tree_util.tree_leaves_with_path(projections):
    gradient = by_path[path]
    tall = gradient if gradient.shape[0] >= gradient.shape[1] else gradient.T
    total += jnp.square(tall).sum()
    kept += jnp.square(projection.T @ tall).sum()
  return jnp.maximum(0.0, 1 - kept / total)


def with_fan_in_rates(
  plan: RankPlan, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Return `inner` with each `up`'s update times D_in / R (Qiu et al. 2024, arXiv 2406.06248).

  A matrix's rate is inverse to its fan-in, which is R for `up`, where a dense kernel has D_in. The
  state is that of `inner`, so that a run may change to these rates and back.
  """

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    moved, state = inner.update(updates, state, params)
    flat = flax.traverse_util.flatten_dict(moved, sep="/")
    for name, _ in plan.layers:
      dim_in, rank = flat[f"{name}/down"].shape
      flat[f"{name}/up"] = dim_in / rank * flat[f"{name}/up"]
    return flax.traverse_util.unflatten_dict(flat, sep="/"), state

  return optax.GradientTransformation(inner.init, update)


def update_ema(
  ema_params: Any, params: Any, step: jax.Array, ema_decay: float, power: float | None = None
) -> Any:
  """Return the average moved towards `params`, with warm-up.

  The decay is at most (1 + step) / (10 + step), or 1 - (1 + step)^-power, so that the initial
  parameters do not dominate an early average. `step` updates precede this one.
  """
  warm = (1.0 + step) / (10.0 + step) if power is None else 1.0 - (1.0 + step) ** -power
  decay = jnp.minimum(ema_decay, warm)
  return jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), ema_params, params)
