"""Images and labels in .npz files, all of them made here."""

import json
import zipfile

import numpy as np
import pytest

from lrdit.data import npz
from lrdit.runtime.errors import UserError
from tests.image_files import SIZE, is_held_out, make_options, pixels, read

HELD_OUT = np.array([is_held_out(str(i)) for i in range(100)])


def batch(channels=3, count=100, height=SIZE, width=SIZE):
  return np.stack([pixels(i, height, width, channels) for i in range(count)])


@pytest.fixture
def make_npz(tmp_path):
  def make(**arrays):
    np.savez(tmp_path / "own.npz", **arrays)
    return tmp_path / "own.npz"

  return make


def load_both(path, **changes):
  return [npz.load_npz(split, make_options(path, **changes)) for split in ("train", "eval")]


def test_an_npz_is_split_by_index_and_read_as_it_is(make_npz, told):
  image, label = batch(), np.arange(100, dtype=np.int64) % 7
  for source, rows in zip(
    load_both(make_npz(image=image, label=label)), (~HELD_OUT, HELD_OUT), strict=True
  ):
    np.testing.assert_array_equal(read(source)[0], image[rows])
    np.testing.assert_array_equal(read(source)[1], label[rows])
    assert read(source)[1].dtype == np.int32
    assert source.num_classes == 7
    assert isinstance(source.images, np.ndarray)
  assert 1 <= HELD_OUT.sum() <= 15
  assert not told.messages


def test_an_npz_without_labels_has_no_classes(make_npz):
  for source in load_both(make_npz(image=batch())):
    assert source.num_classes == 0
    assert not read(source)[1].any()


@pytest.mark.parametrize("axis", [(), (1,)])
def test_grey_arrays_are_read_as_grey_or_repeated(make_npz, told, axis):
  image = batch(1)
  path = make_npz(image=image.reshape(*image.shape, *axis))
  gray = load_both(path, num_channels=1)[0]
  np.testing.assert_array_equal(read(gray)[0][..., 0], image[~HELD_OUT])
  assert not told.messages
  color = load_both(path, num_channels=3)[0]
  np.testing.assert_array_equal(read(color)[0], np.repeat(image[~HELD_OUT][..., None], 3, -1))
  total = len(color)
  assert told.messages[0] == f"{total} of {total} images converted to RGB: {total} gray"


