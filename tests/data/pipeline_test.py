import itertools
import threading
import time

import jax
import numpy as np
import pytest
from sklearn import datasets

from lrdit.data import pipeline
from lrdit.data import source as sources
from lrdit.runtime import parallel
from lrdit.runtime.errors import UserError
from tests.image_files import make_options


def load_digits(split):
  return pipeline.make_source("digits", split, make_options(num_channels=1))


def test_digits_are_split_without_overlap():
  train, held_out = (load_digits(s) for s in ("train", "eval"))
  assert (len(train), len(held_out)) == (1498, 299)
  assert train.image_shape == (8, 8, 1)
  images = datasets.load_digits().images[..., None]
  np.testing.assert_array_equal(held_out.images, (images[5::6] / 8 - 1).astype(np.float32))
  np.testing.assert_array_equal(train.images[:7], (images[[0, 1, 2, 3, 4, 6, 7]] / 8 - 1))
  for source in (train, held_out):
    assert source.images.min() == -1
    assert source.images.max() == 1
    assert set(source.labels) == set(range(10))
  assert held_out.fingerprint == {"name": "digits", "split": "eval", "num_examples": 299}
  assert train.fingerprint == {"name": "digits", "split": "train", "num_examples": 1498}


def test_every_epoch_reads_every_example_once_in_its_own_order():
  position = np.arange(3 * 50)
  epochs = pipeline.example_index(3, position, 50).reshape(3, 50)
  for epoch in epochs:
    assert sorted(epoch.tolist()) == list(range(50))
  assert (epochs[0] != epochs[1]).any()
  other = pipeline.example_index(4, position, 50).reshape(3, 50)
  assert (other[0] != epochs[0]).any()


