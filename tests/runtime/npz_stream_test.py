"""Arrays that go through an .npz by batches."""

import zipfile

import numpy as np
import pytest

from lrdit.runtime import npz_stream
from lrdit.runtime.store import StoreError


def write(path, samples, labels, cut):
  with zipfile.ZipFile(path, "w") as archive:
    for number, array in enumerate((samples, labels)):
      chunks = iter((array[:cut], array[cut:]))
      npz_stream.write_member(archive, f"arr_{number}", array.dtype, array.shape, chunks)


def read(path, num_rows=7, names=("arr_0", "arr_1")):
  kinds = {"arr_0": (np.uint8, 4), "arr_1": (np.int64, 1)}
  return list(
    npz_stream.read_npz(path, {n: kinds[n] for n in names}, num_rows, 3, "write it again")
  )


def test_arrays_come_back_by_batches_and_are_numpy_s(tmp_path):
  samples = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), np.uint8)
  labels = np.arange(7)
  write(tmp_path / "a.npz", samples, labels, cut=2)
  write(tmp_path / "b.npz", samples, labels, cut=5)
  assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
  with np.load(tmp_path / "a.npz") as arrays:
    np.testing.assert_array_equal(arrays["arr_0"], samples)
    np.testing.assert_array_equal(arrays["arr_1"], labels)
  batches = read(tmp_path / "a.npz")
  assert [len(images) for images, _ in batches] == [3, 3, 1]
  for parts, array in zip(zip(*batches, strict=True), (samples, labels), strict=True):
    np.testing.assert_array_equal(np.concatenate(parts), array)


def test_damage_and_other_arrays_are_refused(tmp_path):
  path = tmp_path / "a.npz"
  samples, labels = np.zeros((7, 4, 4, 3), np.uint8), np.arange(7)
  write(path, samples, labels, cut=2)
  for arguments in ({"num_rows": 6}, {"num_rows": 8}, {"names": ("arr_0",)}):
    with pytest.raises(StoreError, match=r"a.npz is damaged \(it .*: write it again"):
      read(path, **arguments)
  content = bytearray(path.read_bytes())
  content[300] ^= 1  # a pixel: only the checksum tells
  path.write_bytes(content)
  with pytest.raises(StoreError, match="CRC"):
    read(path)
  path.unlink()
  with pytest.raises(StoreError, match="is missing: write it again"):
    read(path)
