"""Datasets and the order in which a run reads them.

A source is random access; the order is a function of (seed, position) alone,
so any step's batch can be made without having made the ones before.

Axes: N examples, H W image, C channels, n devices, b local batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Int, Shaped

from lrdit.errors import UserError

EVAL_EVERY = 6  # of the digits, every sixth is held out


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """A split of a dataset.

  Attributes:
    images: (N, H, W, C) uint8 in [0, 255] or float32 in [-1, 1]; anything that
      takes an index array, memory-mapped ones included.
    labels: (N,) int32.
    num_classes: classes the labels count.
  """

  images: Shaped[np.ndarray, "N H W C"]
  labels: Int[np.ndarray, " N"]
  num_classes: int

  def __len__(self) -> int:
    return len(self.images)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C)."""
    return tuple(self.images.shape[1:])

  def gather(self, index: Int[np.ndarray, "n b"]) -> dict[str, np.ndarray]:
    """ "image" float32 in [-1, 1] and "label" int32, shaped like `index`."""
    images = self.images[index.reshape(-1)]
    if images.dtype == np.uint8:
      images = images.astype(np.float32) / 127.5 - 1.0
    return {
      "image": images.reshape(*index.shape, *self.image_shape),
      "label": self.labels[index.reshape(-1)].reshape(index.shape),
    }


def load_digits(split: str) -> Source:
  """scikit-learn's 1,797 handwritten digits, 8x8 grey, 10 classes.

  Args:
    split: "train" (1,498) or "eval" (299, every sixth scan).

  Returns:
    float32 images in [-1, 1] (17 grey levels).
  """
  from sklearn import datasets  # slow to import, and only needed here

  digits = datasets.load_digits()
  held_out = np.arange(len(digits.target)) % EVAL_EVERY == EVAL_EVERY - 1
  keep = held_out if split == "eval" else ~held_out
  images = (digits.images[keep, :, :, None] / 8.0 - 1.0).astype(np.float32)
  return Source(images, digits.target[keep].astype(np.int32), 10)


SOURCES: dict[str, Callable[[str], Source]] = {"digits": load_digits}


def make_source(name: str, split: str) -> Source:
  """The split of a dataset by its `data.name`.

  Raises:
    UserError: unknown name.
  """
  if name not in SOURCES:
    raise UserError(f"data.name={name!r} is unknown: use one of {', '.join(SOURCES)}")
  return SOURCES[name](split)


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_examples: int) -> Int[np.ndarray, " N"]:
  """The permutation in which an epoch reads the examples: (num_examples,)."""
  bits = np.random.Philox(key=[seed, epoch])
  return np.random.Generator(bits).permutation(num_examples)


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


def train_batches(
  source: Source, seed: int, slots: Int[np.ndarray, "n b"], batch_size: int, first_step: int
) -> Iterator[dict[str, np.ndarray]]:
  """Endless training batches from `first_step` on.

  Args:
    source: the training split.
    seed: the run's seed.
    slots: (n, b) global example index of every local slot.
    batch_size: global batch B.
    first_step: step of the first batch.

  Yields:
    "image" (n, b, H, W, C) float32 and "label" (n, b) int32.
  """
  step = first_step
  while True:
    yield source.gather(example_index(seed, step * batch_size + slots, len(source)))
    step += 1


def eval_batches(
  source: Source, slots: Int[np.ndarray, "n b"], batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
  """Each held-out example once, in order, the last batch padded.

  A slot stands for a stratum of timesteps, so the padding is spread evenly
  over the slots: at the end of the batch it would leave out the noisy ones.

  Yields:
    as `train_batches`, plus "weight" (n, b) float32, 0 for padding.
  """
  for start in range(0, len(source), batch_size):
    count = min(batch_size, len(source) - start)
    offset, remainder = np.divmod(slots * count, batch_size)
    batch = source.gather(start + offset)
    yield batch | {"weight": (remainder < count).astype(np.float32)}
