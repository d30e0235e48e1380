"""Prepared tensorflow-datasets directories, made here in their published structure."""

import errno
import importlib.util
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from lrdit.data import images, tfds
from lrdit.runtime.errors import UserError, as_user_error
from tests.image_files import encoded, make_options, read
from tests.tiny import ROOT

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

FORMATS = ("array_record", "tfrecord")
COUNTS = {
  "cifar10": {"train": 7, "test": 3},
  "celeb_a": {"train": 2, "validation": 3, "test": 1},
  "imagenet2012": {"train": 4, "validation": 3},
}
VERSIONS = {"cifar10": "3.0.2", "celeb_a": "2.1.0", "imagenet2012": "5.1.0"}
# (height, width) of ImageNet's, by index.
ODD_SIZES = ((47, 61), (70, 33), (40, 40), (31, 90))
LABELS = {"cifar10": (3, 9, 0), "imagenet2012": (999, 0, 417)}


def pixels(name, split, i):
  """The photograph at an index, before any encoding."""
  height, width = {"cifar10": (32, 32), "celeb_a": (218, 178)}.get(name) or ODD_SIZES[i]
  rng = np.random.default_rng([i, len(name), len(split)])
  coarse = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)  # noise would hide a wrong resize
  image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
  return image if name != "cifar10" else rng.integers(0, 256, image.shape).astype(np.uint8)


def jpeg(name, split, i):
  return encoded(Image.fromarray(pixels(name, split, i)), "JPEG")


def label_of(name, i):
  return LABELS[name][i % 3]


def example(name, split, i):
  if name == "cifar10":
    return {"id": f"{split}_{i}", "image": pixels(name, split, i), "label": label_of(name, i)}
  photograph = io.BytesIO(jpeg(name, split, i))
  if name == "imagenet2012":
    return {"file_name": f"n{i}.JPEG", "image": photograph, "label": label_of(name, i)}
  return {
    "image": photograph,
    "landmarks": {"lefteye_x": 69 + i, "lefteye_y": 110},
    "attributes": {"Smiling": bool(i % 2), "Young": True},
    "identity": f"person {i}",
  }


def prepare(data_dir, name, file_format, splits, num_shards=1):
  """Writes {split: examples} as its builder would."""
  import tensorflow_datasets as tfds

  f = tfds.features
  features = {
    "cifar10": {
      "id": f.Text(),
      "image": f.Image(shape=(32, 32, 3)),
      "label": f.ClassLabel(num_classes=10),
    },
    "celeb_a": {
      "image": f.Image(shape=(218, 178, 3), encoding_format="jpeg"),
      "landmarks": {"lefteye_x": np.int64, "lefteye_y": np.int64},
      "attributes": {"Smiling": np.bool_, "Young": np.bool_},
      "identity": f.Text(),
    },
    "imagenet2012": {
      "image": f.Image(encoding_format="jpeg"),
      "label": f.ClassLabel(num_classes=1000),
      "file_name": f.Text(),
    },
  }[name]
  tfds.disable_progress_bar()
  tfds.dataset_builders.store_as_tfds_dataset(
    name=name,
    version=VERSIONS[name],
    features=f.FeaturesDict(features),
    data_dir=data_dir,
    file_format=file_format,
    disable_shuffling=True,
    split_datasets={split: enumerate(examples) for split, examples in splits.items()},
    download_config=tfds.download.DownloadConfig(num_shards=num_shards),
  )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """{file format: data_dir with every dataset}."""
  directories = {}
  for file_format in FORMATS:
    directories[file_format] = tmp_path_factory.mktemp(file_format)
    for name, counts in COUNTS.items():
      splits = {s: [example(name, s, i) for i in range(n)] for s, n in counts.items()}
      num_shards = 3 if name == "cifar10" else 1
      prepare(directories[file_format], name, file_format, splits, num_shards)
  return directories


@pytest.fixture
def damaged(prepared, tmp_path):
  """Copies one dataset, to be damaged; gives its version's directory."""

  def copy(name, file_format):
    shutil.copytree(prepared[file_format] / name, tmp_path / name)
    return tmp_path / name / VERSIONS[name]

  return copy


