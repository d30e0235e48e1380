"""The rank plan: the active rank r(t) of every layer, matched to a static rank and quantized.

A `RankPlan` is made once on the host, before anything is compiled. A layer allocates its `max_rank`
R, and timestep t uses the first r(t) <= R components, its active rank. A rank bucket is a level of
the quantized schedule; buckets are shared by all layers and numbered by ascending rank.

Axes: T timesteps, K rank buckets.
"""

import dataclasses
import fnmatch
import functools
import math
import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from lrdit.runtime.errors import UserError

MATCHES = ("activated", "total")


@dataclasses.dataclass(frozen=True)
class LayerRanks:
  """Ranks of one factorized layer.

  Attributes:
    static_rank: the rank of the static arm, to which the plan is matched.
    active: ascending active ranks of the buckets; the last is the max rank.
  """

  static_rank: int
  active: tuple[int, ...]

  @property
  def max_rank(self) -> int:
    """The allocated rank R."""
    return self.active[-1]


@dataclasses.dataclass(frozen=True)
class RankPlan:
  """The rank of every layer at every timestep; static and hashable.

  Attributes:
    segments: (start timestep, rank bucket) of each run of timesteps in one bucket; the starts
      ascend from 0.
    layers: (name, ranks) of every factorized layer.
  """

  num_train_timesteps: int
  segments: tuple[tuple[int, int], ...]
  layers: tuple[tuple[str, LayerRanks], ...]

  @property
  def num_buckets(self) -> int:
    """The number of rank buckets K."""
    return 1 + max(bucket for _, bucket in self.segments)

  @functools.cached_property
  def bucket_of_timestep(self) -> Int[np.ndarray, " T"]:
    """The rank bucket of every timestep, (T,) int32."""
    starts, buckets = zip(*self.segments, strict=True)
    lengths = np.diff([*starts, self.num_train_timesteps])
    return np.repeat(buckets, lengths).astype(np.int32)

  @functools.cached_property
  def by_name(self) -> dict[str, LayerRanks]:
    """The ranks of `layers` by name."""
    return dict(self.layers)

  def mean_active_rank(self, name: str) -> float:
    """Return a layer's mean active rank over all timesteps."""
    return float(np.mean(np.asarray(self.by_name[name].active)[self.bucket_of_timestep]))

  def at_bucket(self, bucket: int) -> "RankPlan":
    """Return the plan of a model that holds only the bucket's components."""
    layers = tuple(
      (name, LayerRanks(ranks.static_rank, (ranks.active[bucket],))) for name, ranks in self.layers
    )
    return RankPlan(self.num_train_timesteps, ((0, 0),), layers)


def dense_plan(num_train_timesteps: int) -> RankPlan:
  """Return the plan without factorized layers."""
  return RankPlan(num_train_timesteps, ((0, 0),), ())


def static_rank(ratio: float, dim_in: int, dim_out: int) -> int:
  """Return floor(ratio D_in D_out / (D_in + D_out)), clipped to [1, min(D_in, D_out)].

  The factors of this rank hold `ratio` times the dense layer's parameters.
  """
  rank = math.floor(ratio * dim_in * dim_out / (dim_in + dim_out) + 1e-9)
  return max(1, min(rank, dim_in, dim_out))


def floor_exact(x: np.ndarray) -> np.ndarray:
  """Return floor(x), tolerating rounding errors just below an integer."""
  return np.floor(x + 1e-9 * np.maximum(np.abs(x), 1.0)).astype(np.int64)


def quantize(
  height: Float[np.ndarray, " T"], num_buckets: int
) -> tuple[tuple[tuple[int, int], ...], Float[np.ndarray, " K"]]:
  """Quantize a schedule to the nearest of `num_buckets` equidistant levels.

  Levels without a timestep are dropped.

  Returns:
    (segments as in `RankPlan`, (K,) float64 ascending levels of the buckets in [0, 1]).
  """
  levels = floor_exact(height * (num_buckets - 1) + 0.5)
  values = np.arange(num_buckets) / (num_buckets - 1) if num_buckets > 1 else np.ones(1)
  used, bucket = np.unique(levels, return_inverse=True)
  starts = np.flatnonzero(np.diff(bucket, prepend=-1))
  return tuple((int(s), int(bucket[s])) for s in starts), values[used]


def bucket_ranks(
  levels: Float[np.ndarray, " K"], max_rank: int, min_ratio: float, multiple_of: int
) -> tuple[int, ...]:
  """Return the active rank of one layer in each of K buckets.

  Level 0 has the share `min_ratio` of R, and level 1 has R. Every rank but R is rounded to the
  nearest multiple of `multiple_of` within [min(multiple_of, R), R].
  """
  min_rank = max(1, round(min_ratio * max_rank))
  rank = min_rank + (max_rank - min_rank) * levels
  rank = multiple_of * floor_exact(rank / multiple_of + 0.5)
  rank = np.clip(rank, min(multiple_of, max_rank), max_rank)
  rank = np.where(levels == 1.0, max_rank, rank)  # the top level is n / n, exactly 1
  return tuple(int(r) for r in rank)


def match_activated(
  target: int,
  largest_rank: int,
  levels: Float[np.ndarray, " K"],
  counts: Int[np.ndarray, " K"],
  min_ratio: float,
  multiple_of: int,
) -> tuple[int, ...]:
  """Return the K ascending ranks whose mean over timesteps is nearest to `target`.

  The smallest ranks win a tie. The allocated rank is `largest_rank` or a multiple of `multiple_of`.
  `counts` are the numbers of timesteps in the buckets.
  """
  candidates = [*range(multiple_of, largest_rank, multiple_of), largest_rank]
  tables = [bucket_ranks(levels, r, min_ratio, multiple_of) for r in candidates]
  # Totals are integers, so that rounding cannot break a tie.
  totals = np.asarray(tables) @ counts
  return tables[int(np.argmin(np.abs(totals - target * counts.sum())))]


