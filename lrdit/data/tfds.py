"""Photographs from directories that tensorflow-datasets has prepared.

Nothing here imports tensorflow: array_record has its own library, and an index of the records
gives random access to TFRecord files.

Axes: N examples, b requested examples, H W image, C channels.
"""

import contextlib
import dataclasses
import logging
import os
import pathlib
import resource
import struct
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from lrdit.data import images
from lrdit.data.source import DataOptions, DecodedImages, Source, describe_path
from lrdit.runtime.errors import UserError, system_limit
from lrdit.runtime.paths import local_path
from lrdit.runtime.progress import make_bar

# A TFRecord is its length (uint64), the length's checksum (4 bytes), the bytes, and their checksum
# (4 bytes).
LENGTH_BYTES, HEADER_BYTES, FOOTER_BYTES = 8, 12, 4
LABELS_AT_ONCE = 1024  # photographs whose records are in memory together
DEFAULT_DIR = "~/tensorflow_datasets"
MAX_OPEN_FILES = 4096

log = logging.getLogger("lrdit")


@dataclasses.dataclass(frozen=True)
class TfdsDataset:
  """A dataset of tensorflow-datasets.

  Attributes:
    eval_split: name of its own held-out split.
    crop_size: side in pixels of the center crop before resizing, or 0 for the short side.
    num_classes: number of classes, or 0 without labels.
    manual_files: files that its preparation looks for in `downloads/manual`.
    origin: where to get these files.
  """

  name: str
  eval_split: str
  crop_size: int
  num_classes: int
  manual_files: str = ""
  origin: str = ""

  def how_to_prepare(self, data_dir: str) -> str:
    """Return the exact command that prepares the dataset under `data_dir`."""
    # Not `tfds build`, whose command line cannot be imported without apache-beam.
    run = (
      f'run (it needs tensorflow): python -c "import tensorflow_datasets as tfds; '
      f"tfds.builder('{self.name}', data_dir='{data_dir}', file_format='array_record')"
      f'.download_and_prepare()"'
    )
    if not self.manual_files:
      return run
    manual_dir = os.path.join(data_dir, "downloads", "manual")
    return f"put {self.manual_files} ({self.origin}) into {manual_dir}, then {run}"


_DATASETS = (
  TfdsDataset("cifar10", eval_split="test", crop_size=0, num_classes=10),
  TfdsDataset(
    "celeb_a",
    eval_split="validation",
    crop_size=178,
    num_classes=0,
    manual_files="img_align_celeba.zip, list_eval_partition.txt, list_attr_celeba.txt, "
    "list_landmarks_align_celeba.txt, identity_CelebA.txt",
    origin="from the CelebA page's drive, under these names",
  ),
  TfdsDataset(
    "imagenet2012",
    eval_split="validation",
    crop_size=0,
    num_classes=1000,
    manual_files="ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar",
    origin="both from image-net.org/download-images, which asks you to register",
  ),
)
DATASETS = {dataset.name: dataset for dataset in _DATASETS}


def fingerprint_tfds(dataset: TfdsDataset, split: str, options: DataOptions) -> dict[str, Any]:
  """Return the fingerprint of `load_tfds`' source without reading its records."""
  return _open(dataset, split, options)[1]


def load_tfds(dataset: TfdsDataset, split: str, options: DataOptions) -> Source:
  """Open a split, "train" or "eval", of a prepared dataset.

  `options.data_dir` is the directory that holds the dataset's, by default TFDS_DATA_DIR or
  ~/tensorflow_datasets.

  Raises:
    UserError: the dataset is missing or incomplete.
  """
  info, fingerprint = _open(dataset, split, options)
  records = _Split(info, dataset, options)
  size = options.image_size
  shape = (fingerprint["num_examples"], size, size, options.num_channels)
  decoded = DecodedImages(records.decode, shape, options.cache_bytes)
  return Source(decoded, records.labels, dataset.num_classes, fingerprint)


