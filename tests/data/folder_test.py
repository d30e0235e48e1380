"""Folders of images, all written by the tests."""

import errno
import json
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from lrdit.data import folder, images
from lrdit.runtime.errors import UserError
from tests.image_files import (
  SIZE,
  damaged_files,
  deep_grey,
  encoded,
  is_held_out,
  make_damaged,
  make_flat,
  make_options,
  make_splits,
  numbered,
  numbers_of,
  palette_image,
  pixels,
  read,
  save,
  striped,
  tiff,
)


def load(path, split="train", **changes):
  return folder.load_folder(split, make_options(path, **changes))


def load_both(path):
  return [load(path, split) for split in ("train", "eval")]


def load_one(tmp_path, image, name="it.png", **options):
  """Return the pixels that are loaded from one training file."""
  make_splits(tmp_path)
  save(tmp_path / "train" / name, image, **options)
  source = load(tmp_path)
  assert len(source) == 1
  return read(source)[0][0]


def messages(caplog):
  return [(record.levelname, record.getMessage()) for record in caplog.records]


# Splits and classes.


def test_a_flat_folder_has_no_classes_and_every_image_in_one_split(tmp_path):
  make_flat(tmp_path, range(100))
  train, held_out = load_both(tmp_path)
  assert sorted(numbers_of(train) + numbers_of(held_out)) == list(range(100))
  assert numbers_of(held_out) == [i for i in range(100) if is_held_out(f"{i:03d}.png")]
  assert 1 <= len(held_out) <= 15
  for source in (train, held_out):
    assert source.num_classes == 0
    assert not read(source)[1].any()
    assert "classes" not in source.fingerprint


def test_classes_are_the_top_sub_folders_whatever_they_hold(tmp_path):
  places = ["zebra", "ant/wild/small", "Bee", "ant"]
  names = [f"{places[i % 4]}/{i}.png" for i in range(100)]
  for i, name in enumerate(names):
    save(tmp_path / name, numbered(i))
  classes = ["Bee", "ant", "zebra"]
  for split, source in zip(("train", "eval"), load_both(tmp_path), strict=True):
    assert (source.num_classes, source.fingerprint["classes"]) == (3, classes)
    labels = read(source)[1]
    assert labels.dtype == np.int32
    got = dict(zip(numbers_of(source), labels.tolist(), strict=True))
    assert got == {
      i: classes.index(name.split("/")[0])
      for i, name in enumerate(names)
      if is_held_out(name) == (split == "eval")  # by the whole relative path
    }


def test_whole_numbers_are_classes_in_the_order_of_their_values(tmp_path):
  names = ["10", "2", "0", "07", "7", "b", "11", "a10", "a2"]
  for split in ("train", "eval"):
    for i, name in enumerate(names):
      save(tmp_path / split / name / f"{split}.png", pixels(i))
  source = load(tmp_path)
  expected = ["0", "2", "07", "7", "10", "11", "a10", "a2", "b"]
  assert source.fingerprint["classes"] == expected
  rows, labels = read(source)
  for row, label in zip(rows, labels, strict=True):
    np.testing.assert_array_equal(row, pixels(names.index(expected[label])))


@pytest.mark.parametrize("name", folder.EVAL_FOLDERS)
def test_sub_folders_with_names_of_splits_are_the_splits(tmp_path, name):
  save(tmp_path / "train" / "cat" / "1.png", pixels(1))
  save(tmp_path / "train" / "dog" / "2.png", pixels(2))
  save(tmp_path / name / "dog" / "3.png", pixels(3))
  for source, seeds, labels in zip(load_both(tmp_path), ([1, 2], [3]), ([0, 1], [1]), strict=True):
    assert source.num_classes == 2
    np.testing.assert_array_equal(read(source)[0], [pixels(seed) for seed in seeds])
    assert read(source)[1].tolist() == labels


