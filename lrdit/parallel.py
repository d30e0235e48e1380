"""The one place that knows devices: pmap for training, shardings for sampling.

Axes: n devices, B global batch, b = B / n local batch.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from lrdit.errors import UserError
from lrdit.timesteps import global_index

AXIS = "batch"

Devices = Sequence[jax.Device]


def check_divisible(field: str, size: int, devices: Devices) -> None:
  """Refuses a batch that does not divide over the devices."""
  n = len(devices)
  if size % n:
    raise UserError(f"{field}={size} is not divisible by the {n} devices: use a multiple of {n}")


def pmap(function: Callable, devices: Devices, donate_argnums: tuple[int, ...] = ()) -> Callable:
  """`jax.pmap` over `devices` with the axis the steps expect.

  The first argument is replicated state, the second a batch with a leading
  device axis, the third a key shared by all devices.
  """
  return jax.pmap(
    function,
    axis_name=AXIS,
    devices=devices,
    in_axes=(0, 0, None),
    donate_argnums=donate_argnums,
  )


def replicate(tree: Any, devices: Devices) -> Any:
  """Copies a tree to every device, with a leading device axis.

  Named as pmap names its axis: with another name the first step's outputs would
  count as differently sharded, and the second step would compile again.
  """
  return flax.jax_utils.replicate(tree, devices, axis_name=AXIS)


def prefetch(batches: Iterator[Any], devices: Devices) -> Iterator[Any]:
  """The same batches on the devices, two of them ahead of the step that asks.

  Args:
    batches: trees of arrays with a leading device axis.
    devices: as for `pmap`, whose name of the axis they are placed by.
  """
  return flax.jax_utils.prefetch_to_device(batches, 2, devices, axis_name=AXIS)


def unreplicate(tree: Any) -> Any:
  """The first local device's copy, on that device.

  Reads the device's own shard: indexing would gather across hosts, and flax's
  `unreplicate` keeps the axis where only some of several devices are used.
  """
  return jax.tree.map(lambda x: x.addressable_shards[0].data.squeeze(0), tree)


def to_host(tree: Any) -> Any:
  """Numpy copies that no later donation can overwrite."""
  return jax.tree.map(lambda x: np.array(x, copy=True), jax.device_get(tree))


def batch_slots(batch_size: int, devices: Devices) -> Int[np.ndarray, "n b"]:
  """(n, b) int64 global example index of every device's slots.

  Interleaved as `timesteps.global_index` says, so that each device meets every
  stratum of timesteps.
  """
  n = len(devices)
  slots = [np.asarray(global_index(d, batch_size // n, n), np.int64) for d in range(n)]
  return np.stack(slots)


def shardings(devices: Devices) -> tuple[NamedSharding, NamedSharding]:
  """(batch split over devices, replicated) for `jax.jit`."""
  mesh = Mesh(np.asarray(devices), (AXIS,))
  return NamedSharding(mesh, PartitionSpec(AXIS)), NamedSharding(mesh, PartitionSpec())
