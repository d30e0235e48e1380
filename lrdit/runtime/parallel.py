"""The one place that places arrays on devices: pmap for training, shardings for sampling.

Every process runs the same program on the devices of its own host. Training's
collectives go over all devices; sampling has none, and each process computes
its rows of a batch. Files are the first process's.

Axes: n devices of this process, N devices in all, P processes, B global batch,
b = B / N local batch.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from lrdit.runtime.errors import UserError

AXIS = "batch"

log = logging.getLogger("lrdit")

# Of all processes, process by process.
Devices = Sequence[jax.Device]


def all_devices() -> Devices:
  """The devices of all processes, process by process."""
  return jax.devices()


def own_devices(devices: Devices) -> Devices:
  """Those of this process."""
  return [device for device in devices if device.process_index == jax.process_index()]


def gather_rows(rows: np.ndarray) -> np.ndarray:
  """(B / P, ...) rows of each process to the (B, ...) of all, in order of the processes."""
  if jax.process_count() == 1:
    return rows
  return multihost_utils.process_allgather(rows, tiled=True)


def own_rows(size: int) -> slice:
  """This process's rows of a batch of `size`, which P divides."""
  share = size // jax.process_count()
  return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def check_divisible(field: str, size: int, devices: Devices) -> None:
  """Refuses a batch that does not divide over the devices."""
  n = len(devices)
  if size % n:
    raise UserError(f"{field}={size} is not divisible by the {n} devices: use a multiple of {n}")


def pmap(function: Callable, devices: Devices, donate_argnums: tuple[int, ...] = ()) -> Callable:
  """`jax.pmap` over `devices` with the axis the steps expect.

  The first argument is replicated state, the second a batch with a leading
  axis of this process's devices, the third a key shared by all devices.
  """
  mapped = jax.pmap(
    function,
    axis_name=AXIS,
    devices=devices,
    in_axes=(0, 0, None),
    donate_argnums=donate_argnums,
  )
  if jax.process_count() == 1 or devices[0].platform != "cpu":
    return mapped
  # Several steps in flight on several CPU devices of several processes deadlock in gloo.
  return lambda *args: jax.block_until_ready(mapped(*args))


def replicate(tree: Any, devices: Devices) -> Any:
  """Copies a tree to this process's devices, with a leading device axis.

  Named as pmap names its axis: with another name the first step's outputs would
  count as differently sharded, and the second step would compile again.
  """
  return flax.jax_utils.replicate(tree, own_devices(devices), axis_name=AXIS)


def make_replicated(make: Callable[[], Any], devices: Devices) -> Any:
  """Return `replicate(make(), devices)`, made on the devices by one compiled call."""
  own = own_devices(devices)

  def make_copies() -> Any:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (len(own), *x.shape)), make())

  return jax.jit(make_copies, out_shardings=shardings(devices)[0])()


def prefetch(batches: Iterator[Any], devices: Devices) -> Iterator[Any]:
  """The same batches on this process's devices, two of them ahead of the step that asks.

  Args:
    batches: trees of arrays with a leading axis of this process's devices.
    devices: as for `pmap`, whose name of the axis they are placed by.
  """
  own = own_devices(devices)
  return flax.jax_utils.prefetch_to_device(batches, 2, own, axis_name=AXIS)


def unreplicate(tree: Any) -> Any:
  """The first local device's copy, on that device.

  Reads the device's own shard: indexing would gather across hosts, and flax's
  `unreplicate` keeps the axis where only some of several devices are used.
  """
  return jax.tree.map(lambda x: x.addressable_shards[0].data.squeeze(0), tree)


def read(tree: Any) -> Any:
  """Numpy copies of the first local device's copy, which alone is waited for.

  No operation of the device: one would queue up behind the steps dispatched since.
  """
  return jax.tree.map(lambda x: np.array(x.addressable_shards[0].data)[0], tree)


def to_host(tree: Any) -> Any:
  """Numpy copies that no later donation can overwrite."""
  return jax.tree.map(lambda x: np.array(x, copy=True), jax.device_get(tree))


def batch_slots(batch_size: int, devices: Devices) -> Int[np.ndarray, "n b"]:
  """(n, b) int64 global example index of the slots of each of this process's devices.

  Interleaved as `global_index` says, so that each device meets every
  stratum of timesteps.
  """
  own, count = own_devices(devices), len(devices)
  slots = [
    np.asarray(global_index(d, batch_size // count, count), np.int64)
    for d, device in enumerate(devices)
    if device in own
  ]
  return np.stack(slots)


def shardings(devices: Devices) -> tuple[NamedSharding, NamedSharding]:
  """(rows split over this process's devices, replicated) for `jax.jit`."""
  mesh = Mesh(np.asarray(own_devices(devices)), (AXIS,))
  return NamedSharding(mesh, PartitionSpec(AXIS)), NamedSharding(mesh, PartitionSpec())


def global_index(
  device_index: Int[Array, ""] | int, local_batch: int, num_devices: int
) -> Int[Array, " b"]:
  """(b,) global example index of each local slot: i * devices + device.

  Interleaved, so that every device meets every rank and one program with
  static group sizes serves them all.
  """
  return jnp.arange(local_batch, dtype=jnp.int32) * num_devices + device_index
