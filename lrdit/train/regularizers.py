"""Penalties on the factors of the low-rank layers, computed without forming a product.

W = down @ up is a layer's kernel at its allocated rank; a penalty sums over the low-rank layers.
Penalties are of the parameters, as weight decay is: components that a step leaves inactive get
their gradient too.

Axes: D_in / D_out width, R rank.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lrdit.rank.plan import RankPlan

# Singular values below this share of the largest are rounding errors, and count as zero.
VANISHING = 1e-6

Penalty = Callable[[Float[Array, "D_in R"], Float[Array, "R D_out"]], Float[Array, ""]]


def frobenius(down: Float[Array, "D_in R"], up: Float[Array, "R D_out"]) -> Float[Array, ""]:
  """Return ||W||_F^2 / 2, from the factors' Gram matrices.

  Its gradient with respect to W is W: an L2 decay of the kernel as if the layer were dense (Khodak
  et al. 2021, arXiv 2105.01029, "Frobenius decay").
  """
  return ((down.T @ down) * (up @ up.T)).sum() / 2


def nuclear(down: Float[Array, "D_in R"], up: Float[Array, "R D_out"]) -> Float[Array, ""]:
  """Return the sum of W's singular values, from an SVD of (R, R).

  The gradient is U V^T on the singular vectors of values that do not vanish, which is the
  subgradient of least norm.
  """
  constant = jax.lax.stop_gradient
  q_down, r_down = jnp.linalg.qr(constant(down))
  q_up, r_up = jnp.linalg.qr(constant(up).T)
  u, values, vt = jnp.linalg.svd(r_down @ r_up.T)
  # Of tr(U^T W V), with U and V constant, value and gradient are those of the nuclear norm.
  u = jnp.where(values > VANISHING * values[0], q_down @ u, 0.0)
  return ((u.T @ down) * (up @ (q_up @ vt.T)).T).sum()


def orthogonality(down: Float[Array, "D_in R"], up: Float[Array, "R D_out"]) -> Float[Array, ""]:
  """Return the sum of the squared products of different components, within each factor.

  It is 0 where the components are orthogonal, whatever their lengths, as after the SVD that
  initializes a layer. The lengths are free because each factor carries half of W's scale.
  """
  grams = down.T @ down, up @ up.T
  return sum(jnp.square(gram - jnp.diag(jnp.diagonal(gram))).sum() for gram in grams)


REGULARIZERS: dict[str, Penalty] = {
  "frobenius": frobenius,
  "nuclear": nuclear,
  "orthogonality": orthogonality,
}

# (name in `REGULARIZERS`, weight above 0) of each penalty in the loss.
Weights = Sequence[tuple[str, float]]


def penalties(params: Any, plan: RankPlan, names: Sequence[str]) -> dict[str, Float[Array, ""]]:
  """Return the sum over the low-rank layers of each named penalty, float32."""
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  factors = [(flat[f"{name}/down"], flat[f"{name}/up"]) for name, _ in plan.layers]
  return {name: sum(REGULARIZERS[name](*pair) for pair in factors) for name in names}


def add_penalties(
  grads: Any, params: Any, plan: RankPlan, weights: Weights
) -> tuple[dict[str, Float[Array, ""]], Any]:
  """Return the penalties, not weighted, and `grads` plus the gradient of their weighted sum.

  The names of the penalties, as in metrics, have "penalty_" in front. Without weights there are
  none, and `grads` stay. With weights, `plan` has low-rank layers.
  """
  if not weights:
    return {}, grads

  def weighted(params: Any) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    values = penalties(params, plan, [name for name, _ in weights])
    return sum(weight * values[name] for name, weight in weights), values

  added, values = jax.grad(weighted, has_aux=True)(params)
  named = {f"penalty_{name}": value for name, value in values.items()}
  return named, jax.tree.map(jnp.add, grads, added)