def covers(pattern: str, name: str) -> bool:
  """Return whether a shell pattern matches a layer's name, or the name up to one of its '/'."""
  parts = name.split("/")
  return any(fnmatch.fnmatchcase("/".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))


def check_patterns(field: str, patterns: Sequence[str], layers: Collection[str]) -> None:
  """Raise a UserError if a pattern of a config field matches none of the layers."""
  for pattern in patterns:
    if not any(covers(pattern, name) for name in layers):
      known = dict.fromkeys(re.sub(r"^blocks_\d+", "blocks_*", name) for name in layers)
      fix = f"the layers are {', '.join(known)}"
      raise UserError(f"{field} entry {pattern!r} fits no layer: {fix}")


def layers_of_blocks(
  layers: Sequence[str], limits: Mapping[str, int | None], depth: int
) -> list[str]:
  """Return the layers in the first or last blocks, or all layers if no limit is set.

  Args:
    limits: the numbers of first and of last blocks by config field; None sets no limit.

  Raises:
    UserError: a limit is above `depth`, the number of blocks.
  """
  for field, n in limits.items():
    if n is not None and n > depth:
      raise UserError(f"{field}={n} must be at most {depth}, the blocks there are")
  if set(limits.values()) == {None}:
    return [*layers]
  first, last = (n or 0 for n in limits.values())
  blocks = {f"blocks_{i}" for i in (*range(first), *range(depth - last, depth))}
  return [name for name in layers if name.split("/")[0] in blocks]


def select_layers(
  layer_shapes: Mapping[str, tuple[int, int]],
  dense_layers: Sequence[str],
  first_n_blocks: int | None,
  last_n_blocks: int | None,
  depth: int,
) -> list[str]:
  """Return the names of the layers to factorize.

  Args:
    layer_shapes: (D_in, D_out) by layer name, from `dit.layer_shapes`.
    dense_layers: shell patterns of layers that stay dense; a pattern that matches a name up to a
      '/' covers everything below it ("blocks_0/mlp").
    first_n_blocks, last_n_blocks: if either is not None, only layers in those blocks are
      factorized.

  Raises:
    UserError: a pattern matches no layer, there are too few blocks, or no layer is left.
  """
  check_patterns("rank.dense_layers", dense_layers, layer_shapes)
  chosen = [n for n in layer_shapes if not any(covers(pattern, n) for pattern in dense_layers)]
  limits = {"rank.first_n_blocks": first_n_blocks, "rank.last_n_blocks": last_n_blocks}
  chosen = layers_of_blocks(chosen, limits, depth)
  if not chosen:
    raise UserError(
      "rank.dense_layers with the choice of blocks leaves no layer to factorize: use method=full "
      "for a dense model"
    )
  return chosen


def make_plan(
  layer_shapes: Mapping[str, tuple[int, int]],
  *,
  height: Float[np.ndarray, " T"],
  static_ranks: Mapping[str, int],
  min_ratio: float,
  match: str,
  num_buckets: int,
  multiple_of: int,
  adaptive_layers: Collection[str] | None = None,
) -> RankPlan:
  """Return the rank plan of a low-rank model.

  The static arm has the schedule `constant` and match `total`: one bucket with the static ranks.

  Args:
    layer_shapes: (D_in, D_out) of the layers to factorize, by name.
    height: (T,) from `schedules.schedule_height` or `measured.height`.
    static_ranks: the rank of each of these layers in the static arm, by name.
    min_ratio: least active rank as a share of the max rank, in (0, 1].
    match: whether the mean active rank (`activated`) or the max rank (`total`) is the static rank.
    multiple_of: active ranks are multiples of this, except for a max rank that is the static rank
      (`total`) or min(D_in, D_out).
    adaptive_layers: names of the layers whose rank follows the schedule, all by default; the others
      have the static rank in every bucket.

  Raises:
    UserError: `multiple_of` is above a layer's static rank, or no rank meets the mean to within it.
  """
  segments, levels = quantize(height, num_buckets)
  counts = np.bincount(RankPlan(len(height), segments, ()).bucket_of_timestep)

  @functools.cache  # blocks repeat the same few shapes
  def layer_ranks(dim_in: int, dim_out: int, target: int, adapts: bool) -> LayerRanks:
    if not adapts:
      return LayerRanks(target, (target,) * len(levels))
    if multiple_of > target:
      raise UserError(
        f"rank.multiple_of={multiple_of} is above the static rank {target} of a {dim_in} x "
        f"{dim_out} layer: lower it, raise rank.ratio, or keep the layer dense by rank.dense_layers"
      )
    if match == "total":
      return LayerRanks(target, bucket_ranks(levels, target, min_ratio, multiple_of))
    largest = min(dim_in, dim_out)
    active = match_activated(target, largest, levels, counts, min_ratio, multiple_of)
    total = int(np.dot(active, counts))
    if abs(total - target * len(height)) > multiple_of * len(height):
      raise UserError(
        f"rank.match=activated cannot be met by a {dim_in} x {dim_out} layer: with the largest "
        f"possible rank {largest} its mean active rank is {total / len(height):.1f}, not the "
        f"static {target}: lower rank.ratio (or init.energy), raise rank.min_ratio, or use "
        "rank.match=total"
      )
    return LayerRanks(target, active)

  adaptive = layer_shapes if adaptive_layers is None else adaptive_layers
  layers = {n: layer_ranks(*d, static_ranks[n], n in adaptive) for n, d in layer_shapes.items()}
  return RankPlan(len(height), segments, tuple(layers.items()))