def load(name, split, data_dir, image_size=32, **changes):
  options = make_options(data_dir, image_size=image_size, **changes)
  return tfds.load_tfds(tfds.DATASETS[name], split, options)


def expected_image(name, split, i, size):
  """PIL's own decode, crop and resize."""
  if name == "cifar10":
    return pixels(name, split, i)
  image = Image.open(io.BytesIO(jpeg(name, split, i)))
  side = 178 if name == "celeb_a" else min(image.size)
  left, top = (image.width - side) // 2, (image.height - side) // 2
  image = image.crop((left, top, left + side, top + side))
  return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


# Reading.


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize(
  ("name", "split", "used", "size", "crop"),
  [
    ("cifar10", "train", "train", 32, "centre crop of the short side"),
    ("cifar10", "eval", "test", 32, "centre crop of the short side"),
    ("celeb_a", "train", "train", 128, "centre crop of the 178 pixels"),
    ("celeb_a", "eval", "validation", 128, "centre crop of the 178 pixels"),
    ("imagenet2012", "train", "train", 24, "centre crop of the short side"),
    ("imagenet2012", "eval", "validation", 24, "centre crop of the short side"),
  ],
)
def test_a_split_is_what_pil_decodes_crops_and_resizes(
  prepared, name, split, used, size, crop, file_format
):
  source = load(name, split, prepared[file_format], size)
  count = COUNTS[name][used]
  assert len(source) == count
  assert source.image_shape == (size, size, 3)
  assert source.num_classes == {"cifar10": 10, "celeb_a": 0, "imagenet2012": 1000}[name]
  got, labels = read(source)
  assert got.dtype == np.uint8
  assert labels.dtype == np.int32
  for i in range(count):
    np.testing.assert_array_equal(got[i], expected_image(name, used, i, size))
  expected = [label_of(name, i) if source.num_classes else 0 for i in range(count)]
  assert labels.tolist() == expected
  assert json.loads(json.dumps(source.fingerprint)) == {
    "name": name,
    "version": VERSIONS[name],
    "split": used,
    "num_examples": count,
    "crop": f"{crop}, bicubic antialiased resize to {size}",
  }


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("cache_bytes", [0, 10**9])
def test_any_order_across_shards_gives_each_image_with_its_label(
  prepared, file_format, cache_bytes
):
  shards = list((prepared[file_format] / "cifar10").glob("*/cifar10-train*"))
  assert len(shards) == 3
  source = load("cifar10", "train", prepared[file_format], cache_bytes=cache_bytes)
  for index in (np.array([6, 0, 3]), np.array([3, 5, 3, 1])):
    assert source.labels[index].tolist() == [label_of("cifar10", i) for i in index]  # before images
    batch = source.gather(index, np.zeros(len(index), bool))
    assert batch["label"].tolist() == [label_of("cifar10", i) for i in index]
    expected = np.stack([pixels("cifar10", "train", i) for i in index])
    np.testing.assert_array_equal(batch["image"], expected.astype(np.float32) / 127.5 - 1)


def open_files(directory):
  """How many files below a directory this process has open."""
  links = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
  return sum(link.startswith(f"{os.path.realpath(directory)}/") for link in links)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_more_files_than_may_be_open_are_read_in_turns(prepared, monkeypatch, file_format, limit):
  monkeypatch.setattr(tfds, "_max_open_files", lambda: limit)
  before = open_files(prepared[file_format])
  source = load("cifar10", "train", prepared[file_format], cache_bytes=0)
  for order in (np.arange(7), np.array([6, 0, 3, 1]), np.array([5]), np.arange(7)[::-1]):
    images_read, labels = source.images[order], source.labels[order]
    for row, i in enumerate(order):
      np.testing.assert_array_equal(images_read[row], pixels("cifar10", "train", i))
      assert labels[row] == label_of("cifar10", i)
    assert open_files(prepared[file_format]) - before <= limit


