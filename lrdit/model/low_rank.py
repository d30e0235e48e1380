"""The low-rank dense layer: how r(t) becomes a slice of the factors, and a mask within it.

A layer computes y = (x @ down[:, :r]) @ up[:r] + bias, so a smaller rank r is always a prefix of a
larger one. A timestep gets its rank in four steps:

1. `RankPlan.bucket_of_timestep` maps t to a rank bucket, the same for every layer.
2. A `RankSelection` holds the static bucket of a batch and, where examples differ, the bucket of
   each example.
3. `LowRankDense` looks up the rank r of each bucket in its own table, and slices the factors to the
   batch's rank.
4. `low_rank_matmul` masks the components beyond each example's own rank.

Masked compute takes the whole batch at the top bucket. Grouped compute takes each group of examples
through the model at its own static bucket (`apply_by_group`). Sampling uses one bucket of a model
that `slice_params` has cut down.

Axes: B batch, N tokens, D_in / D_out width, R rank.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from lrdit.model.matmul import matmul
from lrdit.rank.plan import RankPlan

Initializer = Callable[..., Array]
XAVIER: Initializer = nn.initializers.xavier_uniform()
# Singular values below this share of the largest are rounding errors.
VANISHING = 1e-5


@flax.struct.dataclass
class RankSelection:
  """The active rank of a batch of B examples.

  Attributes:
    bucket: the static rank bucket at which the batch is computed.
    bucket_of_example: (B,) int32, at most `bucket`; None if every example uses `bucket`.
  """

  bucket: int = flax.struct.field(pytree_node=False, default=0)
  bucket_of_example: Int[Array, " B"] | None = None


def apply_by_group(
  function: Callable[..., Float[Array, "b ..."]],
  groups: tuple[tuple[int, int], ...],
  bucket_of_example: Int[Array, " B"] | None,
  *inputs: Any,
) -> Float[Array, "B ..."]:
  """Return the outputs of `function(selection, *parts)` for each group of examples, joined.

  A whole model is applied to each group: layers that each cut and join the batch take longer.

  Args:
    groups: static ((size, rank bucket), ...); sizes sum to B.
    bucket_of_example: (B,) int32, at most its group's; None is the group's bucket.
    inputs: trees of arrays (B, ...), of which each group gets its part.
  """
  outputs, end = [], 0
  for size, bucket in groups:
    start, end = end, end + size
    part = operator.itemgetter(slice(start, end))
    own, parts = jax.tree.map(part, (bucket_of_example, inputs))
    outputs.append(function(RankSelection(bucket, own), *parts))
  return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs)


def svd_factors(
  rng: Key[Array, ""], dim_in: int, dim_out: int, max_rank: int, kernel_init: Initializer
) -> tuple[Float[Array, "D_in R"], Float[Array, "R D_out"]]:
  """Return the truncated SVD of a freshly initialized dense kernel as (down, up), float32.

  With W = U S V^T, down = U sqrt(S) and up = sqrt(S) V^T: every prefix is the best approximation of
  W at its rank (Eckart and Young 1936).

  A component whose factors are both zero gets no gradient, so only `up` is zero where a singular
  value vanishes. A kernel of zeros takes the `down` of a Xavier kernel.
  """
  kernel = kernel_init(rng, (dim_in, dim_out), jnp.float32)
  is_zero = ~kernel.any()
  kernel = jnp.where(is_zero, XAVIER(rng, (dim_in, dim_out), jnp.float32), kernel)
  u, s, vt = jnp.linalg.svd(kernel, full_matrices=False)
  root = jnp.sqrt(s[:max_rank])
  vanishes = s[:max_rank] <= VANISHING * s[0]
  down = u[:, :max_rank] * jnp.where(vanishes, root[0], root)
  up = root[:, None] * vt[:max_rank]
  return down, jnp.where((vanishes | is_zero)[:, None], 0.0, up)


def low_rank_matmul(
  x: Float[Array, "B *N D_in"],
  down: Float[Array, "D_in R"],
  up: Float[Array, "R D_out"],
  active_rank: Int[Array, " B"] | None = None,
  dtype: Any = None,
) -> Float[Array, "B *N D_out"]:
  """Multiply by a factorized kernel, whose rank may be masked to each example's active rank.

  Components beyond an example's active rank contribute exactly zero to its output and receive
  exactly zero gradient from it.

  Args:
    active_rank: (B,) int32, at most R; None is R for every example.
    dtype: as in `matmul`.
  """
  rank = up.shape[0]
  # XLA's CPU backward pass is much faster on two-dimensional products.
  hidden = matmul(x.reshape(-1, x.shape[-1]), down, dtype)
  if active_rank is not None:
    mask = (jnp.arange(rank) < active_rank[:, None]).astype(hidden.dtype)[:, None]
    hidden = (hidden.reshape(len(x), -1, rank) * mask).reshape(-1, rank)
  return matmul(hidden, up, dtype).reshape(*x.shape[:-1], up.shape[-1])


class Dense(nn.Module):
  """y = x @ kernel + bias in x's dtype, with products in `dtype` and float32 parameters."""

  features: int
  dtype: Any = jnp.float32
  kernel_init: Initializer = XAVIER

  @nn.compact
  def __call__(
    self, x: Float[Array, "B *N D_in"], selection: RankSelection | None = None
  ) -> Float[Array, "B *N D_out"]:
    """Apply the layer; the selection is ignored."""
    del selection
    kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    y = matmul(x.reshape(-1, x.shape[-1]), kernel.astype(x.dtype), self.dtype)
    return (y + bias.astype(x.dtype)).reshape(*x.shape[:-1], self.features)