def _open(dataset: TfdsDataset, split: str, options: DataOptions) -> tuple[Any, dict[str, Any]]:
  """Return a complete split's SplitInfo and fingerprint."""
  default = local_path("TFDS_DATA_DIR", os.environ.get("TFDS_DATA_DIR") or DEFAULT_DIR)
  data_dir = os.path.expanduser(options.data_dir) or default
  with _damage_of(dataset, data_dir):
    builder = _find_builder(dataset, data_dir)
    name = dataset.eval_split if split == "eval" else "train"
    fix = f"delete {builder.data_dir}, and {dataset.how_to_prepare(data_dir)}"
    if name not in builder.info.splits or not builder.info.splits[name].num_examples:
      raise UserError(f"{builder.data_dir} has no split {name!r}: {fix}")
    info = builder.info.splits[name]
    for path in info.filepaths:
      if os.path.dirname(path) != os.fspath(builder.data_dir):
        raise UserError(f"{path} is not in {builder.data_dir}, as a split's files are: {fix}")
      if not os.path.exists(path):
        raise UserError(f"{path} is missing: {fix}")
  return info, {
    "name": dataset.name,
    "version": str(builder.info.version),
    "split": name,
    "num_examples": info.num_examples,
    "crop": images.crop_name(dataset.crop_size, options.image_size),
  }


def _find_builder(dataset: TfdsDataset, data_dir: str) -> Any:
  """Return the builder of the prepared directory, whichever version and format it has."""
  # These imports are slow.
  from tensorflow_datasets.core import read_only_builder, registered

  try:
    return read_only_builder.builder_from_files(dataset.name, data_dir=data_dir)
  except registered.DatasetNotFoundError as error:
    # Users often name a directory that is one or two levels too deep, or one too high.
    given = pathlib.Path(data_dir).absolute()
    for right in (given.parent, given.parent.parent, *sorted(given.glob("*"))):
      if any(right.glob(f"{dataset.name}/*/dataset_info.json")):
        raise UserError(
          f"config.data.data_dir={data_dir} is not the directory that holds {dataset.name}/VERSION:"
          f" use config.data.data_dir={right}"
        ) from error
    where = "DIRECTORY" if os.path.isfile(data_dir) else data_dir
    raise UserError(
      f"no prepared {dataset.name} under {data_dir} (config.data.data_dir): there is "
      f"{describe_path(data_dir)}; {dataset.how_to_prepare(where)}"
    ) from error


@contextlib.contextmanager
def _damage_of(dataset: TfdsDataset, data_dir: str) -> Iterator[None]:
  """Turn the errors of a damaged directory into a UserError."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:  # tensorflow-datasets does not document what damaged files raise.
    raise system_limit(error) or UserError(
      f"the prepared {dataset.name} under {data_dir} is damaged ({_first_line(error)}): delete "
      f"it, and {dataset.how_to_prepare(data_dir)}"
    ) from error


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0]


class _Split:
  """A split's records: images to decode, and their labels."""

  def __init__(self, info: Any, dataset: TfdsDataset, options: DataOptions):
    from array_record.python.array_record_data_source import ArrayRecordDataSource
    from tensorflow_datasets.proto import tf_example_pb2

    if str(info.filename_template.filetype_suffix) == "array_record":
      reader = ArrayRecordDataSource(info.file_instructions)
    else:
      reader = _TfRecords(info.filepaths, info.shard_lengths)
    self._records = _Records(reader, info.shard_lengths)
    self._name = f"{dataset.name}'s split {info.name}"
    # The features' own decoders take longer than reading the record.
    self._parse = tf_example_pb2.Example.FromString
    self._crop_size, self._options = dataset.crop_size, options
    count = info.num_examples
    self.labels: Any = _Labels(self, count) if dataset.num_classes else np.zeros(count, np.int32)

  def read(self, index: Int[np.ndarray, " b"]) -> list[bytes]:
    """Return the encoded images, and keep their labels."""
    from google.protobuf.message import DecodeError

    try:
      records = self._records.read(index.tolist())
      features = [self._parse(record).features.feature for record in records]
      if isinstance(self.labels, _Labels):
        self.labels.kept[index] = [each["label"].int64_list.value[0] for each in features]
      return [each["image"].bytes_list.value[0] for each in features]
    except (DecodeError, IndexError, ValueError, RuntimeError) as error:
      raise system_limit(error) or UserError(
        f"a record of {self._name} is damaged ({_first_line(error)}): prepare the dataset again"
      ) from error

  def decode(self, index: Int[np.ndarray, " b"]) -> list[UInt8[np.ndarray, "H W C"]]:
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


