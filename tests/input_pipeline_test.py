import itertools

import jax
import numpy as np
import pytest

from lrdit import input_pipeline, parallel
from lrdit.errors import UserError


def test_digits_are_split_without_overlap():
  train, held_out = (input_pipeline.make_source("digits", s) for s in ("train", "eval"))
  assert (len(train), len(held_out)) == (1498, 299)
  assert train.image_shape == (8, 8, 1)
  rows = {image.tobytes() for image in train.images}
  # The scans themselves repeat a few times, so compare positions: every sixth.
  from sklearn import datasets

  images = datasets.load_digits().images
  expected = (images[5::6, :, :, None] / 8 - 1).astype(np.float32)
  np.testing.assert_array_equal(held_out.images, expected)
  assert sum(image.tobytes() in rows for image in held_out.images) <= 3
  for source in (train, held_out):
    assert source.images.min() == -1
    assert source.images.max() == 1
    assert set(source.labels) == set(range(10))


def test_every_epoch_reads_every_example_once_in_its_own_order():
  position = np.arange(3 * 50)
  epochs = input_pipeline.example_index(3, position, 50).reshape(3, 50)
  for epoch in epochs:
    assert sorted(epoch.tolist()) == list(range(50))
  assert (epochs[0] != epochs[1]).any()
  other = input_pipeline.example_index(4, position, 50).reshape(3, 50)
  assert (other[0] != epochs[0]).any()


def test_order_depends_on_position_alone():
  whole = input_pipeline.example_index(0, np.arange(200), 30)
  for start, stop in ((0, 7), (25, 64), (190, 200)):
    part = input_pipeline.example_index(0, np.arange(start, stop), 30)
    np.testing.assert_array_equal(part, whole[start:stop])


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_a_resumed_run_on_any_devices_reads_the_same_batches(num_devices):
  source = input_pipeline.make_source("digits", "train")
  devices = jax.devices()[:num_devices]

  def batches(first_step, devices):
    slots = parallel.batch_slots(16, devices)
    stream = input_pipeline.train_batches(source, 0, slots, 16, first_step)
    order = np.argsort(slots.reshape(-1))
    for batch in itertools.islice(stream, 3):
      images = batch["image"]
      assert images.shape == (len(devices), 16 // len(devices), 8, 8, 1)
      yield images.reshape(16, 8, 8, 1)[order], batch["label"].reshape(16)[order]

  expected = list(batches(98, jax.devices()[:1]))
  for (a, la), (b, lb) in zip(batches(98, devices), expected, strict=True):
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(la, lb)


def test_positions_beyond_32_bits_are_read():
  source = input_pipeline.make_source("digits", "train")
  step = 2**31 // 16 + 5
  slots = parallel.batch_slots(16, jax.devices())
  batch = next(input_pipeline.train_batches(source, 0, slots, 16, step))
  expected = source.gather(input_pipeline.example_index(0, step * 16 + slots, len(source)))
  np.testing.assert_array_equal(batch["image"], expected["image"])
  assert slots.dtype == np.int64


def test_evaluation_reads_each_example_once():
  source = input_pipeline.make_source("digits", "eval")
  slots = parallel.batch_slots(128, jax.devices())
  total, seen, last = 0.0, [], None
  for batch in input_pipeline.eval_batches(source, slots, 128):
    keep = batch["weight"].reshape(-1) == 1
    total += keep.sum()
    last = np.sort(slots.reshape(-1)[keep])
    seen += [image.tobytes() for image in batch["image"].reshape(-1, 64)[keep]]
  assert total == len(source)
  # 43 of the last 128 slots, and so of the strata of timesteps, evenly spaced.
  assert len(last) == 299 - 2 * 128
  assert set(np.diff(last).tolist()) <= {2, 3}
  assert last[-1] >= 125
  assert sorted(seen) == sorted(image.tobytes() for image in source.images)


def test_bytes_are_scaled_to_minus_one_to_one():
  images = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1)
  source = input_pipeline.Source(images, np.zeros(2, np.int32), 1)
  batch = source.gather(np.array([[1, 0]]))
  assert batch["image"].dtype == np.float32
  assert batch["image"].reshape(-1).tolist() == [1.0, -1.0]


def test_an_unknown_dataset_is_refused():
  with pytest.raises(UserError, match="unknown: use one of digits"):
    input_pipeline.make_source("mnist", "train")