class LowRankDense(nn.Module):
  """Dense layer whose kernel is down @ up, at the rank that a selection makes active.

  Attributes:
    rank: the allocated rank, or the ascending active ranks of the rank buckets, the last of which
      is allocated; at most min(D_in, D_out).
    dtype: of the products' operands. Parameters are float32, and the result has x's dtype.
    kernel_init: initializer of the dense kernel that is factorized. With zeros the layer starts at
      zero and still learns.
  """

  features: int
  rank: int | tuple[int, ...]
  dtype: Any = jnp.float32
  kernel_init: Initializer = XAVIER

  @nn.compact
  def __call__(
    self, x: Float[Array, "B *N D_in"], selection: RankSelection | None = None
  ) -> Float[Array, "B *N D_out"]:
    """Apply the layer, at its allocated rank unless a selection is given."""
    active = (self.rank,) if isinstance(self.rank, int) else tuple(self.rank)
    if active[-1] > min(x.shape[-1], self.features):
      raise ValueError(
        f"LowRankDense: rank {active[-1]} is above min(D_in, D_out) of a {x.shape[-1]} x "
        f"{self.features} layer"
      )
    down, up = self._factors(x.shape[-1], active[-1])
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    selection = selection or RankSelection(len(active) - 1)
    rank, active_rank = active[selection.bucket], None
    if selection.bucket_of_example is not None:
      active_rank = jnp.asarray(active, jnp.int32)[selection.bucket_of_example]
    down, up, bias = (p.astype(x.dtype) for p in (down[:, :rank], up[:rank], bias))
    return low_rank_matmul(x, down, up, active_rank, self.dtype) + bias

  def _factors(
    self, dim_in: int, max_rank: int
  ) -> tuple[Float[Array, "D_in R"], Float[Array, "R D_out"]]:
    """Return both factors, initialized from one SVD."""
    if not self.is_initializing():
      return (
        self.param("down", nn.initializers.zeros, (dim_in, max_rank)),
        self.param("up", nn.initializers.zeros, (max_rank, self.features)),
      )
    rng = self.make_rng("params")
    down, up = svd_factors(rng, dim_in, self.features, max_rank, self.kernel_init)
    return self.param("down", lambda _: down), self.param("up", lambda _: up)


def make_dense(
  parent: nn.Module, name: str, features: int, kernel_init: Initializer = XAVIER
) -> Dense | LowRankDense:
  """Return the layer `name` of `parent`, factorized if `parent.plan` names it."""
  ranks = parent.plan.by_name.get("/".join((*parent.path, name)))
  common = dict(features=features, dtype=parent.dtype, kernel_init=kernel_init, name=name)
  return Dense(**common) if ranks is None else LowRankDense(rank=ranks.active, **common)


def slice_params(params: Mapping[str, Any], plan: RankPlan, bucket: int) -> dict[str, Any]:
  """Return the parameters of `plan.at_bucket(bucket)`; dense layers are shared, not copied."""
  flat = flax.traverse_util.flatten_dict(dict(params), sep="/")
  for name, ranks in plan.layers:
    rank = ranks.active[bucket]
    flat[f"{name}/down"] = flat[f"{name}/down"][:, :rank]
    flat[f"{name}/up"] = flat[f"{name}/up"][:rank]
  return flax.traverse_util.unflatten_dict(flat, sep="/")
