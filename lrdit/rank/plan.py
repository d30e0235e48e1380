"""Active rank as a function of the timestep: schedules, matching and buckets.

Everything here is plain integer arithmetic on the host, done once before
anything is compiled. The result, a `RankPlan`, is static and hashable.

Terms: `max_rank` R is what a layer allocates; `active_rank` r(t) <= R is what
timestep t uses, always the first r(t) components; a `rank_bucket` is one level
of the quantised schedule, numbered by ascending rank and shared by all layers.
"""

import dataclasses
import fnmatch
import functools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from lrdit.rank.schedules import floor_exact
from lrdit.runtime.errors import UserError

MATCHES = ("activated", "total")


def static_rank(ratio: float, dim_in: int, dim_out: int) -> int:
  """Rank whose factors hold `ratio` times the dense layer's parameters.

  Args:
    ratio: p in (0, 1].
    dim_in: D_in.
    dim_out: D_out.

  Returns:
    floor(p D_in D_out / (D_in + D_out)), at least 1, at most min(D_in, D_out).
  """
  rank = math.floor(ratio * dim_in * dim_out / (dim_in + dim_out) + 1e-9)
  return max(1, min(rank, dim_in, dim_out))


@dataclasses.dataclass(frozen=True)
class LayerRanks:
  """Ranks of one factorised layer.

  Attributes:
    static_rank: what the static arm would allocate (the matching target).
    active: active rank per rank bucket, ascending; the last is the max rank.
  """

  static_rank: int
  active: tuple[int, ...]

  @property
  def max_rank(self) -> int:
    """The allocated rank R."""
    return self.active[-1]


@dataclasses.dataclass(frozen=True)
class RankPlan:
  """Which rank every layer uses at every timestep; static and hashable.

  Attributes:
    num_train_timesteps: T.
    segments: (start timestep, rank bucket) of each run of timesteps that share
      a bucket, ascending, the first start being 0.
    layers: (layer name, ranks) of every factorised layer; a layer that is not
      named is dense.
  """

  num_train_timesteps: int
  segments: tuple[tuple[int, int], ...]
  layers: tuple[tuple[str, LayerRanks], ...]

  @property
  def num_buckets(self) -> int:
    """Number of rank buckets K."""
    return 1 + max(bucket for _, bucket in self.segments)

  @functools.cached_property
  def bucket_of_timestep(self) -> Int[np.ndarray, " T"]:
    """(T,) int32, the rank bucket of every timestep."""
    starts = [start for start, _ in self.segments]
    lengths = np.diff([*starts, self.num_train_timesteps])
    return np.repeat([b for _, b in self.segments], lengths).astype(np.int32)

  @functools.cached_property
  def by_name(self) -> dict[str, LayerRanks]:
    """`layers` as a dict."""
    return dict(self.layers)

  def mean_active_rank(self, name: str) -> float:
    """Mean active rank of layer `name` over all timesteps."""
    return float(np.mean(np.asarray(self.by_name[name].active)[self.bucket_of_timestep]))

  def at_bucket(self, bucket: int) -> "RankPlan":
    """The plan of a model that holds only `bucket`'s components."""
    layers = tuple(
      (name, LayerRanks(ranks.static_rank, (ranks.active[bucket],))) for name, ranks in self.layers
    )
    return RankPlan(self.num_train_timesteps, ((0, 0),), layers)


def dense_plan(num_train_timesteps: int) -> RankPlan:
  """The plan of the full arm: one bucket, no factorised layer."""
  return RankPlan(num_train_timesteps, ((0, 0),), ())


def quantise(
  height: Float[np.ndarray, " T"], num_buckets: int
) -> tuple[tuple[tuple[int, int], ...], Float[np.ndarray, " K"]]:
  """Quantises a schedule to the nearest of `num_buckets` equidistant levels.

  Args:
    height: (T,) in [0, 1], as `schedule_height` gives.
    num_buckets: number of levels, at least 1; levels no timestep falls on are
      dropped.

  Returns:
    (segments as in `RankPlan`, (K,) float64 level of each bucket in [0, 1],
    where 0 stands for the least rank and 1 for the full one).
  """
  if num_buckets == 1:
    levels = np.zeros(height.shape, np.int64)
    values = np.ones(1)
  else:
    levels = floor_exact(height * (num_buckets - 1) + 0.5)
    values = np.arange(num_buckets) / (num_buckets - 1)
  used, bucket = np.unique(levels, return_inverse=True)
  starts = np.flatnonzero(np.diff(bucket, prepend=-1))
  return tuple((int(s), int(bucket[s])) for s in starts), values[used]


def bucket_ranks(
  levels: Float[np.ndarray, " K"], max_rank: int, min_ratio: float, multiple_of: int
) -> tuple[int, ...]:
  """Active rank of one layer per bucket.

  Args:
    levels: (K,) ascending levels from `quantise`.
    max_rank: allocated rank R; the level 1 is exactly R.
    min_ratio: rank at level 0 as a share of R.
    multiple_of: every other rank is rounded to the nearest multiple of this,
      within [min(multiple_of, R), R].

  Returns:
    K ascending ranks.
  """
  min_rank = max(1, round(min_ratio * max_rank))
  rank = min_rank + (max_rank - min_rank) * levels
  rank = multiple_of * floor_exact(rank / multiple_of + 0.5)
  rank = np.clip(rank, min(multiple_of, max_rank), max_rank)
  rank = np.where(levels == 1.0, max_rank, rank)  # n / n, which no rounding touches
  return tuple(int(r) for r in rank)


