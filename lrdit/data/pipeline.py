"""The order in which a run reads its data, and the batches read ahead by threads.

Order and flips are functions of (seed, step, global index) alone, so that any process can make
the batch of any step without those before it.

Axes: N examples, H W image, C channels, n devices, b local batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from lrdit.data import digits, folder, npz, tfds
from lrdit.data.source import DataOptions, Source, read_ahead
from lrdit.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Loader:
  """How to read a dataset.

  Attributes:
    load: opens a split, "train" or "eval".
    fingerprint: returns the part of the source's fingerprint that is known without reading it.
    crop_size: side in pixels of the center crop before resizing, or 0 for the short side.
  """

  load: Callable[[str, DataOptions], Source]
  fingerprint: Callable[[str, DataOptions], dict[str, Any]]
  crop_size: int = 0


# The loaders by `data.name`. A new dataset is a module with these two functions and a line here.
LOADERS = {
  "digits": Loader(digits.load_digits, digits.fingerprint_digits),
  **{
    name: Loader(
      functools.partial(tfds.load_tfds, dataset),
      functools.partial(tfds.fingerprint_tfds, dataset),
      dataset.crop_size,
    )
    for name, dataset in tfds.DATASETS.items()
  },
  "folder": Loader(folder.load_folder, folder.fingerprint_folder),
  "npz": Loader(npz.load_npz, npz.fingerprint_npz),
}

# Streams keep the random numbers of orders, flips and held-out slots apart.
_ORDER_STREAM, _FLIP_STREAM, _SLOT_STREAM = 0, 1, 2


def make_source(name: str, split: str, options: DataOptions) -> Source:
  """Open a split, "train" or "eval", of a dataset; raise UserError if there is none."""
  if name not in LOADERS:
    raise UserError(f"data.name={name!r} is unknown: use one of {', '.join(LOADERS)}")
  return LOADERS[name].load(split, options)


def _generator(seed: int, stream: int, number: int) -> np.random.Generator:
  return np.random.Generator(np.random.Philox(key=[seed + (stream << 32), number]))


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_examples: int) -> Int[np.ndarray, " N"]:
  """Return the permutation of the examples in an epoch."""
  return _generator(seed, _ORDER_STREAM, epoch).permutation(num_examples)


def flips(seed: int, step: int, slots: Int[np.ndarray, "*shape"]) -> Bool[np.ndarray, "*shape"]:
  """Return whether each global batch index of a step is mirrored, with probability one half."""
  uniform = _generator(seed, _FLIP_STREAM, step).random(int(slots.max()) + 1)
  return uniform[slots] < 0.5


def example_index(
  seed: int, position: Int[np.ndarray, "*shape"], num_examples: int
) -> Int[np.ndarray, "*shape"]:
  """Return the example at each position of the endless shuffled stream, as int64 in [0, N).

  Step s of batch size B reads the positions [s B, (s+1) B).
  """
  epoch, offset = np.divmod(np.asarray(position, np.int64), num_examples)
  index = np.empty_like(offset)
  for e in np.unique(epoch):
    index[epoch == e] = epoch_order(seed, int(e), num_examples)[offset[epoch == e]]
  return index


def _gather(
  source: Source, index: Int[np.ndarray, "n b"], flip: Bool[np.ndarray, "n b"]
) -> dict[str, Any]:
  flat = source.gather(index.reshape(-1), flip.reshape(-1))
  return {name: rows.reshape(*index.shape, *rows.shape[1:]) for name, rows in flat.items()}


def train_batches(
  source: Source,
  seed: int,
  slots: Int[np.ndarray, "n b"],
  batch_size: int,
  steps: range,
  flip: bool,
) -> Iterator[dict[str, np.ndarray]]:
  """Yield the training batches of `steps`: `Source.gather` with leading axes (n, b).

  `slots` are the global batch indices of the local examples; `batch_size` is global. With `flip`,
  each image is mirrored left to right with probability one half.
  """

  def make(step: int) -> dict[str, np.ndarray]:
    index = example_index(seed, step * batch_size + slots, len(source))
    mirrored = flips(seed, step, slots) if flip else np.zeros(slots.shape, bool)
    return _gather(source, index, mirrored)

  return read_ahead(make, steps)


def eval_batches(
  source: Source, slots: Int[np.ndarray, "n b"], batch_size: int, shift: float = 0.0
) -> Iterator[dict[str, np.ndarray]]:
  """Yield each held-out example once, in batches of neighbors, the last one padded.

  A slot stands for a stratum of timesteps. A random number for an example's index alone ranks it
  among its batch's slots: the order of a split sorted by class would tie class to timestep. The
  padding is spread evenly over the slots, as at the end it would leave out the noisy ones.

  Examples move cyclically over the slots by `shift`, a share of a batch in [0, 1). Batches are as
  from `train_batches`, plus "weight" (n, b) float32, 0 for padding.
  """
  # The seed is not the run's: runs must be comparable.
  place = _generator(0, _SLOT_STREAM, 0).random(len(source))

  def make(start: int) -> dict[str, np.ndarray]:
    count = min(batch_size, len(source) - start)
    offset, remainder = np.divmod(slots * count, batch_size)
    order = start + np.argsort(place[start : start + count], kind="stable")
    index = order[(offset + int(shift * count)) % count]
    batch = _gather(source, index, np.zeros(slots.shape, bool))
    return batch | {"weight": (remainder < count).astype(np.float32)}

  return read_ahead(make, range(0, len(source), batch_size))
