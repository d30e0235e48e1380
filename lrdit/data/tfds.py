"""Photographs from prepared tensorflow-datasets directories.

Nothing here imports tensorflow: array_record is read by its own library, and of
TFRecord files an index of the records is made, as both then take any index.

Axes: N examples, b examples asked for, H W image, C channels.
"""

import contextlib
import dataclasses
import logging
import os
import pathlib
import resource
import struct
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from lrdit.data import images
from lrdit.data.source import DataOptions, DecodedImages, Source, describe_path
from lrdit.runtime.errors import UserError, system_limit
from lrdit.runtime.paths import local_path
from lrdit.runtime.progress import make_bar

# A TFRecord is its length (uint64), a checksum of that (4 bytes), the bytes
# themselves and a checksum of those (4 bytes).
LENGTH_BYTES, HEADER_BYTES, FOOTER_BYTES = 8, 12, 4
LABELS_AT_ONCE = 1024  # records of so many photographs in memory
DEFAULT_DIR = "~/tensorflow_datasets"
MOST_OPEN_FILES = 4096  # of a split, if the system lets a process have four times as many

log = logging.getLogger("lrdit")


@dataclasses.dataclass(frozen=True)
class TfdsDataset:
  """What has to be known of a dataset of tensorflow-datasets.

  Attributes:
    name: its registered name.
    eval_split: its own held-out split.
    crop_size: side in pixels of the centre crop before resizing; 0 for the
      short side of each image.
    num_classes: 0 if it has no label.
    manual_files: files that its preparation looks for in `downloads/manual`.
    origin: where they come from.
  """

  name: str
  eval_split: str
  crop_size: int
  num_classes: int
  manual_files: tuple[str, ...] = ()
  origin: str = ""

  def how_to_prepare(self, data_dir: str) -> str:
    """The exact command that prepares the dataset under `data_dir`."""
    # Not `tfds build`: its command line cannot be imported without apache-beam.
    run = (
      f'run (it needs tensorflow): python -c "import tensorflow_datasets as tfds; '
      f"tfds.builder('{self.name}', data_dir='{data_dir}', file_format='array_record')"
      f'.download_and_prepare()"'
    )
    if not self.manual_files:
      return run
    manual_dir = os.path.join(data_dir, "downloads", "manual")
    return f"put {', '.join(self.manual_files)} ({self.origin}) into {manual_dir}, then {run}"


DATASETS = {
  dataset.name: dataset
  for dataset in (
    TfdsDataset("cifar10", eval_split="test", crop_size=0, num_classes=10),
    TfdsDataset(
      "celeb_a",
      eval_split="validation",
      crop_size=178,
      num_classes=0,
      manual_files=(
        "img_align_celeba.zip",
        "list_eval_partition.txt",
        "list_attr_celeba.txt",
        "list_landmarks_align_celeba.txt",
        "identity_CelebA.txt",
      ),
      origin="from the CelebA page's drive, under these names",
    ),
    TfdsDataset(
      "imagenet2012",
      eval_split="validation",
      crop_size=0,
      num_classes=1000,
      manual_files=("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"),
      origin="both from image-net.org/download-images, which asks you to register",
    ),
  )
}


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0]