def match_activated(
  target: int,
  largest_rank: int,
  levels: Float[np.ndarray, " K"],
  counts: Int[np.ndarray, " K"],
  min_ratio: float,
  multiple_of: int,
) -> tuple[int, ...]:
  """Ranks per bucket whose mean over timesteps comes nearest to `target`.

  Args:
    target: the static arm's rank.
    largest_rank: min(D_in, D_out).
    levels: (K,) from `quantise`.
    counts: (K,) number of timesteps that fall in each bucket.
    min_ratio: see `bucket_ranks`.
    multiple_of: the allocated rank is a multiple of this (or `largest_rank`).

  Returns:
    K ascending ranks; of equally near ones the smallest.
  """
  candidates = [*range(multiple_of, largest_rank, multiple_of), largest_rank]
  tables = [bucket_ranks(levels, r, min_ratio, multiple_of) for r in candidates]
  # In whole numbers: means that are equally near would differ by rounding.
  totals = np.asarray(tables) @ counts
  return tables[int(np.argmin(np.abs(totals - target * counts.sum())))]


def select_layers(
  layer_shapes: Mapping[str, tuple[int, int]],
  dense_layers: Sequence[str],
  first_n_blocks: int,
  last_n_blocks: int,
  depth: int,
) -> list[str]:
  """Names of the layers to factorise.

  Args:
    layer_shapes: layer name -> (D_in, D_out), as `dit.layer_shapes` gives.
    dense_layers: shell patterns of layers that stay dense; a pattern that fits
      a name up to a '/' covers everything below it ("blocks_0/mlp").
    first_n_blocks: if this or `last_n_blocks` is above 0, only those blocks
      are factorised, and nothing outside the blocks is.
    last_n_blocks: see `first_n_blocks`.
    depth: number of blocks.

  Raises:
    UserError: a pattern fits no layer, more blocks are asked for than exist, or
      nothing is left.
  """
  for field, n in (("first_n_blocks", first_n_blocks), ("last_n_blocks", last_n_blocks)):
    if n > depth:
      raise UserError(f"rank.{field}={n} must be at most {depth} (model.depth)")

  def covered(name, pattern):
    parts = name.split("/")
    return any(fnmatch.fnmatchcase("/".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))

  for pattern in dense_layers:
    if not any(covered(name, pattern) for name in layer_shapes):
      known = dict.fromkeys(re.sub(r"^blocks_\d+", "blocks_*", name) for name in layer_shapes)
      raise UserError(
        f"rank.dense_layers entry {pattern!r} fits no layer: the layers are {', '.join(known)}"
      )
  limited = first_n_blocks > 0 or last_n_blocks > 0
  chosen_blocks = {
    f"blocks_{i}" for i in range(depth) if i < first_n_blocks or i >= depth - last_n_blocks
  }
  chosen = [
    name
    for name in layer_shapes
    if not any(covered(name, pattern) for pattern in dense_layers)
    and (not limited or name.split("/")[0] in chosen_blocks)
  ]
  if not chosen:
    raise UserError(
      "rank.dense_layers with the choice of blocks leaves no layer to factorise: use method=full "
      "for a dense model"
    )
  return chosen


def make_plan(
  layer_shapes: Mapping[str, tuple[int, int]],
  *,
  height: Float[np.ndarray, " T"],
  ratio: float,
  min_ratio: float,
  match: str,
  num_buckets: int,
  multiple_of: int,
) -> RankPlan:
  """The rank plan of a low-rank model (design, section 2).

  The static arm is the schedule `constant` with match `total`: one bucket that
  holds each layer's static rank.

  Args:
    layer_shapes: (D_in, D_out) of the layers to factorise, by name.
    height: (T,) of the schedule, from `schedule_height` or `measured_schedule.height`.
    ratio: p, share of the dense layer's parameters the static arm keeps.
    min_ratio: least active rank as a share of the max rank, in (0, 1].
    match: `activated` (the mean active rank is the static rank) or `total`
      (the max rank is the static rank).
    num_buckets: levels of the quantised schedule.
    multiple_of: active ranks are multiples of this, except a max rank that is
      the static rank (`total`) or min(D_in, D_out).

  Raises:
    UserError: `multiple_of` is above a layer's static rank, or no rank up to
      min(D_in, D_out) meets the mean to within the multiple.
  """
  num_train_timesteps = len(height)
  segments, levels = quantise(height, num_buckets)
  lengths = np.diff([*(start for start, _ in segments), num_train_timesteps])
  counts = np.bincount([b for _, b in segments], lengths).astype(np.int64)

  @functools.cache  # blocks repeat the same few shapes
  def ranks_of(dim_in: int, dim_out: int) -> LayerRanks:
    target = static_rank(ratio, dim_in, dim_out)
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
    if abs(total - target * num_train_timesteps) > multiple_of * num_train_timesteps:
      mean = total / num_train_timesteps
      raise UserError(
        f"rank.match=activated cannot be met by a {dim_in} x {dim_out} layer: with the largest "
        f"possible rank {largest} its mean active rank is {mean:.1f}, not the static {target}: "
        "lower rank.ratio or raise rank.min_ratio"
      )
    return LayerRanks(target, active)

  layers = tuple((name, ranks_of(*dims)) for name, dims in layer_shapes.items())
  return RankPlan(num_train_timesteps, segments, layers)
