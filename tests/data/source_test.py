"""Random access to examples: gathering, subsets, and images decoded on demand."""

import re
import threading
import time

import numpy as np
import pytest

from lrdit.data import digits
from lrdit.data import source as sources
from lrdit.runtime.errors import UserError
from tests.image_files import make_options

NUM, H, W = 12, 4, 3


class Rows:
  """An array that counts which of its rows were read."""

  def __init__(self, array):
    self.array, self.shape, self.read = array, array.shape, []

  def __getitem__(self, index):
    rows = index[0] if isinstance(index, tuple) else index
    self.read += np.asarray(rows).tolist()
    return self.array[index]


def pixels(seed=0, shape=(NUM, H, W, 3)):
  return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def make_source(labels=None, array=None):
  labels = np.arange(NUM, dtype=np.int32) % 4 if labels is None else labels
  fingerprint = {"name": "made", "num_examples": NUM}
  return sources.Source(
    Rows(pixels() if array is None else array), Rows(labels), num_classes=4, fingerprint=fingerprint
  )


def test_bytes_are_scaled_to_minus_one_to_one():
  images = np.array([0, 255, 51], np.uint8).reshape(3, 1, 1, 1)
  source = sources.Source(images, np.arange(3, dtype=np.int32), 3, {})
  batch = source.gather(np.array([1, 0, 2]), np.zeros(3, bool))
  assert batch["image"].dtype == np.float32
  np.testing.assert_allclose(batch["image"].reshape(-1), [1, -1, -0.6], atol=1e-6)
  assert batch["image"].reshape(-1)[:2].tolist() == [1, -1]
  assert batch["label"].tolist() == [1, 0, 2]
  assert batch["label"].dtype == np.int32


@pytest.mark.parametrize("scaled", [False, True])
def test_exactly_the_chosen_images_are_mirrored_left_to_right(scaled):
  array = pixels()
  if scaled:
    array = array.astype(np.float32) / 127.5 - 1
  source = sources.Source(array, np.arange(NUM, dtype=np.int32), NUM, {})
  before = array.copy()
  index, flip = np.array([4, 0, 4, 7]), np.array([True, False, False, True])
  plain = source.gather(index, np.zeros(4, bool))["image"]
  got = source.gather(index, flip)["image"]
  for i in range(4):
    np.testing.assert_array_equal(got[i], plain[i, :, ::-1] if flip[i] else plain[i])
  np.testing.assert_array_equal(array, before)


def test_a_subset_keeps_images_with_their_labels_and_reads_none_in_advance():
  source = make_source()
  index = np.array([7, 2, 9, 3])
  part = source.subset(index, kept="some")
  assert len(part) == 4
  assert part.image_shape == (H, W, 3)
  assert part.fingerprint == {"name": "made", "num_examples": 4, "kept": "some"}
  assert source.fingerprint == {"name": "made", "num_examples": NUM}
  assert source.images.read == source.labels.read == []
  batch = part.gather(np.array([3, 0]), np.zeros(2, bool))
  assert source.images.read == source.labels.read == [3, 7]
  np.testing.assert_array_equal(
    batch["image"], source.gather(index[[3, 0]], np.zeros(2, bool))["image"]
  )
  assert batch["label"].tolist() == [3 % 4, 7 % 4]


def test_a_subset_takes_further_axes_and_subsets_nest():
  source = make_source()
  part = source.subset(np.array([7, 2, 9, 3])).subset(np.array([2, 0]))
  array = source.images.array
  np.testing.assert_array_equal(part.images[np.array([1, 0])], array[[7, 9]])
  got = part.images[np.array([0, 1]), ::2, :, 1]
  np.testing.assert_array_equal(got, array[[9, 7], ::2, :, 1])


def test_the_first_classes_keep_their_images_and_no_image_is_read_for_it():
  source = make_source()
  part = source.first_classes(2)
  assert source.images.read == []
  assert source.labels.read == list(range(NUM))
  assert part.num_classes == 2
  assert part.fingerprint == {"name": "made", "num_examples": 6, "num_classes": 2}
  batch = part.gather(np.arange(6), np.zeros(6, bool))
  assert batch["label"].tolist() == [0, 1, 0, 1, 0, 1]
  assert source.images.read == [0, 1, 4, 5, 8, 9]


