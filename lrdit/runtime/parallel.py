"""The one place that puts arrays on devices: pmap for training, shardings for sampling.

Every process runs the same program on the devices of its own host. Training's collectives go over
all devices; sampling has none, and each process computes its rows of a batch. Axes: n devices of
this process, N devices in all, P processes, B global batch, b = B / N local batch.
"""

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

Devices = Sequence[jax.Device]  # of all processes, process by process


def all_devices() -> Devices:
  """Return the devices of all processes, process by process."""
  return jax.devices()


def own_devices(devices: Devices) -> Devices:
  """Return those devices that belong to this process."""
  return [device for device in devices if device.process_index == jax.process_index()]


def gather_rows(rows: np.ndarray) -> np.ndarray:
  """Gather the (B / P, ...) rows of each process to the (B, ...) rows of all, in their order."""
  if jax.process_count() == 1:
    return rows
  return multihost_utils.process_allgather(rows, tiled=True)


def own_rows(size: int) -> slice:
  """Return this process's rows of a batch of `size`, which P divides."""
  share = size // jax.process_count()
  return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def check_divisible(field: str, size: int, devices: Devices) -> None:
  """Raise a `UserError` for a batch that does not divide over the devices."""
  n = len(devices)
  if size % n:
    raise UserError(f"{field}={size} is not divisible by the {n} devices: use a multiple of {n}")


def pmap(function: Callable, devices: Devices, donate_argnums: tuple[int, ...] = ()) -> Callable:
  """Return `jax.pmap` of a step over devices, with the axis name that the steps expect.

  The step's arguments are replicated state, a batch with a leading axis of this process's devices,
  and a key that all devices share.
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
  # Several steps in flight on the CPU devices of several processes deadlock in gloo.
  return lambda *args: jax.block_until_ready(mapped(*args))


def replicate(tree: Any, devices: Devices) -> Any:
  """Copy a tree to this process's devices, with a leading device axis.

  The axis has pmap's name. With another name the first step's outputs would count as sharded
  differently, and the second step would compile again.
  """
  return flax.jax_utils.replicate(tree, own_devices(devices), axis_name=AXIS)


def make_replicated(make: Callable[[], Any], devices: Devices) -> Any:
  """Return `replicate(make(), devices)`, made on the devices by one compiled call."""
  count = len(own_devices(devices))

  def make_copies() -> Any:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), make())

  return jax.jit(make_copies, out_shardings=shardings(devices)[0])()


def prefetch(batches: Iterator[Any], devices: Devices) -> Iterator[Any]:
  """Yield batches for `pmap` from this process's devices, two of them ahead of the step.

  Args:
    batches: trees of arrays with a leading axis of this process's devices.
    devices: as for `pmap`.
  """
  return flax.jax_utils.prefetch_to_device(batches, 2, own_devices(devices), axis_name=AXIS)


def unreplicate(tree: Any) -> Any:
  """Return the first local device's copy of a replicated tree, on that device.

  Indexing would gather across hosts, and flax's `unreplicate` keeps the axis where a run uses some
  of several devices.
  """
  return jax.tree.map(lambda x: x.addressable_shards[0].data.squeeze(0), tree)


def read(tree: Any) -> Any:
  """Return the first local device's copy of a replicated tree as numpy arrays.

  It waits for that copy alone: an operation on the device would wait for all steps in flight.
  """
  return jax.tree.map(lambda x: np.array(x.addressable_shards[0].data)[0], tree)


def to_host(tree: Any) -> Any:
  """Return numpy copies of a tree, which no later donation can overwrite."""
  return jax.tree.map(lambda x: np.array(x, copy=True), jax.device_get(tree))


def batch_slots(batch_size: int, devices: Devices) -> Int[np.ndarray, "n b"]:
  """Return the (n, b) int64 `global_index` of the slots of this process's devices."""
  own, count = own_devices(devices), len(devices)
  slots = [
    np.asarray(global_index(d, batch_size // count, count), np.int64)
    for d, device in enumerate(devices)
    if device in own
  ]
  return np.stack(slots)


def global_index(
  device_index: Int[Array, ""] | int, local_batch: int, num_devices: int
) -> Int[Array, " b"]:
  """Return the (b,) global example index of each local slot: i * devices + device.

  Interleaved slots give every device examples of every rank and stratum of timesteps, so that one
  program with static group sizes serves all devices.
  """
  return jnp.arange(local_batch, dtype=jnp.int32) * num_devices + device_index


def shardings(devices: Devices) -> tuple[NamedSharding, NamedSharding]:
  """Return (rows split over this process's devices, replicated) for `jax.jit`."""
  mesh = Mesh(np.asarray(own_devices(devices)), (AXIS,))
  return NamedSharding(mesh, PartitionSpec(AXIS)), NamedSharding(mesh, PartitionSpec())
