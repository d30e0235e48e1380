"""Datasets as random access: what stands at index i, decoded when it is asked for.

The digits are here; `tfds_data.py`, `image_files.py` and `latents.py` make further
sources.

Axes: N examples, b examples asked for, H W image, C channels.
"""

import dataclasses
import itertools
import logging
import os
import tarfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Shaped

NAMED_CLASSES = 100  # the log lists at most so many classes
NAMED_ENTRIES = 3  # of a directory, in an error
# What files begin with that are given for another kind.
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


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """A split of a dataset.

  Attributes:
    images: (N, H, W, C) uint8 in [0, 255] or float32 in [-1, 1]; anything that
      has a shape and takes an index array, such as `DecodedImages`.
    labels: (N,) int32, or what takes an index array likewise.
    num_classes: classes the labels count; 0 for none.
    fingerprint: what the split was made from, as JSON: two sources of the same
      fingerprint hold the same examples in the same order.
  """

  images: Any
  labels: Any
  num_classes: int
  fingerprint: dict[str, Any]

  def __len__(self) -> int:
    return self.images.shape[0]

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C)."""
    return tuple(self.images.shape[1:])

  def gather(self, index: Int[np.ndarray, " b"], flip: Bool[np.ndarray, " b"]) -> dict[str, Any]:
    """Reads examples.

    Args:
      index: (b,) in [0, N).
      flip: (b,) which to mirror left to right.

    Returns:
      "image" (b, H, W, C) float32 in [-1, 1] and "label" (b,) int32.
    """
    batch = self.images[index]
    if batch.dtype == np.uint8:
      batch = batch.astype(np.float32) / 127.5 - 1.0
    batch[flip] = batch[flip, :, ::-1]
    return {"image": batch, "label": self.labels[index]}

  def subset(self, index: Int[np.ndarray, " n"], **fingerprint: Any) -> "Source":
    """The examples at `index`, under a fingerprint that says which they are."""
    return dataclasses.replace(
      self,
      images=_Subset(self.images, index),
      labels=_Subset(self.labels, index),
      fingerprint=self.fingerprint | fingerprint | {"num_examples": len(index)},
    )

  def first_classes(self, num_classes: int) -> "Source":
    """The examples of the classes [0, num_classes); reads every label once."""
    keep = np.flatnonzero(self.labels[np.arange(len(self))] < num_classes)
    kept = self.subset(keep, num_classes=num_classes)
    return dataclasses.replace(kept, num_classes=num_classes)


class _Subset:
  """Some rows of what takes an index array."""

  def __init__(self, rows: Any, index: Int[np.ndarray, " n"]):
    self._rows, self._index = rows, index
    self.shape = (len(index), *rows.shape[1:])

  @property
  def are_known(self) -> bool:
    """Of labels: no record need be read for them."""
    return getattr(self._rows, "are_known", True)

  def __getitem__(self, index: Any) -> np.ndarray:
    if isinstance(index, tuple):  # further axes, of latents
      return self._rows[(self._index[index[0]], *index[1:])]
    return self._rows[self._index[index]]


class DecodedImages:
  """Images decoded when first asked for, and kept from then on if they fit.

  Several threads may read at once: a row counts as known only once it is
  written, and writing it twice writes the same.
  """

  def __init__(
    self,
    decode: Callable[[Int[np.ndarray, " b"]], list[Shaped[np.ndarray, "H W C"]]],
    shape: tuple[int, int, int, int],
    cache_bytes: int,
  ):
    """Decodes nothing yet.

    Args:
      decode: images at (b,) indices, each (H, W, C) uint8.
      shape: (N, H, W, C).
      cache_bytes: keep decoded images if all of them take at most this much.
    """
    self.shape = shape
    self._decode = decode
    self._known = np.zeros(shape[0], bool)
    # Pages are allocated as rows are written, so an unread split costs nothing.
    self._kept = np.empty(shape, np.uint8) if np.prod(shape) <= cache_bytes else None

  def __getitem__(self, index: Int[np.ndarray, " b"]) -> Shaped[np.ndarray, "b H W C"]:
    """(b, H, W, C) uint8, the caller's own."""
    if self._kept is None:
      return np.stack(self._decode(index))
    missing = index[~self._known[index]]
    if len(missing):
      self._kept[missing] = np.stack(self._decode(missing))
      self._known[missing] = True
    return self._kept[index]


def report_classes(source: Source, num_classes: int) -> None:
  """Log the table of named classes, and warn of those without a training image.

  Nothing is said where every record would have to be read for its label.

  Args:
    source: the training split.
    num_classes: classes [0, K) that the model is trained on; 0 for none.
  """
  if not num_classes or not getattr(source.labels, "are_known", True):
    return
  labels = source.labels[np.arange(len(source))]
  counts = np.bincount(labels, minlength=num_classes)[:num_classes]
  names = source.fingerprint.get("classes", [])[:num_classes]
  if names:
    rows = [f"{i} is {name!r} ({n})" for i, (name, n) in enumerate(zip(names, counts, strict=True))]
    more = f" and {num_classes - NAMED_CLASSES} more" if num_classes > NAMED_CLASSES else ""
    table = ", ".join(rows[:NAMED_CLASSES])
    log.info("classes by label (number of training images): %s%s", table, more)
  empty = np.flatnonzero(counts == 0).tolist()
  if empty:
    log.warning(
      "%d of %d classes have no training image, and samples of them will mean nothing: %s. "
      "Number the labels from 0 without gaps, or add images",
      len(empty),
      num_classes,
      ", ".join(f"{i} ({names[i]!r})" for i in empty) if names else _ranges(empty),
    )


def _ranges(numbers: Sequence[int]) -> str:
  """Return rising numbers with runs as "3 to 7"."""
  runs = []
  for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
    members = [number for _, number in run]
    runs.append(f"{members[0]} to {members[-1]}" if len(members) > 1 else f"{members[0]}")
  return ", ".join(runs)


def describe_path(path: str) -> str:
  """Return what stands at a path where something else was expected, in words."""
  if os.path.isdir(path):
    entries = sorted(entry for entry in os.listdir(path) if not entry.startswith("."))
    more = f" and {len(entries) - NAMED_ENTRIES} more" if len(entries) > NAMED_ENTRIES else ""
    named = ", ".join(entries[:NAMED_ENTRIES]).encode("utf-8", "backslashreplace").decode()
    return f"a directory that holds {named}{more}" if entries else "an empty directory"
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


@dataclasses.dataclass(frozen=True)
class DataOptions:
  """How a source is read.

  Attributes:
    data_dir: where the data lies; "" for the source's default place.
    image_size: height and width in pixels that images are resized to.
    num_channels: 3, or 1 for grey.
    cache_bytes: keep decoded images in memory up to this much per split.
    skip_unreadable: leave out own files that cannot be read instead of
      refusing them.
  """

  data_dir: str
  image_size: int
  num_channels: int
  cache_bytes: int
  skip_unreadable: bool