class Decoder:
  """Counts what is decoded; slow enough for threads to overlap."""

  def __init__(self, seconds=0.0):
    self.array, self.seconds, self.decoded = pixels(), seconds, []

  def __call__(self, index):
    self.decoded += index.tolist()
    time.sleep(self.seconds)
    return list(self.array[index])


def test_images_within_the_budget_are_decoded_once():
  decoder = Decoder()
  images = sources.DecodedImages(decoder, decoder.array.shape, decoder.array.nbytes)
  assert decoder.decoded == []
  for index in (np.array([5, 1]), np.array([1, 8, 5]), np.arange(NUM)):
    got = images[index]
    np.testing.assert_array_equal(got, decoder.array[index])
    got[:] = 0  # the caller's own: what is kept stays
  np.testing.assert_array_equal(images[np.arange(NUM)], decoder.array)
  assert sorted(decoder.decoded) == list(range(NUM))


def test_images_beyond_the_budget_are_decoded_anew():
  decoder = Decoder()
  images = sources.DecodedImages(decoder, decoder.array.shape, decoder.array.nbytes - 1)
  for _ in range(2):
    np.testing.assert_array_equal(images[np.array([5, 1])], decoder.array[[5, 1]])
  assert decoder.decoded == [5, 1, 5, 1]


def test_threads_that_ask_for_the_same_images_all_get_them():
  decoder = Decoder(seconds=0.02)
  images = sources.DecodedImages(decoder, decoder.array.shape, decoder.array.nbytes)
  wrong, start = [], threading.Barrier(4)

  def ask(seed):
    rng = np.random.default_rng(seed)
    start.wait()
    for _ in range(20):
      index = rng.integers(0, NUM, 5)
      time.sleep(rng.random() / 1000)
      if not np.array_equal(images[index], decoder.array[index]):
        wrong.append(index)

  threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong


@pytest.mark.parametrize(
  ("field", "value"), [("data_dir", "/data"), ("image_size", 32), ("num_channels", 3)]
)
def test_the_digits_refuse_options_of_other_data(field, value):
  options = make_options(**{"num_channels": 1} | {field: value})
  with pytest.raises(UserError, match=f"config.data.{field}={value!r}"):
    digits.load_digits("train", options)


@pytest.mark.parametrize(
  ("labels", "num_classes", "names", "expected"),
  [
    ([1, 2, 3], 4, None, ["1 of 4 classes have no training image, .*: 0\\. Number the labels"]),
    ([0, 9, 1, 4], 12, None, ["8 of 12 classes .*: 2, 3, 5, 6, 7, 8, 10, 11\\. "]),
    ([0, 1, 2], 3, None, []),
    ([0, 1, 2], 0, None, []),
    (
      [2, 0, 2],
      3,
      ["a", "b", "c"],
      ["0 is 'a' \\(1\\), 1 is 'b' \\(0\\), 2 is 'c'", "1 \\('b'\\)"],
    ),
    ([0, 1], 2, ["a", "b", "c"], ["training images\\): 0 is 'a' \\(1\\), 1 is 'b' \\(1\\)$"]),
  ],
)
def test_classes_without_training_images_are_all_named(told, labels, num_classes, names, expected):
  fingerprint = {"name": "made"} | ({"classes": names} if names else {})
  images = pixels()[: len(labels)]
  source = sources.Source(images, np.array(labels, np.int32), 99, fingerprint)
  sources.report_classes(source, num_classes)
  assert len(told.messages) == len(expected)
  for message, pattern in zip(told.messages, expected, strict=True):
    assert re.search(pattern, message), message


def test_no_record_is_read_to_count_classes():
  class Unread:
    are_known = False

    def __getitem__(self, index):
      raise AssertionError

  source = sources.Source(pixels(), Unread(), 4, {})
  sources.report_classes(source, 3)
  with pytest.raises(AssertionError):
    source.first_classes(3)
