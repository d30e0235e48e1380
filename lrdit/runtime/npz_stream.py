"""Arrays of an .npz, written and read a batch at a time: none is ever held whole.

What is read is an export's samples.npz: arr_0 (N, H, W, 3) uint8, and where there are classes
arr_1 (N,) int64.

Axes: N images, B images of a batch, H W image.
"""

import contextlib
import errno
import math
import pathlib
import struct
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

# What reading a damaged archive raises.
_DAMAGE = (
  ValueError,
  KeyError,
  TypeError,
  EOFError,
  RuntimeError,
  struct.error,
  zipfile.BadZipFile,
)


class DamagedArchive(Exception):
  """An .npz that does not hold what it should."""


def write_member(
  archive: zipfile.ZipFile,
  name: str,
  dtype: Any,
  shape: tuple[int, ...],
  chunks: Iterator[np.ndarray],
) -> None:
  """Writes an array as one .npy, without a time, so that equal arrays make equal archives.

  Args:
    archive: open for writing.
    name: of the .npy, with its ending.
    dtype: of the array.
    shape: of the whole array.
    chunks: its rows in order, contiguous, of that dtype; as many as the shape says.
  """
  header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
  with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
    np.lib.format.write_array_header_1_0(member, header)
    for chunk in chunks:
      member.write(chunk)


def _read_header(member: Any) -> tuple[tuple[int, ...], np.dtype]:
  version = np.lib.format.read_magic(member)
  if version != (1, 0):
    raise ValueError(f"of .npy version {version}")
  shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(member)
  if fortran_order:
    raise ValueError("in Fortran order")
  return shape, dtype


def _read_array(member: Any, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
  num_bytes = dtype.itemsize * math.prod(shape)
  data = member.read(num_bytes)
  if len(data) < num_bytes:
    raise EOFError("it ends early")
  return np.frombuffer(data, dtype).reshape(shape).copy()


def _npz_batches(
  path: pathlib.Path, num_samples: int, has_labels: bool, batch_size: int
) -> Iterator[list[Any]]:
  with zipfile.ZipFile(path) as archive, contextlib.ExitStack() as stack:
    names = ["arr_0.npy", "arr_1.npy"] if has_labels else ["arr_0.npy"]
    if archive.namelist() != names:
      raise ValueError(f"it holds {archive.namelist()}")
    members = [stack.enter_context(archive.open(name)) for name in names]
    headers = [_read_header(member) for member in members]
    kinds = [(len(shape), dtype) for shape, dtype in headers]
    expected = [(4, np.dtype(np.uint8)), (1, np.dtype(np.int64))][: len(names)]
    if kinds != expected or any(shape[0] != num_samples for shape, _ in headers):
      raise ValueError(f"it does not hold {num_samples} images")
    for first in range(0, num_samples, batch_size):
      count = min(batch_size, num_samples - first)
      yield [
        _read_array(member, dtype, (count, *shape[1:]))
        for member, (shape, dtype) in zip(members, headers, strict=True)
      ]
    if any(member.read(1) for member in members):
      raise ValueError("it goes on after its end")


def read_npz(
  path: pathlib.Path, num_samples: int, has_labels: bool, batch_size: int
) -> Iterator[tuple[UInt8[np.ndarray, "B H W 3"], Int[np.ndarray, " B"] | None]]:
  """The images and labels of a samples.npz in order, a batch at a time.

  Raises:
    DamagedArchive: it does not hold `num_samples` images, with labels or without, or a
      checksum differs; the latter is known with the last batch.
  """
  try:
    for samples, *labels in _npz_batches(path, num_samples, has_labels, batch_size):
      yield samples, labels[0] if labels else None
  except _DAMAGE as error:
    raise DamagedArchive(f"{path.name} is damaged ({error})") from error
  except OSError as error:
    if error.errno not in (errno.ENOENT, errno.EINVAL):  # missing; an absurd offset
      raise
    raise DamagedArchive(f"{path.name} is damaged ({error.strerror})") from error
