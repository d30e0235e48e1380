"""The low-rank dense layer: how r(t) becomes a slice of the factors, and a mask within it.

A layer computes y = (x @ down[:, :r]) @ up[:r] + bias, so a smaller rank r is always a prefix of a
larger one. A timestep gets its rank in four steps:

1. `RankPlan.bucket_of_timestep` maps t to a rank bucket, the same for every layer.
2. A `RankSelection` holds static (group size, rank bucket) pairs and, where examples of one group
   differ, the bucket of each example.
3. `LowRankDense` looks up the rank r of each bucket in its own table.
4. `low_rank_matmul` slices the factors to each group's rank and masks the components beyond each
   example's own rank.

Masked compute has one group at the top bucket and a bucket per example. Grouped compute has several
groups. Sampling uses one group of a model that `slice_params` has cut down.

Axes: B batch, N tokens, D_in / D_out width, R rank.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax
import flax.linen as nn
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
    groups: static ((size, rank bucket), ...); sizes sum to B, and no example's bucket exceeds
      its group's.
    rank_bucket: (B,) int32, or None if every example uses its group's bucket.
  """

  groups: tuple[tuple[int, int], ...] = flax.struct.field(pytree_node=False)
  rank_bucket: Int[Array, " B"] | None = None


def uniform_selection(batch_size: int, bucket: int = 0) -> RankSelection:
  """Return the selection of a whole batch at one bucket."""
  return RankSelection(groups=((batch_size, bucket),))


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
  groups: tuple[tuple[int, int], ...],
  active_rank: Int[Array, " B"] | None = None,
  dtype: Any = None,
) -> Float[Array, "B *N D_out"]:
  """Multiply by a factorized kernel at each example's active rank.

  Components beyond an example's active rank contribute exactly zero to its output and receive
  exactly zero gradient from it.

  Args:
    groups: static ((group size, rank), ...); sizes sum to B.
    active_rank: (B,) int32, at most the group's rank; None is the group's rank for every example.
    dtype: as in `matmul`.
  """
  outputs, start = [], 0
  for size, rank in groups:
    part = x[start : start + size]
    # XLA's CPU backward pass is much faster on two-dimensional products.
    hidden = matmul(part.reshape(-1, x.shape[-1]), down[:, :rank], dtype)
    if active_rank is not None:
      mask = jnp.arange(rank) < active_rank[start : start + size, None]
      mask = mask.astype(hidden.dtype)[:, None]
      hidden = (hidden.reshape(size, -1, rank) * mask).reshape(-1, rank)
    output = matmul(hidden, up[:rank], dtype)
    outputs.append(output.reshape(*part.shape[:-1], up.shape[-1]))
    start += size
  return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs)


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
    if selection is None:
      selection = uniform_selection(x.shape[0], len(active) - 1)
    groups = tuple((size, active[bucket]) for size, bucket in selection.groups)
    active_rank = None
    if selection.rank_bucket is not None:
      active_rank = jnp.asarray(active, jnp.int32)[selection.rank_bucket]
    down, up, bias = (parameter.astype(x.dtype) for parameter in (down, up, bias))
    return low_rank_matmul(x, down, up, groups, active_rank, self.dtype) + bias

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
