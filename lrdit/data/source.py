"""Datasets with random access, whose examples are decoded when they are read.

Axes: N examples, b requested examples, H W image, C channels.
"""

import collections
import concurrent.futures
import dataclasses
import logging
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8

from lrdit.runtime.errors import UserError
from lrdit.runtime.text import name_some

MAX_THREADS = 16  # More gain nothing, as only the decoders release the interpreter's lock.
NAMED_CLASSES = 100  # most classes that the log lists
HELD_OUT_ONE_IN = 20
# The first bytes of files that people pass by mistake.
SIGNATURES = {
  b"PAR1": "a Parquet file",
  b"PK": "a zip archive or .npz",
  b"\x93NUMPY": "an .npy array",
  b"\x89HDF\r\n\x1a\n": "an HDF5 file",
  b"\x1f\x8b": "a gzip archive",
  b"ARROW1": "an Arrow file",
  b"\x80": "a pickle",
  b"\x89PNG": "an image",
  b"\xff\xd8\xff": "an image",
}

log = logging.getLogger("lrdit")


@dataclasses.dataclass(frozen=True)
class DataOptions:
  """How to read a dataset.

  Attributes:
    data_dir: where the data is, or "" for the dataset's default place.
    image_size: height and width that images are resized to.
    num_channels: 3, or 1 for gray.
    cache_bytes: keep a split's decoded images in memory if they take at most this much.
    skip_unreadable: skip the user's own unreadable files instead of raising an error.
  """

  data_dir: str
  image_size: int
  num_channels: int
  cache_bytes: int
  skip_unreadable: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """A split of a dataset.

  Attributes:
    images: (N, H, W, C) uint8 in [0, 255] or float32 in [-1, 1]: an array, or an object with its
      shape that accepts an index array, such as `DecodedImages`.
    labels: (N,) int32, likewise.
    num_classes: number of classes, or 0 without labels.
    fingerprint: the origin of the split, as JSON. Equal fingerprints mean the same examples in the
      same order.
  """

  images: Any
  labels: Any
  num_classes: int
  fingerprint: dict[str, Any]

  def __len__(self) -> int:
    return self.images.shape[0]

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Return (H, W, C)."""
    return tuple(self.images.shape[1:])

  def gather(self, index: Int[np.ndarray, " b"], flip: Bool[np.ndarray, " b"]) -> dict[str, Any]:
    """Read examples, mirrored left to right where `flip` is set.

    Returns:
      "image" (b, H, W, C) float32 in [-1, 1] and "label" (b,) int32.
    """
    batch = self.images[index]
    if batch.dtype == np.uint8:
      batch = batch.astype(np.float32) / 127.5 - 1.0
    batch[flip] = batch[flip, :, ::-1]
    return {"image": batch, "label": self.labels[index]}

  def subset(self, index: Int[np.ndarray, " n"], **fingerprint: Any) -> "Source":
    """Return the examples at `index`, identified by further entries of the fingerprint."""
    return dataclasses.replace(
      self,
      images=_Subset(self.images, index),
      labels=_Subset(self.labels, index),
      fingerprint=self.fingerprint | fingerprint | {"num_examples": len(index)},
    )

  def first_classes(self, num_classes: int) -> "Source":
    """Return the examples of the classes [0, num_classes), after reading every label once."""
    keep = np.flatnonzero(self.labels[np.arange(len(self))] < num_classes)
    kept = self.subset(keep, num_classes=num_classes)
    return dataclasses.replace(kept, num_classes=num_classes)


class _Subset:
  """Selected rows of images or labels, which are read only when indexed."""

  def __init__(self, rows: Any, index: Int[np.ndarray, " n"]):
    self._rows, self._index = rows, index
    self.shape = (len(index), *rows.shape[1:])

  @property
  def are_known(self) -> bool:
    return getattr(self._rows, "are_known", True)

  def __getitem__(self, index: Any) -> np.ndarray:
    if isinstance(index, tuple):  # Latents are indexed by further axes.
      return self._rows[(self._index[index[0]], *index[1:])]
    return self._rows[self._index[index]]


class DecodedImages:
  """Images that are decoded when first indexed, and kept if all take at most `cache_bytes`.

  Several threads may read at once: a row is marked as known only after it is written, and two
  threads that write the same row write the same values.
  """

  def __init__(
    self,
    decode: Callable[[Int[np.ndarray, " b"]], list[UInt8[np.ndarray, "H W C"]]],
    shape: tuple[int, int, int, int],
    cache_bytes: int,
  ):
    self.shape = shape
    self._decode = decode
    self._known = np.zeros(shape[0], bool)
    # Pages are allocated as rows are written: an unread split takes no memory.
    self._kept = np.empty(shape, np.uint8) if np.prod(shape) <= cache_bytes else None

  def __getitem__(self, index: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b H W C"]:
    """Return uint8 images that the caller may change."""
    if self._kept is None:
      return np.stack(self._decode(index))
    missing = index[~self._known[index]]
    if len(missing):
      self._kept[missing] = np.stack(self._decode(missing))
      self._known[missing] = True
    return self._kept[index]


def read_ahead(make: Callable[[int], Any], numbers: Iterable[int]) -> Iterator[Any]:
  """Yield `make(i)` for each number in order, computed by threads in advance.

  An exception of `make` is raised in its turn. Closing the iterator ends the threads.
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


