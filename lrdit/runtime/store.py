"""Files that survive a kill: complete or absent, described by JSON, checked when they are read.

Sample sets, latents, the classifier, references and analysis units are all stored as arrays with a
JSON record of what they are, which is written last. A later start compares the record with what it
was asked for.
"""

import contextlib
import errno
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import shutil
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from lrdit.runtime.errors import UserError
from lrdit.runtime.locks import owned

CHUNK_BYTES = 1 << 20  # read at once
MAX_SHOWN_CHANGES = 3

MAX_DEPTH = 100  # of JSON: no file of ours is nested as deeply
MAX_EXPANSION = 1100  # of a compressed array: deflate's limit is 1,032

# Reading damaged JSON, .npy, .npz and images raises these.
DAMAGE = (
  ValueError,
  ArithmeticError,
  LookupError,
  TypeError,
  AttributeError,
  EOFError,
  RuntimeError,
  SyntaxError,
  struct.error,
  tokenize.TokenError,
  zipfile.BadZipFile,
  zlib.error,
)

T = TypeVar("T")


class StoreError(UserError):
  """Stored files are damaged or hold something else; `reason` is the message without its fix."""

  def __init__(self, reason: str, fix: str):
    super().__init__(f"{reason}: {fix}")
    self.reason = reason


@contextlib.contextmanager
def damage_of(path: pathlib.Path, fix: str) -> Iterator[None]:
  """Turn the errors that a damaged file raises into a StoreError with the path and the fix."""
  try:
    yield
  except FileNotFoundError as error:
    raise StoreError(f"{error.filename or path} is missing", fix) from error
  except DAMAGE as error:
    raise StoreError(f"{path} is damaged ({error})", fix) from error
  except OSError as error:
    if error.errno != errno.EINVAL:  # a seek to an absurd offset
      raise
    raise StoreError(f"{path} is damaged ({error.strerror})", fix) from error


def sync(path: pathlib.Path) -> None:
  """Wait until a closed file, or a directory's entries, are on the disk."""
  file = os.open(path, os.O_RDONLY)
  try:
    os.fsync(file)
  finally:
    os.close(file)


