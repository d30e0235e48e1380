"""Own images: folders and .npz files, all of them made here."""

import errno
import io
import json
import logging
import os
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from lrdit.data import folder as image_files
from lrdit.data.source import DataOptions
from lrdit.runtime.errors import UserError
from tests.data.images_test import tiff

SIZE = 8


@pytest.fixture(autouse=True)
def log_lines(caplog, monkeypatch):
  """What was logged, as (level, message); `start_logging` stops propagation."""
  caplog.set_level(logging.DEBUG, logger="lrdit")
  return lambda: [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "lrdit"]


def make_options(path, **changes):
  options = dict(
    data_dir=str(path), image_size=SIZE, num_channels=3, cache_bytes=10**9, skip_unreadable=False
  )
  return DataOptions(**options | changes)


def pixels(seed, height=SIZE, width=SIZE, channels=3):
  shape = (height, width, channels) if channels > 1 else (height, width)
  return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def save(path, image, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  if not isinstance(image, Image.Image):
    image = Image.fromarray(image)
  image.save(path, **options)
  return path


def encoded(image, kind, **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def read(source):
  """Every image and label of a source."""
  index = np.arange(len(source))
  return source.images[index], source.labels[index]


def load_one(tmp_path, image, name="it.png", options=None, **changes):
  """The pixels that one file among the training images comes to."""
  save(tmp_path / "train" / name, image, **(options or {}))
  save(tmp_path / "eval" / "other.png", pixels(0))
  source = image_files.load_folder("train", make_options(tmp_path, **changes))
  assert len(source) == 1
  return read(source)[0][0]


def make_flat(folder, numbers):
  """Images that tell their number by their first pixel."""
  for i in numbers:
    save(folder / f"{i:03d}.png", np.full((SIZE, SIZE, 3), i, np.uint8))


def numbers_of(source):
  return read(source)[0][:, 0, 0, 0].tolist()


def is_held_out(name):
  return zlib.crc32(name.encode()) % 20 == 0


# Folders: what is in which split, and of which class.


def test_a_flat_folder_has_no_classes_and_every_image_in_one_split(tmp_path):
  make_flat(tmp_path, range(100))
  train, held_out = (
    image_files.load_folder(split, make_options(tmp_path)) for split in ("train", "eval")
  )
  assert sorted(numbers_of(train) + numbers_of(held_out)) == list(range(100))
  assert numbers_of(held_out) == [i for i in range(100) if is_held_out(f"{i:03d}.png")]
  assert 1 <= len(held_out) <= 15
  for source in (train, held_out):
    assert source.num_classes == 0
    assert not read(source)[1].any()
    assert "classes" not in source.fingerprint


def test_files_that_come_and_go_move_no_others_between_the_splits(tmp_path):
  make_flat(tmp_path, range(0, 100, 2))
  before = set(numbers_of(image_files.load_folder("eval", make_options(tmp_path))))
  make_flat(tmp_path, range(1, 100, 2))
  for i in range(0, 20, 2):
    (tmp_path / f"{i:03d}.png").unlink()
  after = set(numbers_of(image_files.load_folder("eval", make_options(tmp_path))))
  assert before
  assert {i for i in after if i % 2 == 0} == before - set(range(20))


def test_classes_are_the_top_sub_folders_by_name_whatever_is_nested(tmp_path):
  places = ["zebra", "ant/wild/small", "Bee", "ant"]
  expected = {}
  for i in range(100):
    name = f"{places[i % 4]}/{i}.png"
    save(tmp_path / name, np.full((SIZE, SIZE, 3), i, np.uint8))
    expected[i] = ["Bee", "ant", "zebra"].index(name.split("/")[0])
  seen = {}
  for split in ("train", "eval"):
    source = image_files.load_folder(split, make_options(tmp_path))
    assert source.num_classes == 3
    assert source.fingerprint["classes"] == ["Bee", "ant", "zebra"]
    rows, labels = read(source)
    assert labels.dtype == np.int32
    seen |= dict(zip(rows[:, 0, 0, 0].tolist(), labels.tolist(), strict=True))
  assert seen == expected


def test_whole_numbers_are_classes_in_the_order_of_their_values(tmp_path):
  names = ["10", "2", "0", "07", "7", "b", "11", "a10", "a2"]
  for split in ("train", "eval"):
    for i, name in enumerate(names):
      save(tmp_path / split / name / f"{split}.png", pixels(i))
  source = image_files.load_folder("train", make_options(tmp_path))
  expected = ["0", "2", "07", "7", "10", "11", "a10", "a2", "b"]
  assert source.fingerprint["classes"] == expected
  rows, labels = read(source)
  for row, label in zip(rows, labels, strict=True):
    np.testing.assert_array_equal(row, pixels(names.index(expected[label])))


def test_the_held_out_images_of_classes_go_by_the_whole_relative_path(tmp_path):
  for place in ("a", "b"):
    for i in range(60):
      save(tmp_path / place / f"{i}.png", np.full((SIZE, SIZE, 3), i, np.uint8))
  source = image_files.load_folder("eval", make_options(tmp_path))
  rows, labels = read(source)
  got = [f"{'ab'[k]}/{i}.png" for i, k in zip(rows[:, 0, 0, 0], labels, strict=True)]
  expected = [f"{place}/{i}.png" for place in "ab" for i in range(60)]
  assert got == sorted(name for name in expected if is_held_out(name))


def test_images_beside_sub_folders_with_images_are_refused(tmp_path):
  save(tmp_path / "lone.png", pixels(0))
  save(tmp_path / "cat" / "a.png", pixels(1))
  with pytest.raises(UserError, match=r"directly \(lone.png\).*\(cat/a.png\): move all"):
    image_files.load_folder("train", make_options(tmp_path))


@pytest.mark.parametrize("name", image_files.EVAL_FOLDERS)
def test_sub_folders_called_like_splits_are_the_splits(tmp_path, name):
  save(tmp_path / "train" / "cat" / "1.png", pixels(1))
  save(tmp_path / "train" / "dog" / "2.png", pixels(2))
  save(tmp_path / name / "dog" / "3.png", pixels(3))
  train = image_files.load_folder("train", make_options(tmp_path))
  held_out = image_files.load_folder("eval", make_options(tmp_path))
  assert train.num_classes == held_out.num_classes == 2
  np.testing.assert_array_equal(read(train)[0], [pixels(1), pixels(2)])
  np.testing.assert_array_equal(read(train)[1], [0, 1])
  np.testing.assert_array_equal(read(held_out)[0], [pixels(3)])
  np.testing.assert_array_equal(read(held_out)[1], [1])


def test_split_folders_may_be_flat(tmp_path):
  save(tmp_path / "Train" / "1.png", pixels(1))
  save(tmp_path / "Test" / "2.png", pixels(2))
  for split, seed in (("train", 1), ("eval", 2)):
    source = image_files.load_folder(split, make_options(tmp_path))
    assert (len(source), source.num_classes) == (1, 0)
    np.testing.assert_array_equal(read(source)[0][0], pixels(seed))


@pytest.mark.parametrize(
  ("names", "message"),
  [
    (["train/a/1.png", "val/b/1.png"], "val must be classes of train; b"),
    (["train/a/1.png", "val/1.png"], "it has no sub-folders"),
    (["train/1.png", "val/a/1.png"], "val must be classes of train; a"),
    (["train/1.png", "train/a/1.png", "val/a/1.png"], "holds images both directly"),
    (["train/1.png", "val/1.png", "test/1.png"], r"\(test, train, val\) are called like splits"),
    (["train/1.png"], r"\(train\) are called like splits"),
    (["val/1.png", "test/1.png"], r"\(test, val\) are called like splits"),
  ],
)
def test_split_folders_that_do_not_fit_each_other_are_refused(tmp_path, names, message):
  for name in names:
    save(tmp_path / name, pixels(0))
  for split in ("train", "eval"):
    with pytest.raises(UserError, match=message):
      image_files.load_folder(split, make_options(tmp_path))


def test_classes_may_be_called_like_splits_among_others(tmp_path):
  for i in range(100):
    save(tmp_path / ("train", "bus")[i % 2] / f"{i}.png", pixels(i))
  source = image_files.load_folder("train", make_options(tmp_path))
  assert source.fingerprint["classes"] == ["bus", "train"]


def test_too_few_images_to_hold_one_out_are_refused(tmp_path):
  save(tmp_path / "a.png", pixels(0))
  for split in ("train", "eval"):
    with pytest.raises(UserError, match=r"number of images: 1\): add images, or sort them into"):
      image_files.load_folder(split, make_options(tmp_path))


@pytest.mark.parametrize(
  ("load", "message"),
  [
    (image_files.load_folder, "data.name=folder needs config.data.data_dir"),
    (image_files.load_npz, "data.name=npz needs config.data.data_dir"),
  ],
)
def test_the_path_must_be_given(load, message):
  with pytest.raises(UserError, match=message):
    load("train", make_options(""))


def test_a_folder_that_is_missing_or_a_file_or_empty_is_refused(tmp_path):
  with pytest.raises(UserError, match="nowhere does not exist"):
    image_files.load_folder("train", make_options(tmp_path / "nowhere"))
  (tmp_path / "notes.txt").write_text("words")
  with pytest.raises(UserError, match=r"notes\.txt is not a folder"):
    image_files.load_folder("train", make_options(tmp_path / "notes.txt"))
  with pytest.raises(UserError, match="holds no images"):
    image_files.load_folder("train", make_options(tmp_path))


def test_other_and_hidden_files_and_empty_sub_folders_are_named(tmp_path, log_lines):
  save(tmp_path / "train" / "cat" / "1.PNG", pixels(1))
  save(tmp_path / "train" / "cat" / "2.Jpeg", pixels(2))
  save(tmp_path / "eval" / "cat" / "3.png", pixels(3))
  for name in ("d.txt", "c.heic", "train/b.json", "train/cat/a"):
    (tmp_path / name).write_text("words")
  (tmp_path / "train" / "dog" / "puppy").mkdir(parents=True)
  for name in (".DS_Store", "train/.thumbs/1.png", "train/cat/.2.png"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("words")
  source = image_files.load_folder("train", make_options(tmp_path))
  assert (len(source), source.fingerprint["classes"]) == (2, ["cat"])
  assert log_lines() == [
    (
      "INFO",
      "left out: hidden files and folders (3): .DS_Store, train/.thumbs, train/cat/.2.png",
    ),
    (
      "WARNING",
      "left out: not images by their extension (4): c.heic, d.txt, train/b.json, and 1 more",
    ),
    ("WARNING", f"left out: the sub-folder {tmp_path}/train/dog has no images"),
  ]


def test_links_are_followed_but_not_in_circles(tmp_path):
  save(tmp_path / "store" / "1.png", pixels(1))
  save(tmp_path / "store" / "cats" / "2.png", pixels(2))
  (tmp_path / "data" / "train" / "cat").mkdir(parents=True)
  (tmp_path / "data" / "train" / "cat" / "1.png").symlink_to(tmp_path / "store" / "1.png")
  (tmp_path / "data" / "train" / "cat" / "up").symlink_to(tmp_path / "data")
  (tmp_path / "data" / "train" / "tom").symlink_to(tmp_path / "store" / "cats")
  (tmp_path / "data" / "eval").symlink_to(tmp_path / "data" / "train")
  source = image_files.load_folder("train", make_options(tmp_path / "data"))
  assert source.fingerprint["classes"] == ["cat", "tom"]
  np.testing.assert_array_equal(read(source)[0], [pixels(1), pixels(2)])


def test_a_file_name_in_another_encoding_is_read_and_named(tmp_path, log_lines):
  name = os.fsdecode(b"caf\xe9.png")
  for folder in ("train", "eval"):
    save(tmp_path / folder / "good.png", pixels(1))
    try:
      (tmp_path / folder / name).write_bytes(encoded(Image.fromarray(pixels(2)), "PNG"))
    except OSError:
      pytest.skip("this file system takes no such name")
  source = image_files.load_folder("train", make_options(tmp_path))
  np.testing.assert_array_equal(read(source)[0], [pixels(2), pixels(1)])
  json.dumps(source.fingerprint, ensure_ascii=False).encode()
  (tmp_path / "train" / name).write_bytes(b"")
  with pytest.raises(UserError, match=r"train/caf\\udce9.png \(an empty file\)"):
    image_files.load_folder("train", make_options(tmp_path))


def test_a_file_name_in_another_encoding_is_in_one_split(tmp_path):
  make_flat(tmp_path, range(100))
  try:
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes((tmp_path / "000.png").read_bytes())
  except OSError:
    pytest.skip("this file system takes no such name")
  train, held_out = (
    len(image_files.load_folder(split, make_options(tmp_path))) for split in ("train", "eval")
  )
  assert train + held_out == 101


# Folders: the pixels.


@pytest.mark.parametrize("extension", ["png", "bmp", "tif", "tiff", "ppm", "webp"])
def test_an_image_of_the_right_size_survives_exactly(tmp_path, extension):
  options = {"lossless": True} if extension == "webp" else {}
  got = load_one(tmp_path, pixels(1), f"it.{extension}", options)
  np.testing.assert_array_equal(got, pixels(1))


def striped(mode, colours):
  """An image with the left half in one colour and the right half in another."""
  image = Image.new(mode, (SIZE, SIZE), colours[0])
  image.paste(colours[1], (SIZE // 2, 0, SIZE, SIZE))
  return image


def palette_image(**info):
  image = striped("P", (0, 1))
  image.putpalette([200, 100, 50, 10, 20, 30])
  image.info.update(info)
  return image


def deep_grey():
  return Image.fromarray(
    np.repeat([[0x1234] * (SIZE // 2) + [0xAB00] * (SIZE // 2)], SIZE, 0).astype(np.uint16)
  )


@pytest.mark.parametrize(
  ("image", "name", "left", "right", "kind"),
  [
    (striped("L", (7, 240)), "it.png", (7, 7, 7), (240, 240, 240), "grey"),
    (striped("1", (0, 1)), "it.png", (0, 0, 0), (255, 255, 255), "black and white"),
    (palette_image(), "it.png", (200, 100, 50), (10, 20, 30), "palette"),
    (palette_image(), "it.gif", (200, 100, 50), (10, 20, 30), "palette"),
    (
      palette_image(transparency=0),
      "it.png",
      (255, 255, 255),
      (10, 20, 30),
      "with transparency",
    ),
    (
      striped("RGBA", ((9, 9, 9, 0), (100, 0, 0, 51))),
      "it.png",
      (255, 255, 255),
      (224, 204, 204),
      "with transparency",
    ),
    (
      striped("LA", ((9, 0), (90, 255))),
      "it.png",
      (255, 255, 255),
      (90, 90, 90),
      "with transparency",
    ),
    (striped("CMYK", ((0, 255, 255, 0), (0, 0, 0, 255))), "it.tif", (255, 0, 0), (0, 0, 0), "CMYK"),
    (deep_grey(), "it.png", (0x12,) * 3, (0xAB,) * 3, "16-bit grey"),
  ],
)
def test_images_of_other_kinds_are_converted_and_counted(
  tmp_path, log_lines, image, name, left, right, kind
):
  got = load_one(tmp_path, image, name)
  assert (got[:, : SIZE // 2] == left).all()
  assert (got[:, SIZE // 2 :] == right).all()
  assert log_lines() == [("INFO", f"1 of 1 images converted to RGB: 1 {kind}")]


def test_a_cmyk_jpeg_is_converted(tmp_path, log_lines):
  image = striped("CMYK", ((0, 255, 255, 0), (0, 0, 0, 255)))
  got = load_one(tmp_path, image, "it.jpg", {"quality": 100, "subsampling": 0}).astype(int)
  assert abs(got[:, : SIZE // 2] - (255, 0, 0)).max() < 8
  assert abs(got[:, SIZE // 2 :]).max() < 8
  assert log_lines() == [("INFO", "1 of 1 images converted to RGB: 1 CMYK")]


def test_images_are_converted_to_grey_where_the_model_is_grey(tmp_path, log_lines):
  save(tmp_path / "train" / "1.png", pixels(1, channels=1))
  save(tmp_path / "train" / "2.png", Image.new("RGB", (SIZE, SIZE), (255, 0, 0)))
  save(tmp_path / "eval" / "3.png", pixels(3))
  source = image_files.load_folder("train", make_options(tmp_path, num_channels=1))
  assert source.image_shape == (SIZE, SIZE, 1)
  rows, _ = read(source)
  np.testing.assert_array_equal(rows[0, :, :, 0], pixels(1, channels=1))
  assert (rows[1] == 76).all()
  assert log_lines() == [("INFO", "1 of 2 images converted to grey: 1 colour")]


def test_the_kinds_are_counted_together(tmp_path, log_lines):
  kinds = {"a": striped("L", (1, 2)), "b": striped("L", (1, 2)), "c": palette_image()}
  for name, image in kinds.items():
    save(tmp_path / "train" / f"{name}.png", image)
  save(tmp_path / "train" / "d.png", pixels(1))
  save(tmp_path / "eval" / "e.png", palette_image())
  (tmp_path / "train" / "b0.png").write_bytes(b"")
  image_files.load_folder("train", make_options(tmp_path, skip_unreadable=True))
  assert log_lines()[2:] == [("INFO", "3 of 4 images converted to RGB: 2 grey, 1 palette")]


@pytest.mark.parametrize(("height", "width"), [(SIZE, 3 * SIZE), (3 * SIZE, SIZE)])
def test_an_oblong_image_is_cropped_to_its_centre(tmp_path, log_lines, height, width):
  image = pixels(1, height, width)
  top, left = (height - SIZE) // 2, (width - SIZE) // 2
  np.testing.assert_array_equal(
    load_one(tmp_path, image), image[top : top + SIZE, left : left + SIZE]
  )
  assert log_lines() == [("INFO", "1 of 1 images are not square: only the centre is used")]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2 * SIZE), (3, 5)])
def test_a_tiny_image_is_enlarged_with_a_warning(tmp_path, log_lines, height, width):
  got = load_one(tmp_path, np.full((height, width, 3), 70, np.uint8))
  assert (got == 70).all()
  enlarged = ("WARNING", f"1 of 1 images are smaller than {SIZE} pixels and enlarged")
  assert log_lines()[-1] == enlarged


def test_an_image_of_odd_size_is_resized(tmp_path):
  got = load_one(tmp_path, np.full((37, 53, 3), (10, 200, 90), np.uint8))
  assert (got == (10, 200, 90)).all()


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
@pytest.mark.parametrize("extension", ["png", "tif"])
def test_a_photograph_is_turned_as_its_camera_was_held(tmp_path, orientation, turns, extension):
  exif = Image.Exif()
  exif[0x0112] = orientation
  got = load_one(tmp_path, pixels(1), f"it.{extension}", {"exif": exif})
  np.testing.assert_array_equal(got, np.rot90(pixels(1), turns))


def test_a_turned_oblong_photograph_is_cropped_after_turning(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6
  image = pixels(1, SIZE, 3 * SIZE)
  got = load_one(tmp_path, image, "it.png", {"exif": exif})
  np.testing.assert_array_equal(got, np.rot90(image[:, SIZE : 2 * SIZE], 3))


# Folders: files that cannot be read.


def damaged_files():
  """Bytes by name, and a part of the reason each must be refused for."""
  photograph = Image.fromarray(pixels(1, 64, 64))
  exif = Image.Exif()
  exif[0x0112] = 6
  jpeg, png = encoded(photograph, "JPEG"), encoded(photograph, "PNG")
  return {
    "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
    "cut.png": (png[: len(png) // 2], "truncated"),
    "empty.png": (b"", "an empty file"),
    "exif.webp": (
      encoded(photograph, "WEBP", exif=exif).replace(b"MM\0*", b"M2\0*"),
      "its EXIF data are damaged",
    ),
    "text.png": (b"these are words", "no image of a known format"),
  }


def make_damaged(folder):
  for name, (content, _) in damaged_files().items():
    (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", damaged_files())
def test_a_damaged_file_is_refused_by_name_and_reason(tmp_path, name):
  content, reason = damaged_files()[name]
  for i in range(3):
    save(tmp_path / "train" / f"good{i}.png", pixels(i))
  save(tmp_path / "eval" / "1.png", pixels(1))
  (tmp_path / "train" / name).write_bytes(content)
  with pytest.raises(UserError) as error:
    image_files.load_folder("train", make_options(tmp_path))
  message = str(error.value)
  assert message.startswith(f"1 of 4 images cannot be read: train/{name} (")
  assert reason in message
  assert message.endswith("): repair or remove them, or set config.data.skip_unreadable=True")
  assert "BytesIO" not in message
  assert str(tmp_path) not in message
  assert len(image_files.load_folder("eval", make_options(tmp_path))) == 1


def test_many_damaged_files_are_counted_three_named_and_all_logged(tmp_path, log_lines):
  save(tmp_path / "train" / "a.png", pixels(1))
  save(tmp_path / "eval" / "a.png", pixels(1))
  make_damaged(tmp_path / "train")
  with pytest.raises(UserError) as error:
    image_files.load_folder("train", make_options(tmp_path))
  message = str(error.value)
  assert message.startswith("5 of 6 images cannot be read: train/cut.jpg (")
  for name in ("train/cut.png (", "train/empty.png (an empty file), and 2 more: repair or remove"):
    assert name in message
  assert "exif.webp" not in message
  assert [line.split(" (")[0] for _, line in log_lines()] == [
    f"cannot be read: train/{name}" for name in damaged_files()
  ]


@pytest.mark.parametrize("cache_bytes", [0, 10**9])
def test_damaged_files_can_be_left_out_each_named_in_a_warning(tmp_path, log_lines, cache_bytes):
  save(tmp_path / "train" / "a" / "1.png", pixels(1))
  save(tmp_path / "train" / "b" / "2.png", pixels(2))
  save(tmp_path / "train" / "c" / "3.png", pixels(3))
  save(tmp_path / "eval" / "b" / "4.png", pixels(4))
  make_damaged(tmp_path / "train" / "b")
  options = make_options(tmp_path, skip_unreadable=True, cache_bytes=cache_bytes)
  source = image_files.load_folder("train", options)
  rows, labels = read(source)
  np.testing.assert_array_equal(rows, [pixels(1), pixels(2), pixels(3)])
  np.testing.assert_array_equal(labels, [0, 1, 2])
  assert source.fingerprint["num_examples"] == len(source) == 3
  lines = log_lines()
  assert len(lines) == len(damaged_files()) + 1
  for (level, line), (name, (_, reason)) in zip(lines, damaged_files().items(), strict=False):
    assert level == "WARNING"
    assert line.startswith(f"cannot be read: train/b/{name} (")
    assert reason in line
  assert lines[-1] == ("WARNING", "left out: 5 of 8 images that cannot be read")


@pytest.mark.parametrize("skip", [False, True])
def test_tiffs_are_read_in_either_byte_order_and_refused_by_name(tmp_path, log_lines, skip):
  """PIL raises what it does not document, for one image that can be read and one that cannot."""
  save(tmp_path / "eval" / "1.png", pixels(1))
  save(tmp_path / "train" / "1.png", pixels(1))
  values = np.arange(SIZE * SIZE).reshape(SIZE, SIZE) * 7
  (tmp_path / "train" / "big_endian.tif").write_bytes(tiff(values, ">"))
  Image.new("LAB", (SIZE, SIZE)).save(tmp_path / "train" / "lab.tif")
  options = make_options(tmp_path, skip_unreadable=skip)
  if skip:
    rows, _ = read(image_files.load_folder("train", options))
    np.testing.assert_array_equal(rows[1][..., 0], values >> 8)
    assert len(rows) == 2
    assert ("WARNING", "left out: 1 of 3 images that cannot be read") in log_lines()
  else:
    with pytest.raises(
      UserError, match=r"1 of 3 images cannot be read: train/lab.tif \(its colour"
    ):
      image_files.load_folder("train", options)


def test_a_limit_of_open_files_leaves_no_image_out(tmp_path, monkeypatch):
  for split in ("train", "eval"):
    save(tmp_path / split / "1.png", pixels(1))

  def refuse(path):
    raise OSError(errno.EMFILE, "Too many open files", str(path))

  monkeypatch.setattr(image_files.pathlib.Path, "read_bytes", refuse)
  with pytest.raises(OSError, match="Too many open files"):
    image_files.load_folder("train", make_options(tmp_path, skip_unreadable=True))


def test_leaving_out_every_image_is_refused(tmp_path):
  (tmp_path / "train").mkdir()
  save(tmp_path / "eval" / "1.png", pixels(1))
  make_damaged(tmp_path / "train")
  with pytest.raises(UserError, match="none of the 5 images can be read"):
    image_files.load_folder("train", make_options(tmp_path, skip_unreadable=True))


def test_a_link_to_nothing_is_named(tmp_path):
  save(tmp_path / "train" / "1.png", pixels(1))
  save(tmp_path / "eval" / "1.png", pixels(1))
  (tmp_path / "train" / "2.png").symlink_to(tmp_path / "gone.png")
  with pytest.raises(UserError, match=r"train/2.png \(No such file or directory\)"):
    image_files.load_folder("train", make_options(tmp_path))


def count_decodings(monkeypatch):
  decoded, decode = [], image_files.images.decode
  monkeypatch.setattr(
    image_files.images, "decode", lambda content: (decoded.append(content), decode(content))[1]
  )
  return decoded


def test_cached_images_are_decoded_once(tmp_path, monkeypatch):
  decoded = count_decodings(monkeypatch)
  make_flat(tmp_path / "train", range(30))
  make_flat(tmp_path / "eval", range(1))
  source = image_files.load_folder("train", make_options(tmp_path))
  assert len(set(decoded)) == len(decoded) == 30
  assert numbers_of(source) == list(range(30))
  assert len(decoded) == 30


def test_images_beyond_the_cache_are_read_again_and_a_file_gone_bad_is_named(tmp_path):
  make_flat(tmp_path / "train", range(3))
  make_flat(tmp_path / "eval", range(1))
  source = image_files.load_folder("train", make_options(tmp_path, cache_bytes=100))
  assert numbers_of(source) == [0, 1, 2]
  (tmp_path / "train" / "001.png").write_bytes(b"")
  np.testing.assert_array_equal(source.images[np.array([2, 0])][:, 0, 0, 0], [2, 0])
  with pytest.raises(UserError, match=r"train/001.png cannot be read \(an empty file\): repair"):
    source.images[np.array([0, 1])]


def test_more_images_than_are_queued_at_once_are_all_checked(tmp_path, monkeypatch):
  monkeypatch.setattr(image_files, "CHECKED_AT_ONCE", 4)
  decoded = count_decodings(monkeypatch)
  make_flat(tmp_path / "train", range(11))
  make_flat(tmp_path / "eval", range(1))
  image_files.load_folder("train", make_options(tmp_path))
  assert len(decoded) == 11


# What tells one state of the data from another.


def test_the_fingerprint_says_what_the_folder_holds(tmp_path):
  save(tmp_path / "train" / "cat" / "1.png", pixels(1))
  save(tmp_path / "train" / "dog" / "2.png", pixels(2))
  save(tmp_path / "val" / "dog" / "3.png", pixels(3))

  def fingerprint(split="train"):
    found = image_files.load_folder(split, make_options(tmp_path)).fingerprint
    assert json.loads(json.dumps(found)) == found
    return found

  first = fingerprint()
  assert first == fingerprint()
  assert first | {"digest": ""} == {
    "name": "folder",
    "split": "train",
    "num_examples": 2,
    "crop": f"centre crop of the short side, bicubic antialiased resize to {SIZE}",
    "classes": ["cat", "dog"],
    "digest": "",
  }
  assert len(first["digest"]) == 16
  assert fingerprint("eval")["digest"] != first["digest"]
  with open(tmp_path / "train" / "cat" / "1.png", "ab") as file:
    file.write(b"\0")
  longer = fingerprint()
  assert longer["digest"] != first["digest"]
  (tmp_path / "train" / "cat" / "1.png").rename(tmp_path / "train" / "cat" / "0.png")
  renamed = fingerprint()
  assert renamed["digest"] not in (first["digest"], longer["digest"])
  before = fingerprint("eval")
  save(tmp_path / "train" / "dog" / "4.png", pixels(4))
  assert fingerprint()["num_examples"] == 3
  assert fingerprint("eval") == before


def test_an_image_left_out_changes_the_fingerprint(tmp_path):
  make_flat(tmp_path / "train", range(3))
  make_flat(tmp_path / "eval", range(1))
  whole = image_files.load_folder("train", make_options(tmp_path)).fingerprint
  (tmp_path / "train" / "001.png").write_bytes(b"")
  rest = image_files.load_folder("train", make_options(tmp_path, skip_unreadable=True)).fingerprint
  (tmp_path / "train" / "001.png").unlink()
  assert image_files.load_folder("train", make_options(tmp_path)).fingerprint == rest
  assert rest["digest"] != whole["digest"]


# .npz files.


def make_npz(tmp_path, **arrays):
  np.savez(tmp_path / "own.npz", **arrays)
  return tmp_path / "own.npz"


def batch(channels=3, count=100, height=SIZE, width=SIZE):
  return np.stack([pixels(i, height, width, channels) for i in range(count)])


def load_both(path, **changes):
  return [image_files.load_npz(split, make_options(path, **changes)) for split in ("train", "eval")]


def test_an_npz_is_split_by_index_and_read_as_it_is(tmp_path, log_lines):
  image, label = batch(), np.arange(100, dtype=np.int64) % 7
  train, held_out = load_both(make_npz(tmp_path, image=image, label=label))
  mask = np.array([is_held_out(str(i)) for i in range(100)])
  for source, rows in ((train, ~mask), (held_out, mask)):
    np.testing.assert_array_equal(read(source)[0], image[rows])
    np.testing.assert_array_equal(read(source)[1], label[rows])
    assert read(source)[1].dtype == np.int32
    assert source.num_classes == 7
    assert isinstance(source.images, np.ndarray)
  assert 1 <= len(held_out) <= 15
  assert log_lines() == []


def test_an_npz_that_grows_moves_no_image_between_the_splits(tmp_path):
  image = np.arange(100, dtype=np.uint8)[:, None, None, None] * np.ones((SIZE, SIZE, 3), np.uint8)
  few = numbers_of(load_both(make_npz(tmp_path, image=image[:60]))[1])
  many = numbers_of(load_both(make_npz(tmp_path, image=image))[1])
  assert few
  assert [i for i in many if i < 60] == few


def test_an_npz_without_labels_has_no_classes(tmp_path):
  for source in load_both(make_npz(tmp_path, image=batch())):
    assert source.num_classes == 0
    assert not read(source)[1].any()


@pytest.mark.parametrize("axis", [(), (1,)])
def test_grey_arrays_are_read_as_grey_or_repeated(tmp_path, log_lines, axis):
  image = batch(1)
  path = make_npz(tmp_path, image=image.reshape(*image.shape, *axis))
  mask = np.array([not is_held_out(str(i)) for i in range(100)])
  grey = load_both(path, num_channels=1)[0]
  np.testing.assert_array_equal(read(grey)[0][..., 0], image[mask])
  assert log_lines() == []
  colour = load_both(path, num_channels=3)[0]
  np.testing.assert_array_equal(read(colour)[0], np.repeat(image[mask][..., None], 3, -1))
  total = mask.sum()
  assert log_lines()[0] == (
    "INFO",
    f"{total} of {total} images converted to RGB: {total} grey",
  )


def test_transparent_arrays_are_laid_over_white(tmp_path, log_lines):
  image = np.zeros((100, SIZE, SIZE, 4), np.uint8)
  image[:, :, : SIZE // 2, 3] = 255
  rows = read(load_both(make_npz(tmp_path, image=image))[0])[0]
  assert (rows[:, :, : SIZE // 2] == 0).all()
  assert (rows[:, :, SIZE // 2 :] == 255).all()
  assert log_lines()[0][1].endswith("with transparency")


def test_arrays_of_another_size_are_cropped_and_resized(tmp_path, log_lines):
  image = batch(height=SIZE, width=2 * SIZE)
  centre = image[:, :, SIZE // 2 : -SIZE // 2]
  path = make_npz(tmp_path, image=image)
  mask = np.array([not is_held_out(str(i)) for i in range(100)])
  train = load_both(path)[0]
  np.testing.assert_array_equal(read(train)[0], centre[mask])
  assert "are not square" in log_lines()[0][1]
  large = load_both(path, image_size=2 * SIZE)[0]
  assert large.image_shape == (2 * SIZE, 2 * SIZE, 3)
  assert read(large)[0].shape == (mask.sum(), 2 * SIZE, 2 * SIZE, 3)
  assert any(level == "WARNING" and "enlarged" in line for level, line in log_lines())


@pytest.mark.parametrize(
  ("arrays", "message"),
  [
    ({"images": batch(), "y": np.zeros(100)}, "has no array image, only images, y: make it by"),
    ({"arr_0": batch()}, "only arr_0; arr_0 was saved without a name: rename it"),
    ({"image": batch() / 255.0}, r"is float64: it must be uint8 in \[0, 255\]"),
    ({"image": batch().astype(np.int64)}, "is int64: it must be uint8"),
    ({"image": batch().astype(np.uint16)}, "is uint16: it must be uint8"),
    ({"image": batch()[0, 0]}, r"of shape \(8, 3\): it must be \(N, H, W\)"),
    ({"image": batch()[None]}, r"of shape \(1, 100, 8, 8, 3\)"),
    ({"image": batch().transpose(0, 3, 1, 2)}, r"of shape \(100, 3, 8, 8\)"),
    ({"image": batch()[:0]}, "not empty"),
    ({"image": np.array([pixels(1), None], object)}, "not plain numbers .*make it by"),
    ({"image": batch(), "label": np.array([None] * 100)}, "not plain numbers"),
    ({"image": batch(), "label": np.zeros(99, int)}, r"of shape \(99,\): it must be \(100,\)"),
    ({"image": batch(), "label": np.zeros((100, 1), int)}, r"of shape \(100, 1\)"),
    ({"image": batch(), "label": np.zeros(100)}, "is float64: it must be integers"),
    ({"image": batch(), "label": np.full(100, -1)}, "runs from -1 to -1: number the classes"),
    ({"image": batch(), "label": np.full(100, 2**40)}, "number the classes from 0"),
    ({"image": batch(count=3)}, r"number of images: 3\): add images"),
  ],
)
def test_arrays_of_another_kind_are_refused(tmp_path, arrays, message):
  path = make_npz(tmp_path, **arrays)
  for split in ("train", "eval"):
    with pytest.raises(UserError, match=message):
      image_files.load_npz(split, make_options(path))


def test_an_array_that_nothing_reads_is_named(tmp_path, log_lines):
  path = make_npz(tmp_path, image=batch(), labels=np.zeros(100, int))
  image_files.load_npz("train", make_options(path))
  assert log_lines() == [("WARNING", f"left out: arrays of {path} besides image and label: labels")]


def test_a_file_that_is_no_npz_or_damaged_is_refused(tmp_path):
  for path in (tmp_path / "none.npz", tmp_path):
    with pytest.raises(
      UserError, match=r"is not a file: give the \.npz .*\(there is (no|an empty)"
    ):
      image_files.load_npz("train", make_options(path))
  np.save(tmp_path / "plain.npy", batch())
  content = bytearray(make_npz(tmp_path, image=batch()).read_bytes())
  (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
  (tmp_path / "empty.npz").write_bytes(b"")
  (tmp_path / "it.parquet").write_bytes(b"PAR1" + bytes(20))
  (tmp_path / "text.npz").write_text("words")
  kinds = {
    "plain.npy": "an .npy array",
    "cut.npz": "a zip archive or .npz",
    "empty.npz": "an empty file",
    "it.parquet": "a Parquet file",
    "text.npz": "a file of another kind",
  }
  for name, kind in kinds.items():
    with pytest.raises(
      UserError, match=rf"{name} is not an .npz, or is cut short \(it is {kind}\)"
    ):
      image_files.load_npz("train", make_options(tmp_path / name))
  content[len(content) // 2] ^= 255
  (tmp_path / "flipped.npz").write_bytes(content)
  with pytest.raises(UserError, match=r"flipped\.npz is damaged"):
    image_files.load_npz("train", make_options(tmp_path / "flipped.npz"))


def test_a_compression_that_numpy_cannot_read_is_refused(tmp_path):
  path = make_npz(tmp_path, image=batch())
  content = bytearray(path.read_bytes())
  content[content.rindex(b"PK\1\2") + 10] = 9  # Deflate64, which Windows makes of large files
  path.write_bytes(content)
  with pytest.raises(UserError, match="compression method is not supported"):
    image_files.load_npz("train", make_options(path))


def test_a_zip_of_other_things_is_refused(tmp_path):
  with zipfile.ZipFile(tmp_path / "own.npz", "w") as file:
    file.writestr("image", "these are words")
  with pytest.raises(UserError, match="it must be uint8"):
    image_files.load_npz("train", make_options(tmp_path / "own.npz"))


def test_the_fingerprint_of_an_npz_follows_its_content(tmp_path):
  image = batch()
  first = load_both(make_npz(tmp_path, image=image))
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
  second = load_both(make_npz(tmp_path, image=image))
  assert second[0].fingerprint["digest"] != first[0].fingerprint["digest"]
  assert json.loads(json.dumps(second[0].fingerprint)) == second[0].fingerprint


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_a_batch_is_in_the_range_of_the_model_and_leaves_the_source_alone(tmp_path, kind):
  if kind == "folder":
    make_flat(tmp_path / "train", [0, 255])
    make_flat(tmp_path / "eval", [1])
    source = image_files.load_folder("train", make_options(tmp_path))
  else:
    source = load_both(make_npz(tmp_path, image=batch()))[0]
  before = read(source)[0]
  got = source.gather(np.array([1, 0]), np.array([True, False]))
  np.testing.assert_allclose(got["image"][1], before[0] / 127.5 - 1, atol=1e-6)
  np.testing.assert_allclose(got["image"][0], before[1, :, ::-1] / 127.5 - 1, atol=1e-6)
  assert got["label"].dtype == np.int32
  np.testing.assert_array_equal(read(source)[0], before)