def test_order_depends_on_position_alone():
  whole = pipeline.example_index(0, np.arange(200), 30)
  for start, stop in ((0, 7), (25, 64), (190, 200)):
    part = pipeline.example_index(0, np.arange(start, stop), 30)
    np.testing.assert_array_equal(part, whole[start:stop])


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_a_resumed_run_on_any_devices_reads_the_same_batches(num_devices):
  source = load_digits("train")
  devices = jax.devices()[:num_devices]

  def batches(steps, devices):
    slots = parallel.batch_slots(16, devices)
    stream = pipeline.train_batches(source, 0, slots, 16, steps, flip=True)
    order = np.argsort(slots.reshape(-1))
    for batch in stream:
      images = batch["image"]
      assert images.shape == (len(devices), 16 // len(devices), 8, 8, 1)
      yield images.reshape(16, 8, 8, 1)[order], batch["label"].reshape(16)[order]

  # An epoch ends at step 93; a run from the start and one resumed at step 92.
  expected = itertools.islice(batches(range(97), jax.devices()[:1]), 92, None)
  for (a, la), (b, lb) in zip(batches(range(92, 97), devices), expected, strict=True):
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(la, lb)


def test_positions_beyond_32_bits_are_read():
  source = load_digits("train")
  step = 2**31 // 16 + 5
  slots = parallel.batch_slots(16, jax.devices())
  steps = range(step, step + 1)
  (batch,) = pipeline.train_batches(source, 0, slots, 16, steps, flip=False)
  index = pipeline.example_index(0, step * 16 + slots, len(source))
  np.testing.assert_array_equal(batch["image"], source.images[index])
  assert slots.dtype == np.int64


def test_evaluation_reads_each_example_once():
  source = load_digits("eval")
  slots = parallel.batch_slots(128, jax.devices())
  total, seen, last = 0.0, [], None
  for batch in pipeline.eval_batches(source, slots, 128):
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


def slots_of_examples(batch_size, devices, shift=0.0, num_examples=300):
  """(N,) the slot that each example of a split in order meets, as a share of the batch."""
  number = np.arange(num_examples)
  images = np.zeros((num_examples, 1, 1, 1), np.float32)
  source = sources.Source(images, number.astype(np.int32), num_examples, {})
  slots, place = parallel.batch_slots(batch_size, devices), np.full(num_examples, np.nan)
  for batch in pipeline.eval_batches(source, slots, batch_size, shift):
    keep = batch["weight"] == 1
    place[batch["label"][keep]] = slots[keep] / batch_size
  return place


@pytest.mark.parametrize("batch_size", [16, 128, 512])
@pytest.mark.parametrize("draws", [1, 4])
def test_every_class_of_a_sorted_split_meets_all_strata_alike(batch_size, draws):
  """Ten classes of thirty examples one after another: no class sits among few timesteps."""
  place = [slots_of_examples(batch_size, jax.devices()[:1], d / draws) for d in range(draws)]
  by_class = np.stack(place).reshape(draws, 10, 30).swapaxes(0, 1).reshape(10, -1)
  # Of uniform draws the mean has a standard deviation of 0.053, a third 8.6 % for one draw.
  assert (abs(by_class.mean(axis=1) - 0.5) < 0.2).all()
  thirds = np.stack([np.bincount(np.floor(3 * row).astype(int), minlength=3) for row in by_class])
  assert (thirds / by_class.shape[1] > 0.1).all()


def test_the_slot_of_an_example_depends_on_its_index_alone():
  whole = slots_of_examples(128, jax.devices()[:1])
  np.testing.assert_array_equal(slots_of_examples(128, jax.devices()), whole)
  # In other batches it is about the same, as a share of them.
  assert np.corrcoef(whole[:256], slots_of_examples(64, jax.devices()[:1])[:256])[0, 1] > 0.9


def test_flips_depend_on_seed_step_and_global_index_alone():
  whole = pipeline.flips(3, 11, np.arange(64))
  for devices in (jax.devices()[:2], jax.devices()):
    slots = parallel.batch_slots(64, devices)
    np.testing.assert_array_equal(pipeline.flips(3, 11, slots), whole[slots])
    for local in slots:  # as a process of its own would hold them
      np.testing.assert_array_equal(pipeline.flips(3, 11, local), whole[local])
  assert (pipeline.flips(3, 12, np.arange(64)) != whole).any()
  assert (pipeline.flips(4, 11, np.arange(64)) != whole).any()


def test_half_of_the_images_are_mirrored_at_every_slot():
  mirrored = np.stack([pipeline.flips(0, step, np.arange(16)) for step in range(2000)])
  # Six standard deviations.
  assert abs(mirrored.mean() - 0.5) < 6 * 0.5 / 32_000**0.5
  assert (abs(mirrored.mean(axis=0) - 0.5) < 6 * 0.5 / 2000**0.5).all()
  # Independent from slot to slot and from step to step.
  for a, b in ((mirrored[:, 1:], mirrored[:, :-1]), (mirrored[1:], mirrored[:-1])):
    assert abs((a == b).mean() - 0.5) < 6 * 0.5 / 30_000**0.5


def test_flips_and_orders_use_different_random_numbers():
  for seed in (0, 1):
    flips = [pipeline.flips(seed, number, np.arange(64)) for number in range(2)]
    order_stream, flip_stream = (
      [pipeline._generator(seed, stream, number).random(64) < 0.5 for number in range(2)]
      for stream in (pipeline._ORDER_STREAM, pipeline._FLIP_STREAM)
    )
    np.testing.assert_array_equal(flips, flip_stream)
    assert (np.asarray(flips) != order_stream).any(axis=1).all()


def test_mirroring_changes_neither_order_nor_labels():
  source = load_digits("train")
  slots = parallel.batch_slots(16, jax.devices())

  def batches(flip):
    return list(pipeline.train_batches(source, 5, slots, 16, range(7, 13), flip))

  for step, plain, mirrored in zip(range(7, 13), batches(False), batches(True), strict=True):
    index = pipeline.example_index(5, step * 16 + slots, len(source))
    np.testing.assert_array_equal(plain["image"], source.images[index])
    np.testing.assert_array_equal(plain["label"], source.labels[index])
    np.testing.assert_array_equal(mirrored["label"], plain["label"])
    flip = pipeline.flips(5, step, slots)
    assert 0 < flip.sum() < 16
    plain["image"][flip] = plain["image"][flip][:, :, ::-1]
    np.testing.assert_array_equal(mirrored["image"], plain["image"])


def test_reading_ahead_keeps_the_order():
  def make(number):
    time.sleep(0.01 if number % 3 == 0 else 0)  # later ones are ready first
    return number

  assert list(pipeline.read_ahead(make, range(5, 60))) == list(range(5, 60))
  assert list(pipeline.read_ahead(make, range(0))) == []


def test_what_fails_ahead_is_raised_in_its_turn():
  def make(number):
    if number == 2:
      raise UserError("number 2 is damaged")
    return number

  stream = pipeline.read_ahead(make, itertools.count())
  assert [next(stream), next(stream)] == [0, 1]
  with pytest.raises(UserError, match="number 2 is damaged"):
    next(stream)
  with pytest.raises(StopIteration):
    next(stream)


def test_closing_the_stream_ends_its_threads_and_what_waits_for_them():
  made, threads, closed = [], set(), threading.Event()

  def make(number):
    threads.add(threading.current_thread())
    made.append(number)
    if number > 2:  # all that is read ahead is under way or waits until the stream is closed
      closed.wait(timeout=10)
    return number

  stream = pipeline.read_ahead(make, itertools.count())
  assert [next(stream) for _ in range(3)] == [0, 1, 2]
  assert threading.current_thread() not in threads
  stream.close()
  closed.set()
  for thread in threads:
    thread.join(timeout=10)
    assert not thread.is_alive()
  assert len(made) <= 3 + len(threads)


def test_an_unknown_dataset_is_refused():
  message = "unknown: use one of digits, cifar10, celeb_a, imagenet2012, folder, npz$"
  with pytest.raises(UserError, match=message):
    pipeline.make_source("mnist", "train", make_options())