def test_split_folders_may_be_flat_and_classes_may_have_names_of_splits(tmp_path):
  save(tmp_path / "flat" / "Train" / "1.png", numbered(1))
  save(tmp_path / "flat" / "Test" / "2.png", numbered(2))
  train, held_out = load_both(tmp_path / "flat")
  assert (numbers_of(train), numbers_of(held_out)) == ([1], [2])
  assert train.num_classes == held_out.num_classes == 0
  for i in range(100):
    save(tmp_path / "classes" / ("train", "bus")[i % 2] / f"{i}.png", numbered(i))
  assert load(tmp_path / "classes").fingerprint["classes"] == ["bus", "train"]


@pytest.mark.parametrize(
  ("names", "message"),
  [
    (["a/1.png", "1.png"], r"directly \(1.png\).*\(a/1.png\): move all"),
    (["train/1.png", "train/a/1.png", "val/a/1.png"], "holds images both directly"),
    (["train/a/1.png", "val/b/1.png"], "val must be classes of train; b"),
    (["train/a/1.png", "val/1.png"], "it has no sub-folders"),
    (["train/1.png", "val/a/1.png"], "val must be classes of train; a"),
    (["train/1.png", "val/1.png", "test/1.png"], r"\(test, train, val\) have names of splits"),
    (["train/1.png"], r"\(train\) have names of splits"),
    (["val/1.png", "test/1.png"], r"\(test, val\) have names of splits"),
    (["1.png"], r"number of images: 1\): add images, or sort them into"),
    (["notes.txt"], "holds no images"),
  ],
)
def test_other_layouts_are_refused(tmp_path, names, message):
  for name in names:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(encoded(Image.fromarray(pixels(0)), "PNG"))
  for split in ("train", "eval"):
    with pytest.raises(UserError, match=message):
      load(tmp_path, split)


def test_a_path_that_is_no_folder_is_refused(tmp_path):
  (tmp_path / "notes.txt").write_text("words")
  for path, message in (
    ("", "data.name=folder needs config.data.data_dir: set it to the folder"),
    (tmp_path / "nowhere", "nowhere is no file or directory: set it to the folder"),
    (tmp_path / "notes.txt", "notes.txt is a file of another kind: set it to the folder"),
  ):
    with pytest.raises(UserError, match=message):
      load(path)


