"""Muon for hidden matrices, and its rules for the two factors of a low-rank layer.

Muon replaces a matrix's momentum M = U S V^T by U V^T, which Newton-Schulz steps compute
(Jordan 2024). "Consistent RMS" scales that to the root mean square of AdamW's updates, so that both
share a learning rate (Liu et al. 2025, equation 4). The other parameters are AdamW's.

The factors of W = down @ up can be updated by different rules, the keys of `FACTOR_UPDATES`:

- `whole`: each factor is a matrix like any other.
- `bands`: the components that one rank bucket adds to the next lower one are orthogonalized by
  themselves, as only mixing within such a band keeps the function of every bucket.
- `lora_muon`: each factor's momentum is multiplied by the other factor's inverse root Gram matrix,
  before and after, which makes the step of W independent of how scale is split between the factors
  (Cesista et al. 2026, arXiv 2606.12921). Deviation: momentum averages after the first product.
- `spectron`: the step is divided by the factors' spectral norms, so that it bounds the step of W
  (arXiv 2602.12429).

Axes: D_in / D_out width, R rank.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from lrdit.rank.plan import LayerRanks, RankPlan
from lrdit.train import newton_schulz

Pair = tuple[Any, Any]  # of (down, up), each a matrix or the matrices of its bands

# Smaller eigenvalues of a Gram matrix are raised to this share of both factors' largest one.
SMALLEST_EIGENVALUE = 1e-2
# Of a Gram matrix; the Schatten norm is then at most R**(1/64) times a factor's spectral norm.
SQUARINGS = 4


@dataclasses.dataclass(frozen=True)
class MuonOptions:
  """The options of Muon.

  Attributes:
    layers: names of the layers whose matrices it updates.
    consistent_rms: root mean square of an update at a learning rate of 1; None scales by
      sqrt(max(1, D_out / D_in)) instead (Jordan 2024).
    learning_rate_ratio: Muon's learning rate over AdamW's.
  """

  layers: tuple[str, ...]
  momentum: float = 0.95
  newton_schulz_steps: int = 5
  consistent_rms: float | None = 0.2
  learning_rate_ratio: float = 1.0
  factor_update: str = "whole"


@dataclasses.dataclass(frozen=True)
class FactorRule:
  """How Muon updates a layer's factors.

  Attributes:
    before: returns the matrices to orthogonalize, from the (down, up) gradients, the factors and
      the layer's ranks.
    after: returns the (down, up) updates from the orthogonalized matrices, the factors, the ranks
      and the function from a matrix's shape to the scale of its update.
  """

  before: Callable[[Pair, Pair, LayerRanks], Pair]
  after: Callable[[Pair, Pair, LayerRanks, Callable[[tuple[int, int]], float]], Pair]


def _unchanged(pair: Pair, _factors: Pair, _ranks: LayerRanks) -> Pair:
  return pair


def _scale_each(pair: Pair, _factors: Pair, _ranks: LayerRanks, scale: Callable) -> Pair:
  return tuple(scale(matrix.shape) * matrix for matrix in pair)


def _band_edges(ranks: LayerRanks) -> list[int]:
  """Return the rank at which each band ends; buckets of equal rank share a band."""
  return list(dict.fromkeys(ranks.active))


def _split(pair: Pair, _factors: Pair, ranks: LayerRanks) -> Pair:
  edges = _band_edges(ranks)[:-1]
  return tuple(tuple(jnp.split(part, edges, axis)) for part, axis in zip(pair, (1, 0), strict=True))


def _join(pair: Pair, _factors: Pair, _ranks: LayerRanks, scale: Callable) -> Pair:
  down, up = ([scale(band.shape) * band for band in bands] for bands in pair)
  return jnp.concatenate(down, axis=1), jnp.concatenate(up, axis=0)


def _grams(factors: Pair) -> Pair:
  """Return the (R, R) Gram matrices over the components of (down, up)."""
  down, up = factors
  return down.T @ down, up @ up.T


def _whiten(pair: Pair, factors: Pair, _ranks: LayerRanks) -> Pair:
  """Multiply each factor's matrix by the inverse root of the other factor's Gram matrix."""
  decomposed = [jnp.linalg.eigh(gram) for gram in _grams(factors)]
  largest = jnp.maximum(*(values[-1] for values, _ in decomposed))
  of_down, of_up = (
    (vectors * jax.lax.rsqrt(jnp.maximum(values, SMALLEST_EIGENVALUE * largest))) @ vectors.T
    for values, vectors in decomposed
  )
  return pair[0] @ of_up, of_down @ pair[1]


def _unwhiten(pair: Pair, factors: Pair, ranks: LayerRanks, scale: Callable) -> Pair:
  # Each factor moves W by half of what Muon moves a dense kernel.
  half = scale((factors[0].shape[0], factors[1].shape[1])) / 2
  return tuple(half * matrix for matrix in _whiten(pair, factors, ranks))


def spectral_norm(gram: Float[Array, "R R"]) -> Float[Array, ""]:
  """Return an upper bound of the spectral norm of a factor with this Gram matrix.

  It is the Schatten norm of order 4 * 2**SQUARINGS, which needs no iteration's state.
  """
  trace = jnp.trace(gram)
  safe = jnp.where(trace > 0, trace, 1.0)
  power, exponent, log_norm = gram / safe, 1, jnp.log(safe)
  for _ in range(SQUARINGS):
    power, exponent = power @ power, 2 * exponent
    norm = jnp.linalg.norm(power)
    norm = jnp.where(norm > 0, norm, 1.0)
    power, log_norm = power / norm, log_norm + jnp.log(norm) / exponent
  return jnp.where(trace > 0, jnp.exp(log_norm / 2), 0.0)


def _divide_by_norms(pair: Pair, factors: Pair, _ranks: LayerRanks, scale: Callable) -> Pair:
  whole = scale((factors[0].shape[0], factors[1].shape[1]))
  step = whole / (1.0 + sum(map(spectral_norm, _grams(factors))))
  return tuple(step * matrix for matrix in pair)


FACTOR_UPDATES = {
  "whole": FactorRule(_unchanged, _scale_each),
  "bands": FactorRule(_split, _join),
  "lora_muon": FactorRule(_whiten, _unwhiten),
  "spectron": FactorRule(_unchanged, _divide_by_norms),
}


def update_scale(shape: tuple[int, int], consistent_rms: float | None) -> float:
  """Return the factor of an orthogonalized (D_in, D_out) matrix, for a learning rate of 1."""
  if consistent_rms is None:
    return math.sqrt(max(1.0, shape[1] / shape[0]))
  return consistent_rms * math.sqrt(max(shape))


def newton_schulz_macs(
  layer_shapes: Mapping[str, tuple[int, int]], plan: RankPlan, options: MuonOptions
) -> int:
  """Return the MACs of an update's Newton-Schulz steps on one device.

  Args:
    layer_shapes: (D_in, D_out) by layer name, from `dit.layer_shapes`.
  """
  matrices: list[tuple[int, int]] = []
  for name in options.layers:
    dim_in, dim_out = layer_shapes[name]
    if name not in plan.by_name:
      matrices.append((dim_in, dim_out))
      continue
    edges = [0, *_band_edges(plan.by_name[name])]
    of_bands = options.factor_update == "bands"
    for rank in np.diff(edges) if of_bands else edges[-1:]:
      matrices += [(dim_in, int(rank)), (int(rank), dim_out)]
  steps = options.newton_schulz_steps
  return sum(newton_schulz.macs(min(matrix), max(matrix), steps) for matrix in matrices)


def in_stacks(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """Return `inner` applied to stacks of the matrices of equal shape.

  Equal blocks then share their products, which compile and run faster than one after another.
  """

  def key(matrix: jax.Array | np.ndarray) -> str:
    return "x".join(map(str, matrix.shape))

  def stack(tree: Any) -> dict[str, jax.Array]:
    matrices: dict[str, list[jax.Array]] = {}
    for matrix in jax.tree.leaves(tree):
      matrices.setdefault(key(matrix), []).append(matrix)
    return {name: jnp.stack(own) for name, own in matrices.items()}

  def update(updates: Any, state: Any, _params: Any = None) -> tuple[Any, Any]:
    stacks, state = inner.update(stack(updates), state)
    matrices, tree = jax.tree.flatten(updates)
    of_shape = {name: iter(list(own)) for name, own in stacks.items()}
    return tree.unflatten(next(of_shape[key(matrix)]) for matrix in matrices), state

  return optax.GradientTransformation(lambda params: inner.init(stack(params)), update)


def scale_by_muon(plan: RankPlan, options: MuonOptions) -> optax.GradientTransformation:
  """Return the scaled and orthogonalized momentum of a tree of matrices, named as in `plan`."""
  rule = FACTOR_UPDATES[options.factor_update]
  last_two = optax.contrib.MuonDimensionNumbers(-2, -1)
  # Without steps of its own, optax returns the momentum at a Frobenius norm of 1.
  momentum = optax.contrib.scale_by_muon(
    ns_steps=0,
    beta=options.momentum,
    weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: last_two, tree),
  )
  orthogonalize = functools.partial(newton_schulz.orthogonalize, steps=options.newton_schulz_steps)

  def update_stacks(updates: Any, state: Any, _params: Any = None) -> tuple[Any, Any]:
    updates, state = momentum.update(updates, state)
    return jax.tree.map(orthogonalize, updates), state

  inner = in_stacks(optax.GradientTransformation(momentum.init, update_stacks))

  def factor_names(tree: dict[str, Any]) -> list[tuple[LayerRanks, tuple[str, str]]]:
    named = [(ranks, (f"{name}/down", f"{name}/up")) for name, ranks in plan.layers]
    masked = optax.MaskedNode  # what another optimizer updates; parameters may be numpy's
    return [(ranks, names) for ranks, names in named if not isinstance(tree[names[0]], masked)]

  def scale(shape: tuple[int, int]) -> float:
    return update_scale(shape, options.consistent_rms)

  def encode(tree: Any, params: Any) -> dict[str, Any]:
    flat, flat_params = (flax.traverse_util.flatten_dict(t, sep="/") for t in (tree, params))
    for ranks, names in factor_names(flat):
      pair, factors = ((own[names[0]], own[names[1]]) for own in (flat, flat_params))
      flat |= zip(names, rule.before(pair, factors, ranks), strict=True)
    return flat

  def decode(flat: dict[str, Any], params: Any) -> Any:
    flat_params = flax.traverse_util.flatten_dict(params, sep="/")
    pairs = factor_names(flat_params)
    of_pairs = {name for _, names in pairs for name in names}
    scaled = {
      name: jax.tree.map(lambda matrix: scale(matrix.shape) * matrix, value)
      for name, value in flat.items()
      if name not in of_pairs
    }
    for ranks, names in pairs:
      pair, factors = ((own[names[0]], own[names[1]]) for own in (flat, flat_params))
      scaled |= zip(names, rule.after(pair, factors, ranks, scale), strict=True)
    return flax.traverse_util.unflatten_dict(scaled, sep="/")

  def init(params: Any) -> Any:
    return inner.init(encode(params, params))

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    moved, state = inner.update(encode(updates, params), state)
    return decode(moved, params), state

  return optax.GradientTransformation(init, update)


def muon(
  plan: RankPlan, options: MuonOptions, weight_decay: float, adamw: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Return Muon for the matrices of `options.layers` and `adamw` for all else, at a rate of 1."""

  def labels(params: Any) -> Any:
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    is_muon = {
      name: name.rpartition("/")[0] in options.layers and p.ndim == 2 for name, p in flat.items()
    }
    chosen = {name: "muon" if own else "adamw" for name, own in is_muon.items()}
    return flax.traverse_util.unflatten_dict(chosen, sep="/")

  matrices = optax.chain(
    scale_by_muon(plan, options),
    optax.add_decayed_weights(weight_decay),
    optax.scale(-options.learning_rate_ratio),
  )
  return optax.partition({"muon": matrices, "adamw": adamw}, labels)
