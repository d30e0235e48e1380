"""The only module that makes pmaps, for training, and shardings, for sampling.

Every process runs the same program on its host's devices. Training's collectives span all devices.
Sampling has none, and each process computes its own rows of a batch. Axes: n devices of this
process, N devices in all, P processes, B global batch, b = B / N local batch.
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
  """Return the devices that belong to this process."""
  return [device for device in devices if device.process_index == jax.process_index()]


def gather_rows(rows: np.ndarray) -> np.ndarray:
  """Gather each process's (B / P, ...) rows into the (B, ...) rows of all, in process order."""
  if jax.process_count() == 1:
    return rows
  return multihost_utils.process_allgather(rows, tiled=True)


def own_rows(size: int) -> slice:
  """Return this process's rows of a batch of `size`, which P divides."""
  share = size // jax.process_count()
  return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def check_divisible(field: str, size: int, devices: Devices) -> None:
  """Raise a `UserError` unless a batch divides over the devices."""
  n = len(devices)
  if size % n:
    raise UserError(f"{field}={size} is not divisible by the {n} devices: use a multiple of {n}")


def pmap(function: Callable, devices: Devices, donate_argnums: tuple[int, ...] = ()) -> Callable:
  """Return the pmapped step of (replicated state, batch with a device axis, shared key)."""
  mapped = jax.pmap(
    function, AXIS, in_axes=(0, 0, None), devices=devices, donate_argnums=donate_argnums
  )
  if jax.process_count() == 1 or devices[0].platform != "cpu":
    return mapped
  # With several steps in flight on several processes' CPU devices, gloo deadlocks.
  return lambda *args: jax.block_until_ready(mapped(*args))


def replicate(tree: Any, devices: Devices) -> Any:
  """Copy a tree to this process's devices, with a leading device axis."""
  # With another axis name than pmap's, the first step's outputs would count as sharded differently,
  # and the second step would compile again.
  return flax.jax_utils.replicate(tree, own_devices(devices), axis_name=AXIS)


def make_replicated(make: Callable[[], Any], devices: Devices) -> Any:
  """Return `replicate(make(), devices)`, computed on the devices by one compiled call."""
  count = len(own_devices(devices))

  def make_copies() -> Any:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), make())

  return jax.jit(make_copies, out_shardings=shardings(devices)[0])()


def prefetch(batches: Iterator[Any], devices: Devices) -> Iterator[Any]:
  """Yield batches with a device axis from this process's devices, two of them ahead of the step."""
  return flax.jax_utils.prefetch_to_device(batches, 2, own_devices(devices), axis_name=AXIS)


def unreplicate(tree: Any) -> Any:
  """Return the first local device's copy of a replicated tree, on that device."""
  # Indexing would gather across hosts, and flax's `unreplicate` keeps the axis where a run uses
  # some of several devices.
  return jax.tree.map(lambda x: x.addressable_shards[0].data.squeeze(0), tree)


def read(tree: Any) -> Any:
  """Return the first local device's copy of a replicated tree as numpy arrays."""
  # An operation on the device would wait for all steps in flight, not for this copy alone.
  return jax.tree.map(lambda x: np.array(x.addressable_shards[0].data)[0], tree)


def to_host(tree: Any) -> Any:
  """Return numpy copies of a tree, which no later donation overwrites."""
  return jax.tree.map(lambda x: np.array(x, copy=True), jax.device_get(tree))


def batch_slots(batch_size: int, devices: Devices) -> Int[np.ndarray, "n b"]:
  """Return the (n, b) int64 `global_index` of the slots on this process's devices."""
  own, count = own_devices(devices), len(devices)
  indices = [d for d, device in enumerate(devices) if device in own]
  slots = [np.asarray(global_index(d, batch_size // count, count), np.int64) for d in indices]
  return np.stack(slots)


def global_index(
  device_index: Int[Array, ""] | int, local_batch: int, num_devices: int
) -> Int[Array, " b"]:
  """Return the (b,) int32 global example index of each local slot: i * devices + device.

  Interleaving gives every device examples of every rank and timestep stratum, so that one program
  with static group sizes serves all devices.
  """
  return jnp.arange(local_batch, dtype=jnp.int32) * num_devices + device_index


def run_batches(function: Callable[[np.ndarray], Any], rows: np.ndarray, batch_size: int) -> Any:
  """Return the function's outputs for all rows, on the host.

  The last batch is padded with zeros, so that the function compiles for one shape. Each batch is
  fetched while the next one is computed.
  """
  outputs = []
  for start in range(0, max(1, len(rows)), batch_size):  # no rows still have an output's shape
    batch = rows[start : start + batch_size]
    padding = ((0, batch_size - len(batch)), *[(0, 0)] * (rows.ndim - 1))
    outputs.append(function(np.pad(batch, padding)))
    outputs[-2:-1] = jax.device_get(outputs[-2:-1])
  outputs[-1:] = jax.device_get(outputs[-1:])
  return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(rows)], *outputs)


def shardings(devices: Devices) -> tuple[NamedSharding, NamedSharding]:
  """Return (rows split over this process's devices, replicated) for `jax.jit`."""
  mesh = Mesh(np.asarray(own_devices(devices)), (AXIS,))
  return NamedSharding(mesh, PartitionSpec(AXIS)), NamedSharding(mesh, PartitionSpec())
