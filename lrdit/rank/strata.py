"""Strata: the range of timesteps of each slot in the batch, and the static ranks that follow.

The slots of a global batch of B are spread over ranges of timesteps. A range [low, high) with n
slots is cut into n equal strata, one for each slot: with W = high - low, slot j of the range
samples t uniformly from low + [jW/n, (j+1)W/n). Ordinary training has the one range [0, T) with B
slots, which is a low-discrepancy sampler (Kingma et al. 2021, Variational Diffusion Models,
appendix I.1). Over the slots of a range each t is equally likely, and the largest rank that a slot
can need is known before compilation.

Axes: B global batch, b = B / devices local batch.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lrdit.rank.plan import RankPlan

COMPUTES = ("masked", "grouped")


@dataclasses.dataclass(frozen=True)
class Strata:
  """How the slots of a global batch are spread over timesteps; hashable.

  Attributes:
    ranges: ((low, high, count), ...): `count` slots share [low, high). Ranges are ascending and
      disjoint, so slots are in the order of t. Widths and counts are at least 1.
  """

  ranges: tuple[tuple[int, int, int], ...]

  @property
  def batch_size(self) -> int:
    """Number of slots: the global batch size B."""
    return sum(count for _, _, count in self.ranges)


def uniform_strata(batch_size: int, num_train_timesteps: int) -> Strata:
  """Return the strata of ordinary training and evaluation, all of [0, T) equally likely."""
  return Strata(((0, num_train_timesteps, batch_size),))


def _slot_table(strata: Strata) -> Int[np.ndarray, "4 B"]:
  """Return the low end, width and slot count of each slot's range, and its place j in the range."""
  low, high, count = np.array(strata.ranges, np.int64).T
  j = np.concatenate([np.arange(n) for n in count])
  return np.stack([*np.repeat([low, high - low, count], count, axis=1), j])


def stratum_bounds(strata: Strata) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
  """Return the first and the last timestep of each slot, two (B,) int64 arrays, both inclusive."""
  low, width, count, j = _slot_table(strata)
  first = low + j * width // count
  last = low - (-(j + 1) * width // count) - 1
  return first, last


def stratified_timesteps(
  uniform: Float[Array, " b"], index: Int[Array, " b"], strata: Strata
) -> Int[Array, " b"]:
  """Return t = low + floor((j + uniform) W / n), in integers: the same on every machine.

  Args:
    uniform: (b,) float32 in [0, 1), a multiple of 2^-24 as `jax.random` samples it.
    index: (b,) int32 global example index in [0, B).
    strata: of the global batch B.

  Returns:
    (b,) int32, within the strata of the slots.
  """
  first, _ = stratum_bounds(strata)
  _, width, count, j = _slot_table(strata)

  def at_slot(values: np.ndarray) -> Array:
    return jnp.asarray(values, jnp.int32)[index]

  # floor(uniform W), eight bits of `uniform` at a time so that int32 holds the products.
  bits, moved = (uniform * 2**24).astype(jnp.int32), 0
  for shift in (0, 8, 16):
    moved = ((bits >> shift & 255) * at_slot(width) + moved) >> 8
  return at_slot(first) + (at_slot(j * width % count) + moved) // at_slot(count)


def rank_groups(
  plan: RankPlan, compute: str, strata: Strata, num_devices: int
) -> tuple[tuple[int, int], ...]:
  """Return the static (group size, rank bucket) of a device's slots.

  Args:
    plan: the rank plan.
    compute: `masked` makes one group, at the largest bucket that any slot can need; `grouped`
      makes runs of slots, each at the largest bucket that its timesteps can need on any device.
    strata: of the global batch B, divisible by `num_devices`.
    num_devices: devices the batch is spread over.

  Returns:
    Groups whose sizes sum to B / num_devices.
  """
  first, last = stratum_bounds(strata)
  table = plan.bucket_of_timestep
  need = np.array([table[a : b + 1].max() for a, b in zip(first, last, strict=True)])
  need = need.reshape(-1, num_devices).max(axis=1)
  if compute == "masked":
    need = np.full_like(need, need.max())
  starts = np.flatnonzero(np.diff(need, prepend=-1))
  sizes = np.diff([*starts, len(need)])
  return tuple((int(n), int(need[s])) for n, s in zip(sizes, starts, strict=True))
