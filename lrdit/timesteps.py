"""Training timesteps: stratified draws, and the rank groups they make static.

Example j of a global batch of B draws t uniformly from the stratum
[jT/B, (j+1)T/B): a low-discrepancy sampler (Kingma et al. 2021, Variational
Diffusion Models, appendix I.1). Over the batch each t keeps its uniform
distribution, and the largest rank slot j can need is known before compilation.

Axes: B global batch, b = B / devices local batch.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lrdit.rank_schedule import RankPlan

COMPUTES = ("masked", "grouped")


def stratum_bounds(
  batch_size: int, num_train_timesteps: int
) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
  """First and last timestep that each slot can draw.

  Returns:
    two (B,) int64 arrays, both inclusive.
  """
  j = np.arange(batch_size)
  first = j * num_train_timesteps // batch_size
  last = -(-(j + 1) * num_train_timesteps // batch_size) - 1
  return first, last


def stratified_timesteps(
  uniform: Float[Array, " b"], index: Int[Array, " b"], batch_size: int, num_train_timesteps: int
) -> Int[Array, " b"]:
  """t = floor((index + uniform) T / B), without rounding across strata.

  Args:
    uniform: (b,) float32 in [0, 1).
    index: (b,) int32 global example index j in [0, B).
    batch_size: global batch B.
    num_train_timesteps: T.

  Returns:
    (b,) int32 in [0, T).
  """
  first, last = stratum_bounds(batch_size, num_train_timesteps)
  j = np.arange(batch_size)
  offset = (j * num_train_timesteps % batch_size) / batch_size
  width = num_train_timesteps / batch_size
  t = jnp.floor(jnp.asarray(offset, jnp.float32)[index] + uniform * width).astype(jnp.int32)
  return jnp.minimum(jnp.asarray(first, jnp.int32)[index] + t, jnp.asarray(last, jnp.int32)[index])


def global_index(
  device_index: Int[Array, ""] | int, local_batch: int, num_devices: int
) -> Int[Array, " b"]:
  """(b,) global example index of each local slot: i * devices + device.

  Interleaved, so that every device meets every rank and one program with
  static group sizes serves them all.
  """
  return jnp.arange(local_batch, dtype=jnp.int32) * num_devices + device_index


def rank_groups(
  plan: RankPlan, compute: str, batch_size: int, num_devices: int
) -> tuple[tuple[int, int], ...]:
  """Static (group size, rank bucket) of a device's slots.

  Args:
    plan: the rank plan.
    compute: `masked` (one group at the top bucket) or `grouped` (runs of slots,
      each at the largest bucket any of its timesteps can need, on any device).
    batch_size: global batch B, divisible by `num_devices`.
    num_devices: devices the batch is spread over.

  Returns:
    groups whose sizes sum to B / num_devices.
  """
  local_batch = batch_size // num_devices
  if compute == "masked":
    return ((local_batch, plan.num_buckets - 1),)
  first, last = stratum_bounds(batch_size, plan.num_train_timesteps)
  table = plan.bucket_of_timestep
  need = np.array([table[a : b + 1].max() for a, b in zip(first, last, strict=True)])
  need = need.reshape(local_batch, num_devices).max(axis=1)
  starts = np.flatnonzero(np.diff(need, prepend=-1))
  sizes = np.diff([*starts, local_batch])
  return tuple((int(n), int(need[s])) for n, s in zip(sizes, starts, strict=True))
