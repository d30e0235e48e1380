"""Arrays that go through an .npz by batches."""

import zipfile

import numpy as np
import pytest

from lrdit.runtime import npz_stream


def write(path, samples, labels, cut):
  with zipfile.ZipFile(path, "w") as archive:
    for number, array in enumerate((samples, labels)):
      chunks = iter((array[:cut], array[cut:]))
      npz_stream.write_member(archive, f"arr_{number}.npy", array.dtype, array.shape, chunks)


def test_arrays_come_back_by_batches_and_are_numpy_s(tmp_path):
  samples = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), np.uint8)
  labels = np.arange(7)
  write(tmp_path / "a.npz", samples, labels, cut=2)
  write(tmp_path / "b.npz", samples, labels, cut=5)
  assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
  with np.load(tmp_path / "a.npz") as arrays:
    np.testing.assert_array_equal(arrays["arr_0"], samples)
    np.testing.assert_array_equal(arrays["arr_1"], labels)
  batches = list(npz_stream.read_npz(tmp_path / "a.npz", 7, True, 3))
  assert [len(images) for images, _ in batches] == [3, 3, 1]
  for read, array in zip(zip(*batches, strict=True), (samples, labels), strict=True):
    np.testing.assert_array_equal(np.concatenate(read), array)


def test_damage_and_other_arrays_are_refused(tmp_path):
  path = tmp_path / "a.npz"
  samples, labels = np.zeros((7, 4, 4, 3), np.uint8), np.arange(7)
  write(path, samples, labels, cut=2)
  for count, has_labels in ((6, True), (8, True), (7, False)):
    with pytest.raises(npz_stream.DamagedArchive, match=r"a.npz is damaged \(it "):
      list(npz_stream.read_npz(path, count, has_labels, 3))
  content = bytearray(path.read_bytes())
  content[300] ^= 1  # a pixel: only the checksum tells
  path.write_bytes(content)
  with pytest.raises(npz_stream.DamagedArchive, match="CRC"):
    list(npz_stream.read_npz(path, 7, True, 3))
  path.unlink()
  with pytest.raises(npz_stream.DamagedArchive, match="No such file"):
    list(npz_stream.read_npz(path, 7, True, 3))
