"""The order in which a run reads its data, and the threads that read ahead.

The order and the flips are functions of (seed, step, global index) alone, so any
step's batch can be made without having made the ones before, by any process.

Axes: N examples, H W image, C channels, n devices, b local batch.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from lrdit.data import digits, folder, tfds
from lrdit.data.source import DataOptions, Source
from lrdit.runtime.errors import UserError

# Reading is spread over at most this many threads, each making a batch: the
# decoders let go of the interpreter's lock, the rest of the work does not.
MAX_THREADS = 16


@dataclasses.dataclass(frozen=True)
class Loader:
  """How to come by a split, of its name and options.

  Attributes:
    load: opens it.
    fingerprint: the part of its source's fingerprint that is known without reading it.
  """

  load: Callable[[str, DataOptions], Source]
  fingerprint: Callable[[str, DataOptions], dict[str, Any]]


LOADERS = {
  "digits": Loader(digits.load_digits, digits.fingerprint_digits),
  **{
    name: Loader(
      functools.partial(tfds.load_tfds, dataset),
      functools.partial(tfds.fingerprint_tfds, dataset),
    )
    for name, dataset in tfds.DATASETS.items()
  },
  "folder": Loader(folder.load_folder, folder.fingerprint_folder),
  "npz": Loader(folder.load_npz, folder.fingerprint_npz),
}

# Keeps the draws of orders, flips and held-out slots apart.
_ORDER_STREAM, _FLIP_STREAM, _SLOT_STREAM = 0, 1, 2


def make_source(name: str, split: str, options: DataOptions) -> Source:
  """The split of a dataset by its `data.name`.

  Args:
    name: one of `LOADERS`.
    split: "train" or "eval".
    options: how to read it.

  Raises:
    UserError: unknown name, or data that is missing or damaged.
  """
  if name not in LOADERS:
    raise UserError(f"data.name={name!r} is unknown: use one of {', '.join(LOADERS)}")
  return LOADERS[name].load(split, options)


def _generator(seed: int, stream: int, number: int) -> np.random.Generator:
  return np.random.Generator(np.random.Philox(key=[seed + (stream << 32), number]))


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_examples: int) -> Int[np.ndarray, " N"]:
  """The permutation in which an epoch reads the examples: (num_examples,)."""
  return _generator(seed, _ORDER_STREAM, epoch).permutation(num_examples)


def flips(seed: int, step: int, slots: Int[np.ndarray, "*shape"]) -> Bool[np.ndarray, "*shape"]:
  """Which examples of a step are mirrored, each with probability one half.

  Args:
    seed: the run's seed.
    step: the step.
    slots: global example indices, any shape.
  """
  draws = _generator(seed, _FLIP_STREAM, step).random(int(slots.max()) + 1)
  return draws[slots] < 0.5


def example_index(
  seed: int, position: Int[np.ndarray, "*shape"], num_examples: int
) -> Int[np.ndarray, "*shape"]:
  """Which example stands at each position of the endless shuffled stream.

  Args:
    seed: the run's seed.
    position: int64 positions, any shape; step s of batch B reads [s B, (s+1) B).
    num_examples: N.

  Returns:
    int64 of position's shape, in [0, N).
  """
  epoch, offset = np.divmod(np.asarray(position, np.int64), num_examples)
  index = np.empty_like(offset)
  for e in np.unique(epoch):
    index[epoch == e] = epoch_order(seed, int(e), num_examples)[offset[epoch == e]]
  return index


def _gather(
  source: Source, index: Int[np.ndarray, "n b"], flip: Bool[np.ndarray, "n b"]
) -> dict[str, Any]:
  """`Source.gather` with a leading device axis."""
  flat = source.gather(index.reshape(-1), flip.reshape(-1))
  return {name: rows.reshape(*index.shape, *rows.shape[1:]) for name, rows in flat.items()}


def read_ahead(make: Callable[[int], Any], numbers: Iterable[int]) -> Iterator[Any]:
  """`make(i)` for each number in order, computed by threads before it is asked for.

  What `make` raises is raised here, in its turn. Closing the iterator, or
  leaving it to be collected, ends the threads.
  """
  num_threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
  with concurrent.futures.ThreadPoolExecutor(num_threads, "read_ahead") as pool:
    pending: collections.deque[concurrent.futures.Future] = collections.deque()
    try:
      for number in numbers:
        pending.append(pool.submit(make, number))
        if len(pending) > 2 * num_threads:
          yield pending.popleft().result()
      while pending:
        yield pending.popleft().result()
    finally:
      pool.shutdown(wait=False, cancel_futures=True)


def train_batches(
  source: Source,
  seed: int,
  slots: Int[np.ndarray, "n b"],
  batch_size: int,
  steps: range,
  flip: bool,
) -> Iterator[dict[str, np.ndarray]]:
  """The training batches of some steps.

  Args:
    source: the training split.
    seed: the run's seed.
    slots: (n, b) global example index of every local slot.
    batch_size: global batch B.
    steps: the steps whose batches are wanted.
    flip: mirror each image left to right with probability one half.

  Yields:
    what `Source.gather` gives, with the axes (n, b) in front.
  """

  def make(step: int) -> dict[str, np.ndarray]:
    index = example_index(seed, step * batch_size + slots, len(source))
    mirrored = flips(seed, step, slots) if flip else np.zeros(slots.shape, bool)
    return _gather(source, index, mirrored)

  return read_ahead(make, steps)


def eval_batches(
  source: Source, slots: Int[np.ndarray, "n b"], batch_size: int, shift: float = 0.0
) -> Iterator[dict[str, np.ndarray]]:
  """Yield each held-out example once, a batch of neighbours at a time, the last one padded.

  A slot stands for a stratum of timesteps. So an example's place among its batch's slots is
  that of a number drawn for its index alone: in the order of the split, a split sorted by
  class would tie class to timestep. And the padding is spread evenly over the slots: at the
  end of the batch it would leave out the noisy ones.

  Args:
    source: the held-out split.
    slots: (n, b) global example indices of this process's devices.
    batch_size: global.
    shift: in [0, 1), the share of a batch by which examples move on over the
      slots, going round, so that each meets another stratum.

  Yields:
    as `train_batches`, plus "weight" (n, b) float32, 0 for padding.
  """
  # No run's own seed, so that runs can be compared.
  place = _generator(0, _SLOT_STREAM, 0).random(len(source))

  def make(start: int) -> dict[str, np.ndarray]:
    count = min(batch_size, len(source) - start)
    offset, remainder = np.divmod(slots * count, batch_size)
    order = start + np.argsort(place[start : start + count], kind="stable")
    index = order[(offset + int(shift * count)) % count]
    batch = _gather(source, index, np.zeros(slots.shape, bool))
    return batch | {"weight": (remainder < count).astype(np.float32)}

  return read_ahead(make, range(0, len(source), batch_size))
