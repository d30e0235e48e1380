"""Strata: the timesteps that each slot of the batch can sample, and the static ranks they imply.

The B slots of a global batch are spread over ranges of timesteps. In a range [low, high) with n
slots and W = high - low, slot j samples t uniformly from low + [jW/n, (j+1)W/n), so every t of the
range is equally likely. Ordinary training has one range [0, T) with B slots, a low-discrepancy
sampler (Kingma et al. 2021, Variational Diffusion Models, appendix I.1). The largest rank of each
slot is known before compilation.

Axes: B global batch, b = B / devices local batch.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lrdit.rank.plan import RankPlan

COMPUTES = ("masked", "grouped")
TIMESTEPS = ("stratified", "iid")


@dataclasses.dataclass(frozen=True)
class Strata:
  """How the slots of a global batch are spread over timesteps; hashable.

  Attributes:
    ranges: ((low, high, count), ...), ascending and disjoint, or equal with one slot each: `count`
      slots share [low, high). Widths and counts are at least 1.
  """

  ranges: tuple[tuple[int, int, int], ...]

  @property
  def batch_size(self) -> int:
    """The number of slots, which is the global batch size B."""
    return sum(count for _, _, count in self.ranges)


def uniform_strata(batch_size: int, num_train_timesteps: int) -> Strata:
  """Return the strata of the one range [0, T)."""
  return Strata(((0, num_train_timesteps, batch_size),))


def independent(strata: Strata) -> Strata:
  """Return strata whose slots each sample their whole range, independently of the others.

  Every slot can need its range's largest rank, so that grouped compute has one group per range.
  """
  slots = ((low, high, 1) for low, high, count in strata.ranges for _ in range(count))
  return Strata(tuple(slots))


def _slot_table(strata: Strata) -> Int[np.ndarray, "4 B"]:
  """Return the low end, width and slot count of each slot's range, and the slot's index j in it."""
  low, high, count = np.array(strata.ranges, np.int64).T
  j = np.concatenate([np.arange(n) for n in count])
  return np.stack([*np.repeat([low, high - low, count], count, axis=1), j])


def stratum_bounds(strata: Strata) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
  """Return the first and the last timestep of each slot, both inclusive, (B,) int64."""
  low, width, count, j = _slot_table(strata)
  first = low + j * width // count
  last = low - (-(j + 1) * width // count) - 1
  return first, last


def stratified_timesteps(
  uniform: Float[Array, " b"], index: Int[Array, " b"], strata: Strata
) -> Int[Array, " b"]:
  """Return t = low + floor((j + uniform) W / n), (b,) int32, in exact integer arithmetic.

  Args:
    uniform: float32 in [0, 1), a multiple of 2^-24 as `jax.random` samples it.
    index: int32 global example index in [0, B).
    strata: of the global batch.
  """
  first, _ = stratum_bounds(strata)
  _, width, count, j = _slot_table(strata)

  def at_slot(values: np.ndarray) -> Array:
    return jnp.asarray(values, jnp.int32)[index]

  # floor(uniform W), with eight bits of `uniform` at a time so that products fit into int32.
  bits, moved = (uniform * 2**24).astype(jnp.int32), 0
  for shift in (0, 8, 16):
    moved = ((bits >> shift & 255) * at_slot(width) + moved) >> 8
  return at_slot(first) + (at_slot(j * width % count) + moved) // at_slot(count)


def rank_groups(
  plan: RankPlan, compute: str, strata: Strata, num_shares: int
) -> tuple[tuple[int, int], ...]:
  """Return the static (group size, rank bucket) pairs of a share's B / num_shares slots.

  Args:
    compute: `masked` makes one group at the largest bucket that any slot can need; `grouped` makes
      runs of slots, each at the largest bucket that it can need in any share.
    strata: of the global batch B, divisible by `num_shares`.
    num_shares: how many interleaved parts of the batch run this program: devices, times the
      microbatches of each.
  """
  first, last = stratum_bounds(strata)
  table = plan.bucket_of_timestep
  need = np.array([table[a : b + 1].max() for a, b in zip(first, last, strict=True)])
  need = need.reshape(-1, num_shares).max(axis=1)
  if compute == "masked":
    need = np.full_like(need, need.max())
  starts = np.flatnonzero(np.diff(need, prepend=-1))
  sizes = np.diff([*starts, len(need)])
  return tuple((int(n), int(need[s])) for n, s in zip(sizes, starts, strict=True))