def report_classes(source: Source, num_classes: int) -> None:
  """Log the names of classes [0, num_classes), and warn of classes without a training image.

  Log nothing if only reading every record would give the labels.
  """
  if not num_classes or not getattr(source.labels, "are_known", True):
    return
  counts = np.bincount(source.labels[np.arange(len(source))], minlength=num_classes)
  names = source.fingerprint.get("classes", [])[:num_classes]
  if names:
    rows = [f"{i} is {name!r} ({counts[i]})" for i, name in enumerate(names)]
    more = f" and {num_classes - NAMED_CLASSES} more" if num_classes > NAMED_CLASSES else ""
    table = ", ".join(rows[:NAMED_CLASSES])
    log.info("classes by label (number of training images): %s%s", table, more)
  empty = np.flatnonzero(counts[:num_classes] == 0).tolist()
  if empty:
    more = f" and {len(empty) - NAMED_CLASSES} more" if len(empty) > NAMED_CLASSES else ""
    shown = [f"{i} ({names[i]!r})" if names else str(i) for i in empty[:NAMED_CLASSES]]
    log.warning(
      "%d of %d classes have no training image, and samples of them will mean nothing: %s%s. "
      "Number the labels from 0 without gaps, or add images",
      *(len(empty), num_classes, ", ".join(shown), more),
    )


def describe_path(path: str) -> str:
  """Describe what is at a path where something else was expected."""
  if os.path.isdir(path):
    entries = sorted(entry for entry in os.listdir(path) if not entry.startswith("."))
    return f"a directory that holds {name_some(entries)}" if entries else "an empty directory"
  if not os.path.isfile(path):
    return "no file or directory" if not os.path.exists(path) else "no regular file"
  with open(path, "rb") as file:
    start = file.read(16)
  if not start:
    return "an empty file"
  for signature, kind in SIGNATURES.items():
    if start.startswith(signature):
      return kind
  return "a tar archive" if tarfile.is_tarfile(path) else "a file of another kind"


def own_path(options: DataOptions, name: str, exists: Callable[[str], bool], what: str) -> str:
  """Return `data_dir`; raise UserError if it is not the path of `what`."""
  if not options.data_dir:
    raise UserError(f"data.name={name} needs config.data.data_dir: set it to {what}")
  path = os.path.expanduser(options.data_dir)
  if not exists(path):
    found = describe_path(path)
    raise UserError(f"config.data.data_dir={path} is {found}: set it to {what}")
  return path


def choose_split(keys: Iterable[bytes], split: str, fix: str) -> Int[np.ndarray, " n"]:
  """Hold out about one example in twenty, by a hash of its key alone.

  Adding or removing an example therefore never moves another one to the other split.

  Returns:
    the rising indices of the examples of `split`, "train" or "eval".

  Raises:
    UserError: a split would be empty; the message ends in `fix`.
  """
  held_out = np.array([zlib.crc32(key) % HELD_OUT_ONE_IN == 0 for key in keys])
  if held_out.all() or not held_out.any():
    raise UserError(
      f"too few images to hold out about one in {HELD_OUT_ONE_IN} for evaluation (number of "
      f"images: {len(held_out)}): {fix}"
    )
  return np.flatnonzero(held_out == (split == "eval"))
