"""The classifier: what it learns, what it is kept with, what is refused."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from lrdit.data import images
from lrdit.data import source as sources
from lrdit.evaluation import classifier
from lrdit.runtime.errors import UserError
from tests import tiny

SETTINGS = classifier.ClassifierSettings(seed=0, num_steps=2, batch_size=8)


def made_source(split="train", num_classes=3, size=4, channels=3, seed=0):
  """Random images."""
  scans = np.random.default_rng(seed).integers(0, 256, (20, size, size, channels), np.uint8)
  labels = np.arange(20, dtype=np.int32) % max(num_classes, 1)
  fingerprint = {"name": "made", "split": split, "num_examples": 20, "digest": str(seed)}
  return sources.Source(scans, labels, num_classes, fingerprint)


def some_images(count, size, seed=1):
  return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
  """A classifier and the directory it is kept in."""
  directory = tmp_path_factory.mktemp("kept") / "classifier"
  sources_of = made_source(), made_source("eval", seed=5)
  return classifier.open_classifier(directory, *sources_of, SETTINGS), directory


def test_images_of_another_size_are_refused(kept):
  with pytest.raises(UserError, match=r"the images are 6x6 .* 'classifier' is for 4x4"):
    kept[0].extract(some_images(2, 6))


def quadrants(split, num, seed):
  """Noise with one bright quadrant of four: the class."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 4, num).astype(np.int32)
  scans = rng.integers(0, 130, (num, 4, 4, 1), np.uint8)
  for scan, label in zip(scans, labels, strict=True):
    row, column = divmod(label, 2)
    scan[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 120
  return sources.Source(scans, labels, 4, {"name": "quadrants", "split": split})


def test_the_classifier_learns_and_its_features_tell_the_classes():
  source, held_out = quadrants("train", 128, 0), quadrants("eval", 60, 1)
  settings = classifier.ClassifierSettings(seed=0, num_steps=40, batch_size=16)
  extractor = classifier.train_classifier(source, held_out, settings)
  features, predictions = extractor.extract(images.to_rgb(held_out.images))
  accuracy = (predictions == held_out.labels).mean()
  assert accuracy > 0.9
  assert extractor.held_out_accuracy == accuracy
  # By the features alone: an image's nearest neighbor has its label.
  distances = np.square(features[:, None] - features).sum(-1) + 1e9 * np.eye(60)
  assert (held_out.labels[distances.argmin(axis=1)] == held_out.labels).mean() > 0.8


DIGITS_SCRIPT = """
from lrdit.data import digits
from lrdit.data import source as sources
from lrdit.evaluation import classifier
options = sources.DataOptions("", 8, 1, 0, False)
source, held_out = (digits.load_digits(split, options) for split in ("train", "eval"))
steps = classifier.default_num_steps(len(source), 64)
settings = classifier.ClassifierSettings(seed=0, num_steps=steps)
print(classifier.train_classifier(source, held_out, settings).held_out_accuracy)
"""


@pytest.mark.slow
def test_the_classifier_recognizes_digits():
  # In optimised code, which takes a tenth of the time.
  flags = os.environ["XLA_FLAGS"].replace("--xla_backend_optimization_level=0", "")
  done = subprocess.run(
    [sys.executable, "-c", DIGITS_SCRIPT],
    cwd=tiny.ROOT,
    env=tiny.environment(XLA_FLAGS=flags),
    capture_output=True,
    text=True,
    check=True,
  )
  assert float(done.stdout) >= 0.97


def test_training_is_fixed_by_its_seed(kept):
  arguments = made_source(), made_source("eval", seed=5)
  again = classifier.train_classifier(*arguments, SETTINGS)
  assert again.digest == kept[0].digest
  other = classifier.train_classifier(*arguments, dataclasses.replace(SETTINGS, seed=1))
  assert other.digest != kept[0].digest


def test_features_do_not_depend_on_the_batch(kept, monkeypatch):
  scans = some_images(11, 4)
  whole = kept[0].extract(scans)
  for part in (slice(0, 1), slice(3, 11)):
    features, predictions = kept[0].extract(scans[part])
    np.testing.assert_array_equal(features, whole.features[part])
    np.testing.assert_array_equal(predictions, whole.predictions[part])
  monkeypatch.setattr(kept[0], "batch_size", 4)
  np.testing.assert_allclose(kept[0].extract(scans).features, whole.features, rtol=1e-5, atol=1e-5)


def test_a_kept_classifier_is_taken_and_not_trained(kept, monkeypatch):
  extractor, directory = kept
  monkeypatch.setattr(classifier, "train_classifier", None)
  again = classifier.open_classifier(
    directory, made_source(), made_source("eval", seed=5), SETTINGS
  )
  assert (again.digest, again.held_out_accuracy) == (extractor.digest, extractor.held_out_accuracy)
  scans = some_images(5, 4)
  for ours, theirs in zip(again.extract(scans), extractor.extract(scans), strict=True):
    np.testing.assert_array_equal(ours, theirs)
  record = json.loads((directory / "classifier.json").read_text())
  assert record["data"]["train"] == made_source().fingerprint
  assert record["settings"]["num_steps"] == 2
  assert sorted(path.name for path in directory.iterdir()) == ["classifier.json", "classifier.npz"]


@pytest.mark.parametrize(
  ("changed", "fields"),
  [
    (dict(seed=7), ["data.train.digest"]),
    (dict(split="other"), ["data.train.split"]),
    (dict(size=8), ["image_size"]),
    (dict(channels=1), ["num_channels"]),
    (dict(num_classes=4, seed=7), ["data.train.digest", "num_classes"]),
  ],
)
def test_a_classifier_of_something_else_is_refused(kept, changed, fields):
  with pytest.raises(
    UserError, match="; ".join(rf"{f} \(.+ there, .+ asked for\)" for f in fields)
  ):
    classifier.open_classifier(
      kept[1], made_source(**changed), made_source("eval", seed=5), SETTINGS
    )


def test_damaged_files_are_refused(kept, tmp_path):
  arguments = made_source(), made_source("eval", seed=5), SETTINGS
  weights, record = tmp_path / "classifier.npz", tmp_path / "classifier.json"
  record.write_text((kept[1] / "classifier.json").read_text())
  with pytest.raises(UserError, match=r"classifier.npz is (missing|damaged .*): delete"):
    classifier.open_classifier(tmp_path, *arguments)
  weights.write_bytes((kept[1] / "classifier.npz").read_bytes()[:-100])
  with pytest.raises(UserError, match=r"classifier.npz is (missing|damaged .*): delete"):
    classifier.open_classifier(tmp_path, *arguments)
  params = classifier.flatten(kept[0].params)
  params["Dense_0/bias"] = params["Dense_0/bias"] + 1
  np.savez(weights, **params)
  with pytest.raises(UserError, match=r"other weights than .* says: delete"):
    classifier.open_classifier(tmp_path, *arguments)
  record.write_text("{")
  with pytest.raises(UserError, match=r"classifier.json is damaged .*: delete"):
    classifier.open_classifier(tmp_path, *arguments)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(kept, value):
  params = jax.tree.map(np.array, kept[0].params)
  params["Dense_0"]["bias"][1] = value
  with pytest.raises(
    UserError, match=r"'classifier' has weights that are not finite \(1 of .*to tra"
  ):
    classifier.ClassifierExtractor(params, 4, 3, 3)


def test_the_classifier_needs_labels(tmp_path):
  source = made_source(num_classes=0)
  with pytest.raises(UserError, match="'inception' or 'pixel'"):
    classifier.open_classifier(tmp_path, source, source, SETTINGS)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("image_size", "widths"),
  [
    (4, [32, 64, 128]),
    (8, [32, 64, 128]),
    (32, [32, 64, 128, 256]),
    (64, [32, 64, 128, 256]),
    (128, [32, 64, 128, 256]),
    (256, [32, 64, 128, 256]),
  ],
)
def test_the_network_fits_its_images(image_size, widths):
  import jax

  network = classifier.ClassifierNetwork(image_size, 10)
  scans = jax.ShapeDtypeStruct((2, image_size, image_size, 3), np.float32)
  (features, logits), variables = jax.eval_shape(network.init_with_output, jax.random.key(0), scans)
  assert features.shape == (2, network.num_features) == (2, widths[-1])
  assert logits.shape == (2, 10)
  blocks = [
    variables["params"][f"_Block_{i}"]["Conv_1"]["kernel"].shape[-1] for i in range(len(widths))
  ]
  assert blocks == widths
  assert f"_Block_{len(widths)}" not in variables["params"]