def test_other_and_hidden_files_and_empty_sub_folders_are_named(tmp_path, told):
  save(tmp_path / "train" / "cat" / "1.PNG", pixels(1))
  save(tmp_path / "train" / "cat" / "2.Jpeg", pixels(2))
  save(tmp_path / "eval" / "cat" / "3.png", pixels(3))
  for name in ("d.txt", "c.heic", "train/b.json", "train/cat/a"):
    (tmp_path / name).write_text("words")
  (tmp_path / "train" / "dog" / "puppy").mkdir(parents=True)
  for name in (".DS_Store", "train/.thumbs/1.png", "train/cat/.2.png"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("words")
  source = load(tmp_path)
  assert (len(source), source.fingerprint["classes"]) == (2, ["cat"])
  hidden = ".DS_Store, train/.thumbs, train/cat/.2.png"
  others = "c.heic, d.txt, train/b.json and 1 more"
  assert messages(told) == [
    ("INFO", f"left out: hidden files and folders (3): {hidden}"),
    ("WARNING", f"left out: not images by their extension (4): {others}"),
    ("WARNING", f"left out: the sub-folder {tmp_path}/train/dog has no images"),
  ]


def test_links_are_followed_but_not_in_cycles(tmp_path):
  save(tmp_path / "store" / "1.png", pixels(1))
  save(tmp_path / "store" / "cats" / "2.png", pixels(2))
  (tmp_path / "data" / "train" / "cat").mkdir(parents=True)
  (tmp_path / "data" / "train" / "cat" / "1.png").symlink_to(tmp_path / "store" / "1.png")
  (tmp_path / "data" / "train" / "cat" / "up").symlink_to(tmp_path / "data")
  (tmp_path / "data" / "train" / "tom").symlink_to(tmp_path / "store" / "cats")
  (tmp_path / "data" / "eval").symlink_to(tmp_path / "data" / "train")
  source = load(tmp_path / "data")
  assert source.fingerprint["classes"] == ["cat", "tom"]
  np.testing.assert_array_equal(read(source)[0], [pixels(1), pixels(2)])


def test_a_file_name_in_another_encoding_is_read_and_named(tmp_path):
  name = os.fsdecode(b"caf\xe9.png")
  make_splits(tmp_path, good=pixels(1))
  try:
    save(tmp_path / "train" / name, pixels(2))
  except OSError:
    pytest.skip("this file system takes no such name")
  source = load(tmp_path)
  np.testing.assert_array_equal(read(source)[0], [pixels(2), pixels(1)])
  json.dumps(source.fingerprint, ensure_ascii=False).encode()
  (tmp_path / "train" / name).write_bytes(b"")
  with pytest.raises(UserError, match=r"train/caf\\udce9.png \(an empty file\)"):
    load(tmp_path)
  make_flat(tmp_path / "flat", range(100))
  save(tmp_path / "flat" / name, pixels(2))
  assert sum(map(len, load_both(tmp_path / "flat"))) == 101


# The pixels.


@pytest.mark.parametrize("extension", ["png", "bmp", "tif", "tiff", "ppm", "webp"])
def test_an_image_of_the_right_size_survives_exactly(tmp_path, extension):
  options = {"lossless": True} if extension == "webp" else {}
  got = load_one(tmp_path, pixels(1), f"it.{extension}", **options)
  np.testing.assert_array_equal(got, pixels(1))


WHITE, BLACK = (255, 255, 255), (0, 0, 0)
RGBA = striped("RGBA", ((9, 9, 9, 0), (100, 0, 0, 51)))
CMYK = striped("CMYK", ((0, 255, 255, 0), (0, 0, 0, 255)))


@pytest.mark.parametrize(
  ("image", "name", "left", "right", "kind"),
  [
    (striped("L", (7, 240)), "it.png", (7, 7, 7), (240, 240, 240), "gray"),
    (striped("1", (0, 1)), "it.png", BLACK, WHITE, "black and white"),
    (palette_image(), "it.png", (200, 100, 50), (10, 20, 30), "palette"),
    (palette_image(), "it.gif", (200, 100, 50), (10, 20, 30), "palette"),
    (palette_image(transparency=0), "it.png", WHITE, (10, 20, 30), "with transparency"),
    (RGBA, "it.png", WHITE, (224, 204, 204), "with transparency"),
    (striped("LA", ((9, 0), (90, 255))), "it.png", WHITE, (90, 90, 90), "with transparency"),
    (CMYK, "it.tif", (255, 0, 0), BLACK, "CMYK"),
    (CMYK, "it.jpg", (255, 0, 0), BLACK, "CMYK"),
    (deep_grey(), "it.png", (0x12,) * 3, (0xAB,) * 3, "16-bit gray"),
  ],
)
def test_images_of_other_kinds_are_converted_and_counted(
  tmp_path, told, image, name, left, right, kind
):
  lossy = {"quality": 100, "subsampling": 0} if name == "it.jpg" else {}
  got = load_one(tmp_path, image, name, **lossy).astype(int)
  tolerance = 8 if lossy else 0
  assert abs(got[:, : SIZE // 2] - left).max() <= tolerance
  assert abs(got[:, SIZE // 2 :] - right).max() <= tolerance
  assert messages(told) == [("INFO", f"1 of 1 images converted to RGB: 1 {kind}")]


def test_images_are_converted_to_grey_where_the_model_is_grey(tmp_path, told):
  red = Image.new("RGB", (SIZE, SIZE), (255, 0, 0))
  make_splits(tmp_path, a=pixels(1, channels=1), b=red)
  source = load(tmp_path, num_channels=1)
  assert source.image_shape == (SIZE, SIZE, 1)
  rows, _ = read(source)
  np.testing.assert_array_equal(rows[0, :, :, 0], pixels(1, channels=1))
  assert (rows[1] == 76).all()
  assert messages(told) == [("INFO", "1 of 2 images converted to gray: 1 color")]


def test_the_kinds_of_readable_images_are_counted_together(tmp_path, told):
  gray = striped("L", (1, 2))
  make_splits(tmp_path, a=gray, b=gray, c=palette_image(), d=pixels(1))
  (tmp_path / "train" / "b0.png").write_bytes(b"")
  load(tmp_path, skip_unreadable=True)
  assert messages(told)[2:] == [("INFO", "3 of 4 images converted to RGB: 2 gray, 1 palette")]


@pytest.mark.parametrize(("height", "width"), [(SIZE, 3 * SIZE), (3 * SIZE, SIZE)])
def test_an_oblong_image_is_cropped_to_its_centre(tmp_path, told, height, width):
  image = pixels(1, height, width)
  top, left = (height - SIZE) // 2, (width - SIZE) // 2
  expected = image[top : top + SIZE, left : left + SIZE]
  np.testing.assert_array_equal(load_one(tmp_path, image), expected)
  assert messages(told) == [("INFO", "1 of 1 images are not square: only the center is used")]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2 * SIZE), (3, 5), (37, 53)])
def test_images_of_any_size_are_resized_with_a_warning_where_enlarged(
  tmp_path, told, height, width
):
  color = (10, 200, 90)
  assert (load_one(tmp_path, np.full((height, width, 3), color, np.uint8)) == color).all()
  enlarged = ("WARNING", f"1 of 1 images are smaller than {SIZE} pixels and enlarged")
  assert (enlarged in messages(told)) == (height < SIZE)


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
@pytest.mark.parametrize("extension", ["png", "tif"])
def test_a_photograph_is_turned_upright(tmp_path, orientation, turns, extension):
  exif = Image.Exif()
  exif[0x0112] = orientation
  oblong = pixels(1, SIZE, 3 * SIZE)  # it is turned before it is cropped
  got = load_one(tmp_path, oblong, f"it.{extension}", exif=exif)
  np.testing.assert_array_equal(got, np.rot90(oblong[:, SIZE : 2 * SIZE], turns))


# Files that cannot be read.


@pytest.mark.parametrize("name", damaged_files())
def test_a_damaged_file_is_refused_by_name_and_reason(tmp_path, name):
  content, reason = damaged_files()[name]
  make_splits(tmp_path, good0=pixels(0), good1=pixels(1))
  (tmp_path / "train" / name).write_bytes(content)
  with pytest.raises(UserError) as error:
    load(tmp_path)
  message = str(error.value)
  assert message.startswith(f"1 of 3 images cannot be read: train/{name} (")
  assert reason in message
  assert message.endswith(f"): {folder.FIX_UNREADABLE}")
  assert "BytesIO" not in message
  assert str(tmp_path) not in message
  assert len(load(tmp_path, "eval")) == 1


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("cache_bytes", [0, 10**9])
def test_many_damaged_files_are_all_logged_and_left_out_if_asked(tmp_path, told, cache_bytes, skip):
  save(tmp_path / "train" / "a" / "1.png", pixels(1))
  save(tmp_path / "train" / "b" / "2.png", pixels(2))
  save(tmp_path / "train" / "c" / "3.png", pixels(3))
  save(tmp_path / "eval" / "b" / "4.png", pixels(4))
  make_damaged(tmp_path / "train" / "b")
  if skip:
    source = load(tmp_path, skip_unreadable=True, cache_bytes=cache_bytes)
    rows, labels = read(source)
    np.testing.assert_array_equal(rows, [pixels(1), pixels(2), pixels(3)])
    assert labels.tolist() == [0, 1, 2]
    assert source.fingerprint["num_examples"] == len(source) == 3
    left_out = ("WARNING", "left out: 6 of 9 images that cannot be read")
    assert messages(told).pop() == left_out
  else:
    with pytest.raises(UserError, match=r"^6 of 9 .*: train/b/cut.jpg .*, .* and 3 more: repair"):
      load(tmp_path, cache_bytes=cache_bytes)
  for (level, line), (name, (_, reason)) in zip(
    messages(told), damaged_files().items(), strict=False
  ):
    assert level == "WARNING"
    assert line.startswith(f"cannot be read: train/b/{name} (")
    assert reason in line


def test_leaving_out_every_image_is_refused(tmp_path):
  make_splits(tmp_path)
  make_damaged(tmp_path / "train")
  with pytest.raises(UserError, match="none of the 6 images can be read"):
    load(tmp_path, skip_unreadable=True)


def test_a_big_endian_tiff_and_a_link_to_nothing(tmp_path):
  make_splits(tmp_path, a=pixels(1))
  values = np.arange(SIZE * SIZE).reshape(SIZE, SIZE) * 7
  (tmp_path / "train" / "big_endian.tif").write_bytes(tiff(values, ">"))
  np.testing.assert_array_equal(read(load(tmp_path))[0][1][..., 0], values >> 8)
  (tmp_path / "train" / "2.png").symlink_to(tmp_path / "gone.png")
  with pytest.raises(UserError, match=r"train/2.png \(No such file or directory\)"):
    load(tmp_path)


def test_a_limit_on_open_files_leaves_no_image_out(tmp_path, monkeypatch):
  make_splits(tmp_path, a=pixels(1))

  def refuse(path):
    raise OSError(errno.EMFILE, "Too many open files", str(path))

  monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)
  with pytest.raises(OSError, match="Too many open files"):
    load(tmp_path, skip_unreadable=True)


def test_cached_images_are_decoded_once(tmp_path, monkeypatch):
  decoded, decode = [], images.decode
  monkeypatch.setattr(
    images, "decode", lambda content: (decoded.append(content), decode(content))[1]
  )
  make_splits(tmp_path)
  make_flat(tmp_path / "train", range(30))
  assert numbers_of(load(tmp_path)) == list(range(30))
  assert len(set(decoded)) == len(decoded) == 30


def test_images_beyond_the_cache_are_read_again_and_a_file_damaged_since_is_named(tmp_path):
  make_splits(tmp_path)
  make_flat(tmp_path / "train", range(3))
  source = load(tmp_path, cache_bytes=100)
  assert numbers_of(source) == [0, 1, 2]
  (tmp_path / "train" / "001.png").write_bytes(b"")
  assert source.images[np.array([2, 0])][:, 0, 0, 0].tolist() == [2, 0]
  with pytest.raises(UserError, match=r"train/001.png cannot be read \(an empty file\): repair"):
    source.images[np.array([0, 1])]


# The fingerprint.


def test_the_fingerprint_describes_the_folder(tmp_path):
  save(tmp_path / "train" / "cat" / "1.png", pixels(1))
  save(tmp_path / "train" / "dog" / "2.png", pixels(2))
  save(tmp_path / "val" / "dog" / "3.png", pixels(3))

  def fingerprint(split="train"):
    found = load(tmp_path, split).fingerprint
    assert json.loads(json.dumps(found)) == found
    assert folder.fingerprint_folder(split, make_options(tmp_path)) == found
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
  assert fingerprint()["digest"] not in (first["digest"], longer["digest"])
  before = fingerprint("eval")
  save(tmp_path / "train" / "dog" / "4.png", pixels(4))
  assert fingerprint()["num_examples"] == 3
  assert fingerprint("eval") == before


def test_leaving_out_an_image_changes_the_fingerprint(tmp_path):
  make_splits(tmp_path)
  make_flat(tmp_path / "train", range(3))
  whole = load(tmp_path).fingerprint
  (tmp_path / "train" / "001.png").write_bytes(b"")
  rest = load(tmp_path, skip_unreadable=True).fingerprint
  (tmp_path / "train" / "001.png").unlink()
  assert load(tmp_path).fingerprint == rest
  assert rest["digest"] != whole["digest"]