@contextlib.contextmanager
def atomic_path(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yield a temporary path beside `path`, which is renamed to it on success.

  The contents are on the disk before: a power failure may otherwise leave an empty file of the
  final name.
  """
  temporary = path.with_name(path.name + ".tmp")
  try:
    yield temporary
    sync(temporary)
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def remove_directory(path: pathlib.Path) -> None:
  """Remove a directory, or a link in its place with its target's entries."""
  if path.is_symlink() and path.is_dir():
    for entry in path.iterdir():
      shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    path.unlink()
  elif path.exists():
    shutil.rmtree(path)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Write indented JSON atomically."""
  with atomic_path(path) as temporary:
    temporary.write_text(json.dumps(value, indent=2) + "\n")


def parse_json(text: str | bytes, **options: Any) -> Any:
  """Return the value of JSON from a file; `options` are those of `json.loads`.

  Raises:
    ValueError: it is damaged, or nested so deeply that walking through it could fail.
  """
  try:
    value = json.loads(text, **options)
  except RecursionError as error:
    raise ValueError("it is nested too deeply") from error
  level = [value]
  for _ in range(MAX_DEPTH):
    inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
    if not inner:
      return value
    level = list(itertools.chain.from_iterable(inner))
  raise ValueError("it is nested too deeply")


def read_json(path: pathlib.Path, fix: str) -> dict[str, Any]:
  """Return the JSON object of a file; raise a StoreError if it is missing or damaged."""
  with damage_of(path, fix):
    value = parse_json(path.read_bytes())
    if not isinstance(value, dict):
      raise ValueError("not a JSON object")
    return value


def as_json(value: Any) -> Any:
  """Return a value after a round trip through JSON: tuples become lists."""
  return json.loads(json.dumps(value))


def crc32_of_json(value: Any) -> int:
  """Return the CRC-32 of a JSON value, whatever the order of its names."""
  return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Return a nested dict as {"group.field": value}; tuples become lists, as in JSON."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, dict):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = list(value) if isinstance(value, tuple) else value
  return flat


def changes(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
  """Return "field (stored value there, given value asked for)" for each field that differs."""
  ours, theirs = flatten(ours), flatten(theirs)
  return [
    f"{field} ({theirs.get(field)!r} there, {ours.get(field)!r} asked for)"
    for field in sorted(ours.keys() | theirs.keys())
    if ours.get(field) != theirs.get(field)
  ]


def check_same(what: str, ours: dict[str, Any], theirs: dict[str, Any], fix: str) -> None:
  """Raise a StoreError if stored files' description (`theirs`) differs from ours.

  `what` begins the message, as in "DIR holds other latents", and `fix` ends it.
  """
  if found := changes(as_json(ours), theirs):
    more = len(found) - MAX_SHOWN_CHANGES
    shown = "; ".join(found[:MAX_SHOWN_CHANGES]) + (f" and {more} more" if more > 0 else "")
    raise StoreError(f"{what}: {shown}", fix)


def digest(head: str, arrays: Iterable[tuple[str, np.ndarray]]) -> str:
  """Return the SHA-256, in hex, of a text followed by every array's text and bytes."""
  sha256 = hashlib.sha256(head.encode())
  for text, array in arrays:
    sha256.update(text.encode())
    sha256.update(np.ascontiguousarray(array))
  return sha256.hexdigest()


def check_finite(what: str, arrays: Mapping[str, np.ndarray], fix: str) -> None:
  """Raise a UserError that begins with `what` and ends with `fix` if a weight is not finite."""
  bad = sorted(name for name, array in arrays.items() if not np.isfinite(array).all())
  if bad:
    found = f"{len(bad)} of {len(arrays)} arrays, such as {bad[0]}"
    raise UserError(f"{what} has weights that are not finite ({found}): {fix}")


def save_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Write an .npz atomically."""
  with atomic_path(path) as temporary, temporary.open("wb") as file:
    np.savez(file, **arrays)


def load_arrays(path: pathlib.Path, fix: str) -> dict[str, np.ndarray]:
  """Return an .npz's arrays by name; raise a StoreError if it is missing or damaged."""
  with damage_of(path, fix):
    return read_arrays(path)


def read_arrays(
  path: str | os.PathLike, names: Collection[str] | None = None
) -> dict[str, np.ndarray]:
  """Return the arrays of an .npz by name, or those of `names` that it has.

  Nothing is unpickled. A damaged file raises an error of `DAMAGE`, and never takes more memory than
  `MAX_EXPANSION` times its size.
  """
  # numpy would leave the file of a damaged archive open.
  with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
    size = os.fstat(file.fileno()).st_size
    wanted = [name for name in arrays.files if names is None or name in names]
    for info in arrays.zip.infolist():
      if info.filename.removesuffix(".npy") in wanted:
        _check_member(arrays.zip, info, MAX_EXPANSION * size)
    return {name: arrays[name] for name in wanted}


def _check_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, max_bytes: int) -> None:
  """Raise a ValueError for an array that its header makes larger than the archive's entry."""
  with archive.open(info) as member:
    version = np.lib.format.read_magic(member)
    readers = {(1, 0): "read_array_header_1_0", (2, 0): "read_array_header_2_0"}
    if version not in readers:
      raise ValueError(f"{info.filename} is of .npy version {version}")
    shape, _, dtype = getattr(np.lib.format, readers[version])(member)
  is_larger = dtype.itemsize * math.prod(shape) > min(info.file_size, max_bytes)
  if (is_larger and not dtype.hasobject) or min(shape, default=0) < 0:
    raise ValueError(f"{info.filename} is larger than its file: shape {shape}")


def load_or_make(path: pathlib.Path, use: str, load: Callable[[], T], make: Callable[[], T]) -> T:
  """Return `load()` if `path` exists, and otherwise `make()`, which writes it.

  The lock `use` in the path's directory lets only one of several processes make it.
  """
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    with owned(path.parent, use, wait=True):
      if not path.exists():  # another process may have made it meanwhile
        return make()
  return load()


