"""Write and read an .npz a batch at a time, so that no array is in memory as a whole."""

import contextlib
import math
import pathlib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from lrdit.runtime.store import damage_of, npy_header


def write_member(
  archive: zipfile.ZipFile,
  name: str,
  dtype: Any,
  shape: tuple[int, ...],
  chunks: Iterable[np.ndarray],
) -> None:
  """Write an array, without a time, so that equal arrays make equal archives.

  The chunks are its rows in order, contiguous and of `dtype`, as many as `shape` has.
  """
  with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
    member.write(npy_header(shape, dtype))
    for chunk in chunks:
      member.write(chunk)


def _read_shape(member: Any, dtype: np.dtype, num_axes: int, num_rows: int) -> tuple[int, ...]:
  version = np.lib.format.read_magic(member)
  if version != (1, 0):
    raise ValueError(f"it is of .npy version {version}")
  shape, fortran_order, found = np.lib.format.read_array_header_1_0(member)
  if fortran_order or found != dtype or len(shape) != num_axes or shape[0] != num_rows:
    raise ValueError(f"it does not hold {num_rows} rows of {dtype}")
  return shape


def _read_rows(member: Any, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
  data = member.read(dtype.itemsize * math.prod(shape))
  return np.frombuffer(data, dtype).reshape(shape).copy()


def read_npz(
  path: pathlib.Path, kinds: Mapping[str, tuple[Any, int]], num_rows: int, batch_size: int, fix: str
) -> Iterator[list[np.ndarray]]:
  """Yield the rows of an .npz in order, a batch at a time: one array for each name.

  `kinds` has the dtype and number of axes of every array, in the file's order.

  Raises:
    StoreError: the file is missing or holds anything else, or, after the last batch, a checksum
      differs. The message ends with `fix`.
  """
  with damage_of(path, fix), zipfile.ZipFile(path) as archive, contextlib.ExitStack() as stack:
    if archive.namelist() != [f"{name}.npy" for name in kinds]:
      raise ValueError(f"it holds {archive.namelist()}")
    members = [stack.enter_context(archive.open(f"{name}.npy")) for name in kinds]
    dtypes = [np.dtype(dtype) for dtype, _ in kinds.values()]
    shapes = [
      _read_shape(member, dtype, num_axes, num_rows)
      for member, dtype, (_, num_axes) in zip(members, dtypes, kinds.values(), strict=True)
    ]
    for first in range(0, num_rows, batch_size):
      count = min(batch_size, num_rows - first)
      yield [
        _read_rows(member, dtype, (count, *shape[1:]))
        for member, dtype, shape in zip(members, dtypes, shapes, strict=True)
      ]
    if any(member.read(1) for member in members):
      raise ValueError("it goes on after its end")
