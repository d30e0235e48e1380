"""Reference statistics: computed in a stream, kept, refused; figures of samples."""

import numpy as np
import pytest

from lrdit.data import images
from lrdit.data import source as sources
from lrdit.evaluation import metrics, references
from lrdit.evaluation.features import Extracted, PixelExtractor
from lrdit.runtime.errors import UserError

pytestmark = pytest.mark.floats

NUM, SIZE = 60, 4


class FakeClassifier:
  """Features and predictions that are easy to tell."""

  name, batch_size, num_features, held_out_accuracy = "classifier", 7, 2, 0.9

  def __init__(self, digest="0" * 64):
    self.digest, self.batches = digest, []

  def extract(self, images):
    self.batches.append(len(images))
    features = images[:, :2, 0, 0].astype(np.float32) / 100
    return Extracted(features, (images[:, 0, 0, 1] % 3).astype(np.int32))


def statistics_of(features):
  """Mean and covariance of all features at once."""
  return metrics.statistics_of(metrics.moments(features))


def made_source(seed=0, size=SIZE, num=NUM, **fingerprint):
  scans = np.random.default_rng(seed).integers(0, 256, (num, size, size, 3), np.uint8)
  fingerprint = {
    "name": "made",
    "split": "train",
    "crop": "none",
    "num_examples": num,
  } | fingerprint
  return sources.Source(scans, np.zeros(num, np.int32), 0, fingerprint)


def generated(num=50, seed=3):
  return np.random.default_rng(seed).integers(0, 200, (num, SIZE, SIZE, 3), np.uint8)


@pytest.fixture(scope="module")
def pixel():
  """A pixel extractor whose batches do not divide what is measured."""
  extractor = PixelExtractor(SIZE, 3)
  extractor.batch_size = 7
  return extractor


def batches_of(scans, labels=None, size=7):
  """(images, labels) in batches, as a sample set is read."""
  starts = range(0, len(scans), size)
  return [(scans[i : i + size], None if labels is None else labels[i : i + size]) for i in starts]


def pixels(scans):
  return scans.reshape(len(scans), -1).astype(np.float32) / 127.5 - 1


def test_a_reference_is_of_all_images_and_keeps_features_of_some(pixel):
  source = made_source()
  reference = references.compute_reference(source, pixel, max_features=25)
  features = pixels(source.images)
  np.testing.assert_allclose(reference.mean, features.mean(axis=0), atol=1e-6)
  np.testing.assert_allclose(reference.covariance, np.cov(features, rowvar=False), atol=1e-6)
  assert reference.features.shape == (25, 48)
  rows = [np.flatnonzero((features == row).all(axis=1)).item() for row in reference.features]
  assert len(set(rows)) == 25
  assert rows != sorted(rows)  # a sorted dataset's first features are not of its first class
  assert max(rows) > 40
  assert reference.fingerprint["num_images"] == NUM
  whole = references.compute_reference(source, pixel, max_features=1000)
  assert whole.features.shape == (NUM, 48)
  assert whole.fingerprint["num_features"] == NUM


def test_real_images_are_quantized_as_generated_ones_are(pixel):
  scans = np.random.default_rng(0).uniform(-1, 1, (20, SIZE, SIZE, 3)).astype(np.float32)
  source = sources.Source(scans, np.zeros(20, np.int32), 0, {"name": "made"})
  reference = references.compute_reference(source, pixel, max_features=20)
  found = references.measure(batches_of(images.to_uint8(scans)), pixel, reference)
  # The same images: what differs is the order of the sums.
  assert found["pixel_frechet_distance"] == pytest.approx(0, abs=1e-9)
  assert (found["pixel_precision"], found["pixel_recall"]) == (1.0, 1.0)


def test_grey_images_are_repeated():
  gray = sources.Source(
    np.arange(320, dtype=np.uint8).reshape(20, SIZE, SIZE, 1), np.zeros(20, np.int32), 0, {}
  )
  extractor = PixelExtractor(SIZE, 1)
  assert references.compute_reference(gray, extractor, 20).features.shape == (20, 16)


def test_metrics_are_those_of_the_whole_features(pixel):
  source, scans = made_source(), generated()
  reference = references.compute_reference(source, pixel, max_features=25)
  found = references.measure(batches_of(scans), pixel, reference)
  real, ours = pixels(source.images), pixels(scans)
  expected = metrics.frechet_distance(*map(statistics_of, (ours, real)))
  assert found["pixel_frechet_distance"] == pytest.approx(expected, rel=1e-6)
  kernel = metrics.kernel_distance(ours[:25], reference.features)
  got = found["pixel_kernel_distance"], found["pixel_kernel_distance_std"]
  assert got == pytest.approx(kernel, rel=1e-9)
  assert (found["pixel_precision"], found["pixel_recall"]) == metrics.precision_recall(
    ours[:25], reference.features
  )
  assert (found["pixel_num_samples"], found["pixel_num_subset_samples"]) == (50, 25)
  assert not any("recognition" in name for name in found)