def test_a_limit_of_the_system_is_not_called_damage(prepared, monkeypatch):
  source = load("cifar10", "train", prepared["tfrecord"], cache_bytes=0)
  error = OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a shard")
  monkeypatch.setattr(tfds.os, "open", mock.Mock(side_effect=error))
  with pytest.raises(OSError, match="Too many open files") as raised:
    source.images[np.arange(2)]
  assert "ulimit -n" in str(as_user_error(raised.value))
  source = load("cifar10", "train", prepared["array_record"], cache_bytes=0)
  error = RuntimeError("open() failed: Too many open files")  # as array_record words it
  monkeypatch.setattr(tfds._Records, "read", mock.Mock(side_effect=error))
  with pytest.raises(UserError, match="ulimit -n"):
    source.images[np.arange(2)]


def test_images_can_be_read_as_grey(prepared):
  source = load("cifar10", "eval", prepared["array_record"], num_channels=1)
  expected = np.asarray(Image.fromarray(pixels("cifar10", "test", 1)).convert("L"))
  np.testing.assert_array_equal(source.images[np.array([1])][0, ..., 0], expected)


@pytest.mark.parametrize("file_format", FORMATS)
def test_reading_needs_no_tensorflow(prepared, file_format):
  program = f"""
import sys
import numpy as np
from lrdit.data import pipeline
from lrdit.data.source import DataOptions
for name in {list(COUNTS)}:
  for split in ("train", "eval"):
    options = DataOptions("", 32, 3, 10**9, False)
    source = pipeline.make_source(name, split, options)
    source.gather(np.arange(len(source)), np.zeros(len(source), bool))
assert "tensorflow" not in sys.modules
print("read")
"""
  environment = os.environ | {"TFDS_DATA_DIR": str(prepared[file_format])}
  done = subprocess.run(
    [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True
  )
  assert done.stdout.endswith("read\n"), done.stderr


# What is missing or damaged.


@pytest.mark.parametrize("name", COUNTS)
def test_missing_data_is_refused_with_the_command_that_prepares_it(tmp_path, name):
  with pytest.raises(UserError) as raised:
    load(name, "train", tmp_path)
  message = str(raised.value)
  assert message.startswith(f"no prepared {name} under {tmp_path} (config.data.data_dir): ")
  assert command(name, tmp_path) in message
  manual_dir = f"{tmp_path}/downloads/manual"
  assert (f"into {manual_dir}, then run" in message) == (name != "cifar10")
  if name == "imagenet2012":
    assert "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar" in message
    assert f"into {manual_dir}, then" in message


@pytest.mark.parametrize(
  ("given", "right"),
  [("cifar10", "."), ("cifar10/3.0.2", "."), ("..", "."), ("celeb_a", "."), ("celeb_a/2.1.0", ".")],
)
def test_another_level_of_a_prepared_directory_is_refused_with_the_right_one(
  prepared, given, right
):
  data_dir = prepared["tfrecord"]
  if given == "..":  # beside others: the first that holds it will do
    given, right = data_dir.parent, r"\S*(tfrecord|array_record)0"
  else:
    right = re.escape(str(data_dir))
  with pytest.raises(
    UserError, match=rf"holds cifar10/VERSION: use config\.data\.data_dir={right}$"
  ):
    load("cifar10", "train", data_dir / given)


def test_a_file_in_place_of_a_prepared_directory_is_named(tmp_path):
  (tmp_path / "train.parquet").write_bytes(b"PAR1" + bytes(20) + b"PAR1")
  with pytest.raises(
    UserError, match=r"train\.parquet .*: there is a Parquet file; run .*DIRECTORY"
  ):
    load("cifar10", "train", tmp_path / "train.parquet")
  with pytest.raises(UserError, match=r"there is a directory that holds train\.parquet; run"):
    load("cifar10", "train", tmp_path)


def test_the_manual_files_of_celeb_a_are_those_that_its_builder_looks_for():
  package = pathlib.Path(importlib.util.find_spec("tensorflow_datasets").origin).parent
  lines = (package / "datasets" / "celeb_a" / "checksums.tsv").read_text().splitlines()
  expected = {line.split("\t")[3] for line in lines}
  dataset = tfds.DATASETS["celeb_a"]
  assert len(expected) == 5
  assert set(dataset.manual_files.split(", ")) == expected
  assert all(name in dataset.how_to_prepare("/data") for name in expected)


def command(name, data_dir):
  builder = f"tfds.builder('{name}', data_dir='{data_dir}', file_format='array_record')"
  return f'python -c "import tensorflow_datasets as tfds; {builder}.download_and_prepare()"'


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_directory_without_the_held_out_split_is_refused(tmp_path, file_format):
  prepare(tmp_path, "cifar10", file_format, {"train": [example("cifar10", "train", 0)]})
  assert len(load("cifar10", "train", tmp_path)) == 1
  with pytest.raises(UserError, match=r"has no split 'test': delete .*, and run ") as raised:
    load("cifar10", "eval", tmp_path)
  assert command("cifar10", tmp_path) in str(raised.value)


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_missing_shard_is_named(damaged, tmp_path, file_format):
  shard = damaged("cifar10", file_format) / f"cifar10-train.{file_format}-00001-of-00003"
  shard.unlink()
  with pytest.raises(UserError, match=re.escape(f"{shard} is missing: delete ")) as raised:
    load("cifar10", "train", tmp_path)
  assert command("cifar10", tmp_path) in str(raised.value)
  assert len(read(load("cifar10", "eval", tmp_path))[0]) == 3


@pytest.mark.parametrize("cut", [1, 16, 3000, None])
def test_a_truncated_tfrecord_is_refused(damaged, tmp_path, cut):
  shard = damaged("cifar10", "tfrecord") / "cifar10-train.tfrecord-00002-of-00003"
  content = shard.read_bytes()
  shard.write_bytes(content[: len(content) - cut] if cut else b"")
  with pytest.raises(UserError, match=re.escape(f"{shard} is damaged: it must hold 2 records")):
    load("cifar10", "train", tmp_path)
  # Whole records, but too few.
  shutil.copyfile(shard.with_name("cifar10-train.tfrecord-00001-of-00003"), shard)
  with pytest.raises(UserError, match="00002-of-00003 is damaged: it must hold 2 records"):
    load("cifar10", "train", tmp_path)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_damaged_metadata_are_refused(damaged, tmp_path, file_format, name):
  path = damaged("cifar10", file_format) / name
  path.write_text(path.read_text()[:50])
  with pytest.raises(UserError, match=r"cifar10.*damaged.*delete it, and run .*tfds") as raised:
    load("cifar10", "train", tmp_path)
  assert "\n" not in str(raised.value)


@pytest.mark.parametrize("file_format", FORMATS)
def test_damaged_records_are_refused(damaged, tmp_path, file_format):
  for shard in damaged("cifar10", file_format).glob(f"cifar10-train.{file_format}-*"):
    content = bytearray(shard.read_bytes())
    middle = slice(len(content) // 4, 3 * len(content) // 4)
    content[middle] = bytes(len(content[middle]))
    shard.write_bytes(content)
  with pytest.raises(UserError, match=r"damaged|cannot be decoded") as raised:
    read(load("cifar10", "train", tmp_path))
  assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"no image", jpeg("imagenet2012", "train", 1)[:900]])
@pytest.mark.parametrize("file_format", FORMATS)
def test_an_image_that_cannot_be_decoded_is_named(tmp_path, file_format, content):
  examples = [example("imagenet2012", "validation", i) for i in range(3)]
  examples[1]["image"] = io.BytesIO(content)
  prepare(tmp_path, "imagenet2012", file_format, {"validation": examples})
  source = load("imagenet2012", "eval", tmp_path, 16)
  assert source.images[np.array([0, 2])].shape == (2, 16, 16, 3)
  message = "^image 1 of imagenet2012's split validation cannot be decoded .*prepare the dataset"
  with pytest.raises(UserError, match=message) as raised:
    source.images[np.array([2, 1])]
  assert isinstance(raised.value.__cause__, images.UnreadableImage)