class _Labels:
  """Labels that are read from the records when first indexed, and kept."""

  def __init__(self, split: _Split, count: int):
    self.shape = (count,)
    self.kept = np.full(count, -1, np.int32)
    self._split = split

  @property
  def are_known(self) -> bool:
    return bool((self.kept >= 0).all())

  def __getitem__(self, index: Int[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
    missing = index[self.kept[index] < 0]
    if 0 < len(missing) <= LABELS_AT_ONCE:
      self._split.read(missing)
    elif len(missing):
      log.info("reading %d records for their labels", len(missing))
      with make_bar(len(missing), 0, "label") as bar:
        for start in range(0, len(missing), LABELS_AT_ONCE):
          self._split.read(missing[start : start + LABELS_AT_ONCE])
          bar.update(min(LABELS_AT_ONCE, len(missing) - start))
    return self.kept[index]


def _max_open_files() -> int:
  """Return how many files a split may have open: a quarter of the process's limit."""
  soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
  return MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else min(MAX_OPEN_FILES, soft // 4)


class _Records:
  """Random access to the records of any number of files.

  Up to `_max_open_files` files stay open once they are read, and several threads read at once.
  If there are more files, one thread at a time reads, and closes all files before it opens too
  many. `counts` is the number of records in each file.
  """

  def __init__(self, reader: Any, counts: Sequence[int]):
    self._reader, self._ends = reader, np.cumsum(counts)
    self._limit = max(1, _max_open_files())
    self._open: set[int] = set()
    self._lock = threading.Lock()

  def read(self, index: Sequence[int]) -> list[bytes]:
    if len(self._ends) <= self._limit:
      return list(self._reader.__getitems__(index))
    records: list[bytes] = []
    with self._lock:
      for start in range(0, len(index), self._limit):
        chunk = index[start : start + self._limit]
        files = set(np.searchsorted(self._ends, chunk, side="right").tolist())
        if len(files | self._open) > self._limit:
          self._reader.__exit__(None, None, None)
          self._open = set()
        self._open |= files
        records += self._reader.__getitems__(chunk)
    return records


class _TfRecords:
  """Random access to the records of TFRecord files, with `ArrayRecordDataSource`'s methods."""

  def __init__(self, paths: Sequence[os.PathLike], counts: Sequence[int]):
    self._paths = paths
    self._files: dict[int, int] = {}
    offsets = [_record_offsets(path, count) for path, count in zip(paths, counts, strict=True)]
    self._file_of = np.repeat(np.arange(len(paths)), counts)
    self._offset = np.concatenate(offsets)

  def __getitems__(self, index: Sequence[int]) -> list[bytes]:
    return [self._read_one(int(self._file_of[i]), int(self._offset[i])) for i in index]

  def _read_one(self, number: int, offset: int) -> bytes:
    file = self._files.get(number)
    if file is None:
      file = os.open(self._paths[number], os.O_RDONLY)
      # If two threads open a file at once, the first one's is kept.
      if (kept := self._files.setdefault(number, file)) != file:
        os.close(file)
        file = kept
    (length,) = struct.unpack("<Q", os.pread(file, LENGTH_BYTES, offset))
    return os.pread(file, length, offset + HEADER_BYTES)

  def __exit__(self, *_: object) -> None:
    while self._files:
      os.close(self._files.popitem()[1])


def _record_offsets(path: os.PathLike, count: int) -> Int[np.ndarray, " count"]:
  """Return the offset of each record, after reading every record's length."""
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