def test_few_samples_meet_as_many_real_ones(pixel):
  reference = references.compute_reference(made_source(), pixel, max_features=25)
  scans = generated(10)
  found = references.measure(batches_of(scans), pixel, reference)
  assert (found["pixel_num_samples"], found["pixel_num_subset_samples"]) == (10, 10)
  assert (found["pixel_precision"], found["pixel_recall"]) == metrics.precision_recall(
    pixels(scans), reference.features[:10]
  )


def test_a_kept_reference_gives_the_same_metrics_to_the_last_bit(pixel, tmp_path, monkeypatch):
  source, scans = made_source(), generated()
  path = tmp_path / "made" / "reference.npz"
  computed = references.open_reference(path, source, pixel, 25)
  metrics_before = references.measure(batches_of(scans), pixel, computed)
  monkeypatch.setattr(references, "compute_reference", None)  # not again
  loaded = references.open_reference(path, source, pixel, 25)
  assert references.measure(batches_of(scans), pixel, loaded) == metrics_before
  assert [file.name for file in path.parent.iterdir()] == ["reference.npz"]


def test_labels_are_recognized_where_the_extractor_predicts_them():
  extractor = FakeClassifier()
  reference = references.compute_reference(made_source(), extractor, 25)
  scans = generated(30)
  labels = (scans[:, 0, 0, 1] % 3).astype(np.int64)
  labels[:6] = 5
  extractor.batches.clear()
  found = references.measure(batches_of(scans, labels), extractor, reference)
  assert extractor.batches == [7, 7, 7, 7, 2]  # one pass, in the extractor's batches
  assert found["classifier_recognition_accuracy"] == 24 / 30
  assert found["classifier_recognition_accuracy_of_held_out_images"] == 0.9
  unlabelled = references.measure(batches_of(scans), extractor, reference)
  assert not any("recognition" in name for name in unlabelled)


@pytest.mark.parametrize(
  ("changed", "field"),
  [
    (dict(crop="center"), "data.crop"),
    (dict(split="eval"), "data.split"),
    (dict(digest="other"), "data.digest"),
    (dict(size=8), "image_shape"),
    (dict(num=61), "num_images"),
  ],
)
def test_a_reference_of_other_images_is_refused(pixel, tmp_path, changed, field):
  path = tmp_path / "reference.npz"
  references.open_reference(path, made_source(), pixel, 25)
  with pytest.raises(UserError, match=rf"something else: .*{field} \(.+ there, .+ asked for\)"):
    references.open_reference(path, made_source(**changed), pixel, 25)


def test_a_reference_of_another_extractor_is_refused(tmp_path):
  path, source = tmp_path / "reference.npz", made_source()
  reference = references.open_reference(path, source, FakeClassifier(), 25)
  other = FakeClassifier("1" * 64)
  with pytest.raises(UserError, match=r"extractor.digest \('0+' there, '1+' asked for\)"):
    references.open_reference(path, source, other, 25)
  with pytest.raises(UserError, match=r"num_features \(25 there, 30 asked for\)"):
    references.open_reference(path, source, FakeClassifier(), 30)
  with pytest.raises(UserError, match="another extractor"):
    references.measure([(generated(), None)], other, reference)


def test_damaged_and_missing_references_are_refused(pixel, tmp_path):
  path, source = tmp_path / "reference.npz", made_source()
  with pytest.raises(UserError, match="is missing: delete it"):
    references.load_reference(path, {})
  references.open_reference(path, source, pixel, 25)
  path.write_bytes(path.read_bytes()[:-50])
  with pytest.raises(UserError, match=r"is damaged \(.*: delete it"):
    references.open_reference(path, source, pixel, 25)
  np.savez(path, mean=np.zeros(3))
  with pytest.raises(UserError, match=r"is damaged \(.*: delete it"):
    references.open_reference(path, source, pixel, 25)


def test_too_few_images_are_refused(pixel):
  reference = references.compute_reference(made_source(), pixel, 25)
  with pytest.raises(UserError, match="more than 3 generated images, and there are 3"):
    references.measure([(generated(3), None)], pixel, reference)
  with pytest.raises(UserError, match="there are 0"):
    references.measure([], pixel, reference)
  with pytest.raises(UserError, match="more than 3 real images"):
    references.compute_reference(made_source(num=3), pixel, 25)
