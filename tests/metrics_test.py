import numpy as np
import pytest
import scipy.linalg

from lrdit import metrics
from tests import tiny


def reference_distance(a, b):
  root = scipy.linalg.sqrtm(a[1] @ b[1])
  return np.square(a[0] - b[0]).sum() + np.trace(a[1] + b[1] - 2 * root.real)


@pytest.mark.parametrize("dimensions", [2, 16, 64])
def test_frechet_distance_is_scipy_s(dimensions):
  rng = np.random.default_rng(0)
  mix = rng.normal(size=(dimensions, dimensions))
  a = metrics.gaussian_statistics(rng.normal(size=(500, dimensions)) @ mix)
  b = metrics.gaussian_statistics(rng.normal(size=(400, dimensions)) + 0.3)
  assert metrics.frechet_distance(a, b) == pytest.approx(reference_distance(a, b), rel=1e-6)


def test_frechet_distance_of_singular_covariances():
  # Both on a line: (s1 - s2)^2 along it, nothing elsewhere.
  line = np.zeros((3, 3))
  line[0, 0] = 1.0
  got = metrics.frechet_distance((np.zeros(3), 4 * line), (np.ones(3), 9 * line))
  assert got == pytest.approx(3 + (2 - 3) ** 2, rel=1e-9)


def test_real_digits_are_near_each_other_and_far_from_noise():
  images = np.concatenate([tiny.load_digits(split).images for split in ("train", "eval")]).reshape(
    -1, 64
  )
  rng = np.random.default_rng(0)
  order = rng.permutation(len(images))
  halves = [metrics.gaussian_statistics(images[order[i::2]]) for i in (0, 1)]
  assert metrics.frechet_distance(*halves) == pytest.approx(0.28, abs=0.06)
  noise = metrics.gaussian_statistics(rng.uniform(-1, 1, size=images.shape))
  assert metrics.frechet_distance(halves[0], noise) > 20


def test_svm_recognises_held_out_digits():
  train, held_out = (tiny.load_digits(split) for split in ("train", "eval"))
  classifier = metrics.fit_svm(train.images, train.labels)
  assert metrics.recognition_accuracy(classifier, held_out.images, held_out.labels) > 0.96
  wrong = (held_out.labels + 1) % 10
  assert metrics.recognition_accuracy(classifier, held_out.images, wrong) < 0.05