def _write_all(file: Any, data: np.ndarray) -> None:
  view = memoryview(data).cast("B")
  while view:
    view = view[file.write(view) :]


def npy_header(shape: tuple[int, ...], dtype: Any) -> bytes:
  """Return the bytes of an .npy file before its rows."""
  file = io.BytesIO()
  header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
  np.lib.format.write_array_header_1_0(file, header)
  return file.getvalue()


class RowFile:
  """A file that rows of equal shape are appended to, over several starts of a program.

  A record elsewhere holds the number of valid rows and their checksum. Opening cuts off whatever
  follows them, such as a partial write before a kill. Writes are unbuffered and use no memory map,
  so that a full disk raises an error at once.

  Attributes:
    path: the file.
    num_rows: rows written so far.
    crc32: checksum of their bytes.
  """

  def __init__(
    self, path: pathlib.Path, row_shape: Sequence[int], dtype: Any, fix: str, header: bytes = b""
  ):
    """Describe the file without opening it; `fix` ends the messages about damage."""
    self.path, self.num_rows, self.crc32 = path, 0, 0
    self._row_shape, self._dtype = tuple(row_shape), np.dtype(dtype)
    self._row_bytes = self._dtype.itemsize * math.prod(row_shape)
    self._fix, self._header, self._file = fix, header, None

  @property
  def chunk_rows(self) -> int:
    """Number of rows read at once."""
    return max(1, CHUNK_BYTES // self._row_bytes)

  def _check_size(self, num_rows: int, is_all: bool) -> int:
    """Return the size in bytes of the header and that many rows, which must be present."""
    if not self.path.exists():
      raise StoreError(f"{self.path} is missing", self._fix)
    size, expected = self.path.stat().st_size, len(self._header) + num_rows * self._row_bytes
    if size < expected:
      raise StoreError(f"{self.path} has lost data", self._fix)
    if is_all and size > expected:
      raise StoreError(f"{self.path} has changed since it was written", self._fix)
    return expected

  def open(self, num_rows: int, crc32: int) -> None:
    """Open the file to append after its first `num_rows` rows, and cut off the rest.

    The checksum is not verified here. 0 rows begin the file anew.

    Raises:
      StoreError: the file has fewer rows.
    """
    if num_rows:
      os.truncate(self.path, self._check_size(num_rows, is_all=False))
    else:
      self.path.write_bytes(self._header)
    self.num_rows, self.crc32 = num_rows, crc32
    self._file = self.path.open("ab", buffering=0)

  def append(self, rows: np.ndarray) -> None:
    """Write rows; `sync` makes them durable."""
    rows = np.ascontiguousarray(rows, self._dtype)
    _write_all(self._file, rows)
    self.num_rows += len(rows)
    self.crc32 = zlib.crc32(rows, self.crc32)

  def sync(self) -> None:
    """Wait until all rows are on the disk."""
    os.fsync(self._file.fileno())

  def close(self) -> None:
    """Close the file, if it is open."""
    if self._file is not None:
      self._file.close()

  def read(self, num_rows: int, crc32: int | None = None) -> Iterator[np.ndarray]:
    """Yield the first rows in chunks.

    Raises:
      StoreError: the file has fewer rows, or, after the last chunk, their checksum is not `crc32`.
    """
    self._check_size(num_rows, is_all=False)
    found = 0
    with self.path.open("rb") as file:
      file.seek(len(self._header))
      for first in range(0, num_rows, self.chunk_rows):
        count = min(self.chunk_rows, num_rows - first)
        data = file.read(count * self._row_bytes)
        found = zlib.crc32(data, found)
        yield np.frombuffer(data, self._dtype).reshape(count, *self._row_shape)
    if crc32 not in (None, found):
      raise StoreError(f"{self.path} has changed since it was written", self._fix)

  def verify(self, num_rows: int, crc32: int) -> None:
    """Raise a StoreError unless the file holds exactly those rows."""
    self._check_size(num_rows, is_all=True)
    for _ in self.read(num_rows, crc32):
      pass