def test_transparent_arrays_are_laid_over_white(make_npz, told):
  image = np.zeros((100, SIZE, SIZE, 4), np.uint8)
  image[:, :, : SIZE // 2, 3] = 255
  rows = read(load_both(make_npz(image=image))[0])[0]
  assert (rows[:, :, : SIZE // 2] == 0).all()
  assert (rows[:, :, SIZE // 2 :] == 255).all()
  assert told.messages[0].endswith("with transparency")


def test_arrays_of_another_size_are_cropped_and_resized(make_npz, told):
  image = batch(height=SIZE, width=2 * SIZE)
  path = make_npz(image=image)
  center = image[:, :, SIZE // 2 : -SIZE // 2]
  np.testing.assert_array_equal(read(load_both(path)[0])[0], center[~HELD_OUT])
  assert "are not square" in told.messages[0]
  large = load_both(path, image_size=2 * SIZE)[0]
  assert large.image_shape == (2 * SIZE, 2 * SIZE, 3)
  assert read(large)[0].shape == (len(large), 2 * SIZE, 2 * SIZE, 3)
  assert any("enlarged" in r.getMessage() for r in told.records if r.levelname == "WARNING")


@pytest.mark.parametrize(
  ("arrays", "message"),
  [
    ({"images": batch(), "y": np.zeros(100)}, "has no array image, only images, y: make it by"),
    ({"arr_0": batch()}, "only arr_0; arr_0 was saved without a name: rename it"),
    ({"image": batch() / 255.0}, r"is float64: it must be uint8 in \[0, 255\]"),
    ({"image": batch().astype(np.int64)}, "is int64: it must be uint8"),
    ({"image": batch().astype(np.uint16)}, "is uint16: it must be uint8"),
    ({"image": batch()[0, 0]}, r"has the shape \(8, 3\): it must be \(N, H, W\)"),
    ({"image": batch()[None]}, r"has the shape \(1, 100, 8, 8, 3\)"),
    ({"image": batch().transpose(0, 3, 1, 2)}, r"has the shape \(100, 3, 8, 8\)"),
    ({"image": batch()[:0]}, "not empty"),
    ({"image": np.array([pixels(1), None], object)}, "not plain numbers .*make it by"),
    ({"image": batch(), "label": np.array([None] * 100)}, "not plain numbers"),
    ({"image": batch(), "label": np.zeros(99, int)}, r"the shape \(99,\): it must be \(100,\)"),
    ({"image": batch(), "label": np.zeros((100, 1), int)}, r"has the shape \(100, 1\)"),
    ({"image": batch(), "label": np.zeros(100)}, "is float64: it must be integers"),
    ({"image": batch(), "label": np.full(100, -1)}, "runs from -1 to -1: number the classes"),
    ({"image": batch(), "label": np.full(100, 2**40)}, "number the classes from 0"),
    ({"image": batch(count=3)}, r"number of images: 3\): add images"),
  ],
)
def test_arrays_of_another_kind_are_refused(make_npz, arrays, message):
  path = make_npz(**arrays)
  for split in ("train", "eval"):
    with pytest.raises(UserError, match=message):
      npz.load_npz(split, make_options(path))


def test_an_array_that_nothing_reads_is_named(make_npz, told):
  path = make_npz(image=batch(), labels=np.zeros(100, int))
  npz.load_npz("train", make_options(path))
  assert told.messages == [f"left out: arrays of {path} besides image and label: labels"]


def test_a_file_that_is_no_npz_or_damaged_is_refused(make_npz, tmp_path):
  path = make_npz(image=batch())
  content = path.read_bytes()
  middle = len(content) // 2
  flipped = bytearray(content)
  flipped[middle] ^= 255
  compression = bytearray(content)
  compression[content.rindex(b"PK\1\2") + 10] = 9  # Deflate64, as Windows makes of large files
  files = {
    "cut.npz": (content[:middle], "is not an .npz, or is cut short .it is a zip archive"),
    "empty.npz": (b"", "is cut short .it is an empty file"),
    "it.parquet": (b"PAR1" + bytes(20), "is cut short .it is a Parquet file"),
    "text.npz": (b"words", "is cut short .it is a file of another kind"),
    "flipped.npz": (flipped, "is damaged"),
    "deflate64.npz": (compression, "compression method is not supported"),
  }
  for name, (data, message) in files.items():
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} {message}|{message}.*make it by"):
      npz.load_npz("train", make_options(tmp_path / name))
  np.save(tmp_path / "plain.npy", batch())
  with zipfile.ZipFile(tmp_path / "words.npz", "w") as file:
    file.writestr("image", "these are words")
  for name, message in {
    "plain.npy": "is cut short .it is an .npy array",
    "words.npz": "its arrays are not plain numbers .*make it by",
    "none.npz": "is no file or directory: set it to the .npz",
    ".": "is a directory that holds .*: set it to the .npz",
  }.items():
    with pytest.raises(UserError, match=message):
      npz.load_npz("train", make_options(tmp_path / name))
  with pytest.raises(UserError, match=r"data\.name=npz needs config\.data\.data_dir"):
    npz.load_npz("train", make_options())


def test_the_fingerprint_of_an_npz_follows_its_content(make_npz):
  image = batch()
  first = load_both(make_npz(image=image))
  assert first[0].fingerprint | {"digest": ""} == {
    "name": "npz",
    "split": "train",
    "num_examples": len(first[0]),
    "crop": f"centre crop of the short side, bicubic antialiased resize to {SIZE}",
    "digest": "",
  }
  assert first[1].fingerprint["split"] == "eval"
  assert first[1].fingerprint["num_examples"] == len(first[1])
  image[3, 2, 1, 0] ^= 1
  second = load_both(make_npz(image=image))[0].fingerprint
  assert second["digest"] != first[0].fingerprint["digest"]
  assert json.loads(json.dumps(second)) == second