def _open_file_budget() -> int:
  """Files that a split may hold open: a quarter of what the process may have."""
  soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
  return MOST_OPEN_FILES if soft == resource.RLIM_INFINITY else min(MOST_OPEN_FILES, soft // 4)


class _Records:
  """Random access to the records of files, of which only so many are open at once.

  Up to that number a file stays open once it was read, and several threads read at
  once. Beyond it, one thread at a time reads, and all are closed before more are opened.
  """

  def __init__(self, counts: Sequence[int]):
    """Opens nothing yet.

    Args:
      counts: records of each file, in order.
    """
    self._ends = np.cumsum(counts)
    self._budget = max(1, _open_file_budget())
    self._open: set[int] = set()
    self._lock = threading.Lock() if len(counts) > self._budget else contextlib.nullcontext()
    self._few = len(counts) <= self._budget

  def __getitems__(self, index: Sequence[int]) -> list[bytes]:
    """The records' bytes."""
    if self._few:
      return self._read(index)
    records: list[bytes] = []
    with self._lock:
      for start in range(0, len(index), self._budget):
        chunk = index[start : start + self._budget]
        files = set(np.searchsorted(self._ends, chunk, side="right").tolist())
        if len(files | self._open) > self._budget:
          self._close()
          self._open = set()
        self._open |= files
        records += self._read(chunk)
    return records

  def _read(self, index: Sequence[int]) -> list[bytes]:
    raise NotImplementedError

  def _close(self) -> None:
    raise NotImplementedError


class ArrayRecords(_Records):
  """The records of array_record files."""

  def __init__(self, instructions: Sequence[Any]):
    """Opens nothing yet.

    Args:
      instructions: tfds's FileInstruction of each file, which are read whole.
    """
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    super().__init__([each.examples_in_shard for each in instructions])
    self._source = ArrayRecordDataSource(instructions)

  def _read(self, index: Sequence[int]) -> list[bytes]:
    return list(self._source.__getitems__(index))

  def _close(self) -> None:
    self._source.__exit__(None, None, None)


class TfRecords(_Records):
  """The records of TFRecord files."""

  def __init__(self, paths: Sequence[os.PathLike], counts: Sequence[int]):
    """Indexes the files by reading every record's length.

    Args:
      paths: the files, in order.
      counts: how many records each must hold.

    Raises:
      UserError: a file is truncated or holds another number of records.
    """
    super().__init__(counts)
    self._paths = paths
    self._files: dict[int, int] = {}
    offsets = [_record_offsets(path, count) for path, count in zip(paths, counts, strict=True)]
    self._file_of = np.repeat(np.arange(len(paths)), counts)
    self._offset = np.concatenate(offsets)

  def _read(self, index: Sequence[int]) -> list[bytes]:
    return [self._read_one(int(self._file_of[i]), int(self._offset[i])) for i in index]

  def _read_one(self, number: int, offset: int) -> bytes:
    file = self._files.get(number)
    if file is None:
      file = os.open(self._paths[number], os.O_RDONLY)
      # Of two threads that open a file at once, the later one's is not kept.
      if (kept := self._files.setdefault(number, file)) != file:
        os.close(file)
        file = kept
    (length,) = struct.unpack("<Q", os.pread(file, LENGTH_BYTES, offset))
    return os.pread(file, length, offset + HEADER_BYTES)

  def _close(self) -> None:
    while self._files:
      os.close(self._files.popitem()[1])


def _record_offsets(path: os.PathLike, count: int) -> Int[np.ndarray, " count"]:
  """Where each record of a file starts."""
  offsets, end, size = [], 0, os.path.getsize(path)
  with open(path, "rb") as file:
    while end + HEADER_BYTES <= size:
      offsets.append(end)
      file.seek(end)
      (length,) = struct.unpack("<Q", file.read(LENGTH_BYTES))
      end += HEADER_BYTES + length + FOOTER_BYTES
  if end != size or len(offsets) != count:
    raise UserError(
      f"{path} is damaged: it must hold {count} records to its last byte; prepare the dataset again"
    )
  return np.asarray(offsets, np.int64)


class _Labels:
  """Labels taken from the records, and kept once they were read."""

  def __init__(self, split: "_Split", count: int):
    self.shape = (count,)
    self._split = split
    self._kept = np.full(count, -1, np.int32)

  @property
  def are_known(self) -> bool:
    """Whether the label of every record has been read."""
    return bool((self._kept >= 0).all())

  def keep(self, index: Int[np.ndarray, " b"], labels: Sequence[int]) -> None:
    self._kept[index] = labels

  def __getitem__(self, index: Int[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
    missing = index[self._kept[index] < 0]
    if len(missing) > LABELS_AT_ONCE:
      self._read_many(missing)
    elif len(missing):
      self._split.read(missing)
    return self._kept[index]

  def _read_many(self, index: Int[np.ndarray, " b"]) -> None:
    log.info("reading %d records for their labels", len(index))
    with make_bar(len(index), 0, "label") as bar:
      for start in range(0, len(index), LABELS_AT_ONCE):
        chunk = index[start : start + LABELS_AT_ONCE]
        self._split.read(chunk)
        bar.update(len(chunk))


class _Split:
  """The records of a split: images to decode, and labels that come along."""

  def __init__(self, builder: Any, split: str, dataset: TfdsDataset, options: DataOptions):
    from tensorflow_datasets.proto import tf_example_pb2

    info = builder.info.splits[split]
    self._records: _Records
    if builder.info.file_format.value == "array_record":
      self._records = ArrayRecords(info.file_instructions)
    else:
      self._records = TfRecords(info.filepaths, info.shard_lengths)
    self._name = f"{dataset.name}'s split {split}"
    # Not the features' own decoders, which take longer than reading the record.
    self._parse = tf_example_pb2.Example.FromString
    self._crop_size, self._options = dataset.crop_size, options
    self.labels: Any = np.zeros(info.num_examples, np.int32)
    if dataset.num_classes:
      self.labels = _Labels(self, info.num_examples)

  def read(self, index: Int[np.ndarray, " b"]) -> list[bytes]:
    """The encoded images, (b,); keeps their labels."""
    from google.protobuf.message import DecodeError

    try:
      records = self._records.__getitems__(index.tolist())
      features = [self._parse(record).features.feature for record in records]
      if isinstance(self.labels, _Labels):
        self.labels.keep(index, [each["label"].int64_list.value[0] for each in features])
      return [each["image"].bytes_list.value[0] for each in features]
    except (DecodeError, IndexError, ValueError, RuntimeError) as error:
      raise system_limit(error) or UserError(
        f"a record of {self._name} is damaged ({_first_line(error)}): prepare the dataset again"
      ) from error

  def decode(self, index: Int[np.ndarray, " b"]) -> list[UInt8[np.ndarray, "H W C"]]:
    """The images, cropped and resized: b arrays (H, W, C)."""
    size, channels = self._options.image_size, self._options.num_channels
    decoded = []
    for i, encoded in zip(index, self.read(index), strict=True):
      try:
        decoded.append(images.fit(images.decode(encoded), self._crop_size, size, channels))
      except images.UnreadableImage as error:
        raise UserError(
          f"image {i} of {self._name} cannot be decoded ({error}): prepare the dataset again"
        ) from error
    return decoded


def _data_dir_nearby(dataset: TfdsDataset, data_dir: str) -> pathlib.Path | None:
  """Return the data_dir that was meant, where one level or two too deep or high was given."""
  given = pathlib.Path(data_dir).absolute()
  below = sorted(path for path in given.glob("*") if path.is_dir())
  for candidate in (given.parent, given.parent.parent, *below):
    if any(candidate.glob(f"{dataset.name}/*/dataset_info.json")):
      return candidate
  return None


def _find_builder(dataset: TfdsDataset, data_dir: str) -> Any:
  """The reader of the prepared directory, whichever version and format it has."""
  # Slow to import, and wanted for these datasets only.
  from tensorflow_datasets.core import read_only_builder, registered

  found = describe_path(data_dir)
  if os.path.exists(data_dir) and not os.path.isdir(data_dir):
    raise UserError(
      f"config.data.data_dir={data_dir} is {found}, not a directory in which tensorflow-datasets "
      f"has prepared {dataset.name}: give that directory, or make one: "
      f"{dataset.how_to_prepare('DIRECTORY')}"
    )
  try:
    return read_only_builder.builder_from_files(dataset.name, data_dir=data_dir)
  except registered.DatasetNotFoundError as error:
    right = _data_dir_nearby(dataset, data_dir)
    if right is not None:
      raise UserError(
        f"config.data.data_dir={data_dir} is not the directory that holds {dataset.name}/VERSION: "
        f"use config.data.data_dir={right}"
      ) from error
    raise UserError(
      f"no prepared {dataset.name} under {data_dir} (config.data.data_dir): there is {found}; "
      f"{dataset.how_to_prepare(data_dir)}"
    ) from error
  except Exception as error:  # whatever its files lead their reader to
    raise system_limit(error) or UserError(
      f"the prepared {dataset.name} under {data_dir} is damaged ({_first_line(error)}): delete "
      f"it, and {dataset.how_to_prepare(data_dir)}"
    ) from error


def _open(dataset: TfdsDataset, split: str, options: DataOptions) -> tuple[Any, str]:
  """The reader of a prepared directory and its name for the split, both whole."""
  default = local_path("TFDS_DATA_DIR", os.environ.get("TFDS_DATA_DIR") or DEFAULT_DIR)
  data_dir = os.path.expanduser(options.data_dir) or default
  builder = _find_builder(dataset, data_dir)
  name = dataset.eval_split if split == "eval" else "train"
  directory = pathlib.Path(builder.data_dir)
  if name not in builder.info.splits or not builder.info.splits[name].num_examples:
    raise UserError(
      f"{directory} has no split {name!r}: delete it, and {dataset.how_to_prepare(data_dir)}"
    )
  info = builder.info.splits[name]
  missing = [str(path) for path in info.filepaths if not os.path.exists(path)]
  if missing:
    raise UserError(
      f"{missing[0]} is missing: delete {directory}, and {dataset.how_to_prepare(data_dir)}"
    )
  return builder, name


def _fingerprint(
  dataset: TfdsDataset, builder: Any, name: str, options: DataOptions
) -> dict[str, Any]:
  return {
    "name": dataset.name,
    "version": str(builder.info.version),
    "split": name,
    "num_examples": builder.info.splits[name].num_examples,
    "crop": images.crop_name(dataset.crop_size, options.image_size),
  }


def fingerprint_tfds(dataset: TfdsDataset, split: str, options: DataOptions) -> dict[str, Any]:
  """The fingerprint of `load_tfds`' source, without reading its records."""
  return _fingerprint(dataset, *_open(dataset, split, options), options)


def load_tfds(dataset: TfdsDataset, split: str, options: DataOptions) -> Source:
  """A split of a prepared dataset.

  Args:
    dataset: one of `DATASETS`.
    split: "train" or "eval", the dataset's own held-out split.
    options: `data_dir` is the directory that holds the dataset's, by default
      TFDS_DATA_DIR or ~/tensorflow_datasets.

  Raises:
    UserError: it is not there, or not whole.
  """
  builder, name = _open(dataset, split, options)
  fingerprint = _fingerprint(dataset, builder, name, options)
  records = _Split(builder, name, dataset, options)
  size = options.image_size
  shape = (fingerprint["num_examples"], size, size, options.num_channels)
  decoded = DecodedImages(records.decode, shape, options.cache_bytes)
  return Source(decoded, records.labels, dataset.num_classes, fingerprint)
