"""Training timesteps: stratified draws, and the rank groups they make static.

The slots of a global batch of B are spread over ranges of timesteps, and a
range [low, high) with n slots is cut into n equal strata, one a slot: slot j of
the range draws t uniformly from low + [jW/n, (j+1)W/n), W = high - low. Ordinary
training is the one range [0, T) with B slots: a low-discrepancy sampler (Kingma
et al. 2021, Variational Diffusion Models, appendix I.1). Over its slots each t of
a range is equally likely, and the largest rank a slot can need is known before
compilation.

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
    ranges: ((low, high, count), ...): `count` slots share [low, high). Ascending
      and disjoint, so that slots are in the order of t and those of equal rank
      are runs; widths and counts at least 1.
  """

  ranges: tuple[tuple[int, int, int], ...]

  @property
  def batch_size(self) -> int:
    """Slots in all: the global batch B."""
    return sum(count for _, _, count in self.ranges)


def uniform_strata(batch_size: int, num_train_timesteps: int) -> Strata:
  """All timesteps [0, T) equally likely: ordinary training and evaluation."""
  return Strata(((0, num_train_timesteps, batch_size),))


def _slot_table(strata: Strata) -> Int[np.ndarray, "4 B"]:
  """Of each slot: its range's low, width and count, and its place j in the range."""
  low, high, count = np.array(strata.ranges, np.int64).T
  j = np.concatenate([np.arange(n) for n in count])
  return np.stack([*np.repeat([low, high - low, count], count, axis=1), j])


def stratum_bounds(
  strata: Strata,
) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
  """First and last timestep that each slot can draw.

  Returns:
    two (B,) int64 arrays, both inclusive.
  """
  low, width, count, j = _slot_table(strata)
  first = low + j * width // count
  last = low - (-(j + 1) * width // count) - 1
  return first, last


def stratified_timesteps(
  uniform: Float[Array, " b"], index: Int[Array, " b"], strata: Strata
) -> Int[Array, " b"]:
  """t = low + floor((j + uniform) W / n), in whole numbers: the same on every machine.

  Args:
    uniform: (b,) float32 in [0, 1), a multiple of 2^-24 as `jax.random` draws it.
    index: (b,) int32 global example index in [0, B).
    strata: of the global batch B.

  Returns:
    (b,) int32, within the strata of the slots.
  """
  first, _ = stratum_bounds(strata)
  _, width, count, j = _slot_table(strata)

  def of_slot(values: np.ndarray) -> Array:
    return jnp.asarray(values, jnp.int32)[index]

  # floor(uniform W), eight bits of `uniform` at a time so that int32 holds the products.
  bits, moved = (uniform * 2**24).astype(jnp.int32), 0
  for shift in (0, 8, 16):
    moved = ((bits >> shift & 255) * of_slot(width) + moved) >> 8
  return of_slot(first) + (of_slot(j * width % count) + moved) // of_slot(count)


def rank_groups(
  plan: RankPlan, compute: str, strata: Strata, num_devices: int
) -> tuple[tuple[int, int], ...]:
  """Static (group size, rank bucket) of a device's slots.

  Args:
    plan: the rank plan.
    compute: `masked` (one group, at the largest bucket any slot can need) or
      `grouped` (runs of slots, each at the largest bucket any of its timesteps
      can need, on any device).
    strata: of the global batch B, divisible by `num_devices`.
    num_devices: devices the batch is spread over.

  Returns:
    groups whose sizes sum to B / num_devices.
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
