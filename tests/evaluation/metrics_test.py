"""Distances against references computed another way."""

import itertools
import tracemalloc

import numpy as np
import pytest
import scipy.linalg

from lrdit.evaluation import metrics
from tests import tiny

pytestmark = pytest.mark.floats


def statistics_of(features):
  """Mean and covariance of all features at once."""
  return metrics.statistics_of(metrics.moments(features))


def reference_distance(a, b):
  root = scipy.linalg.sqrtm(a[1] @ b[1])
  return np.square(a[0] - b[0]).sum() + np.trace(a[1] + b[1] - 2 * root.real)


def gaussians(dimensions, scale=1.0, seed=0):
  """Features of two sets with unlike means and covariances."""
  rng = np.random.default_rng(seed)
  mix = rng.normal(size=(dimensions, dimensions))
  x = rng.normal(size=(500, dimensions)) @ mix
  y = rng.normal(size=(400, dimensions)) + 0.3
  return scale * x, scale * y


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dimensions", [1, 2, 16, 64])
def test_frechet_distance_is_scipy_s(dimensions, scale):
  a, b = map(statistics_of, gaussians(dimensions, scale))
  assert metrics.frechet_distance(a, b) == pytest.approx(reference_distance(a, b), rel=1e-6)


def test_frechet_distance_of_singular_covariances():
  # Both on a line: (s1 - s2)^2 along it, nothing elsewhere.
  line = np.zeros((3, 3))
  line[0, 0] = 1.0
  got = metrics.frechet_distance((np.zeros(3), 4 * line), (np.ones(3), 9 * line))
  assert got == pytest.approx(3 + (2 - 3) ** 2, rel=1e-9)
  got = metrics.frechet_distance((np.zeros(3), 0 * line), (np.ones(3), 9 * line))
  assert got == pytest.approx(3 + 9, rel=1e-9)


def test_frechet_distance_of_rank_deficient_covariances():
  # Of 5 directions in 64, turned at random: the squared differences of the roots.
  rng = np.random.default_rng(0)
  turn = np.linalg.qr(rng.normal(size=(64, 64)))[0]
  values = np.zeros((2, 64))
  values[:, :5] = rng.uniform(1, 9, (2, 5))
  a, b = ((np.zeros(64), (turn * v) @ turn.T) for v in values)
  expected = np.square(np.sqrt(values[0]) - np.sqrt(values[1])).sum()
  assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
  assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6 * values[0].sum())


def test_frechet_distance_of_fewer_features_than_dimensions_is_scipy_s():
  x, y = gaussians(64)
  a, b = statistics_of(x[:20]), statistics_of(y[:30])
  assert metrics.frechet_distance(a, b) == pytest.approx(reference_distance(a, b), rel=1e-6)


@pytest.mark.parametrize("sizes", [(500,), (1, 1, 498), (7, 200, 1, 292)])
def test_streamed_statistics_are_those_of_the_whole(sizes):
  x = gaussians(6)[0] + 1e4  # a mean far from 0, where sums of squares lose their digits
  seen = None
  for end, size in zip(itertools.accumulate(sizes), sizes, strict=True):
    new = metrics.moments(x[end - size : end])
    seen = new if seen is None else metrics.merge_moments(seen, new)
  mean, covariance = metrics.statistics_of(seen)
  assert seen.count == 500
  np.testing.assert_allclose(mean, x.mean(axis=0), rtol=1e-13)
  np.testing.assert_allclose(covariance, np.cov(x, rowvar=False), rtol=1e-9)


def test_one_feature_has_no_covariance():
  with pytest.raises(ValueError, match="at least two"):
    statistics_of(np.ones((1, 3)))


def brute_force_mmd(x, y):
  def kernel(a, b):
    return (np.dot(a, b) / len(a) + 1) ** 3

  n = len(x)
  pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
  within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs)
  between = sum(kernel(a, b) for a in x for b in y)
  return within / (n * (n - 1)) - 2 * between / n**2


def test_squared_mmd_is_brute_force_s():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(12, 5)), rng.normal(size=(12, 5)) + 0.5
  assert metrics.squared_mmd(x, y) == pytest.approx(brute_force_mmd(x, y), rel=1e-10)


@pytest.mark.parametrize(("sizes", "subset_size"), [((80, 80), 40), ((61, 300), 30)])
def test_kernel_distance_of_small_sets_spreads_as_samples_do(sizes, subset_size):
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(sizes[0], 5)), rng.normal(size=(sizes[1], 5)) + 0.5
  mean, std = metrics.kernel_distance(x, y)
  fresh = [
    metrics.squared_mmd(*(rng.normal(size=(subset_size, 5)) + offset for offset in (0, 0.5)))
    for _ in range(400)
  ]
  # Subsets of one set share features, so they spread less than samples of their own.
  assert 0.4 * np.std(fresh) < std < 1.1 * np.std(fresh)
  assert abs(mean - np.mean(fresh)) < 2 * np.std(fresh)


@pytest.mark.parametrize(("count", "size"), [(2, 2), (3, 2), (4, 2), (7, 3), (1998, 999)])
def test_kernel_distance_takes_half_of_a_small_set(monkeypatch, count, size):
  seen = set()
  monkeypatch.setattr(metrics, "squared_mmd", lambda x, y: seen.add((len(x), len(y))) or 0.0)
  metrics.kernel_distance(np.zeros((count, 1)), np.zeros((3000, 1)))
  assert seen == {(size, size)}


def test_kernel_distance_takes_at_most_a_thousand_and_at_least_two(monkeypatch):
  seen = set()
  monkeypatch.setattr(metrics, "squared_mmd", lambda x, y: seen.add((len(x), len(y))) or 0.0)
  metrics.kernel_distance(np.zeros((2500, 1)), np.zeros((3000, 1)))
  assert seen == {(1000, 1000)}
  with pytest.raises(ValueError, match="at least two"):
    metrics.kernel_distance(np.zeros((1, 1)), np.zeros((3000, 1)))


def test_kernel_distance_is_unbiased_and_fixed_by_its_seed(monkeypatch):
  monkeypatch.setattr(metrics, "KERNEL_SUBSET_SIZE", 50)
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(2, 3000, 8)).astype(np.float32)
  mean, std = metrics.kernel_distance(x, y)
  assert std > 0
  # With the diagonals, 2 E[k(x, x) - k(x, x')] / 50 = 0.33 more.
  assert abs(mean) < 3 * std / np.sqrt(metrics.KERNEL_SUBSETS) < 0.05
  far, _ = metrics.kernel_distance(x, y + np.float32(0.5))
  assert far > 20 * std / np.sqrt(metrics.KERNEL_SUBSETS)
  assert metrics.kernel_distance(x, y) == (mean, std)
  assert metrics.kernel_distance(x, y, seed=1) != (mean, std)


def brute_force_covered(features, center, k):
  radii = [sorted(np.linalg.norm(center - c, axis=1))[k] for c in center]
  inside = [
    any(np.linalg.norm(x - c) <= r for c, r in zip(center, radii, strict=True)) for x in features
  ]
  return np.mean(inside)


@pytest.mark.parametrize("blocks", [(1024, 8192), (7, 11)])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_brute_force_s(monkeypatch, blocks, k):
  monkeypatch.setattr(metrics, "BLOCK_ROWS", blocks[0])
  monkeypatch.setattr(metrics, "BLOCK_COLUMNS", blocks[1])
  rng = np.random.default_rng(0)
  generated, real = rng.normal(size=(60, 3)) * 0.7 + 0.5, rng.normal(size=(45, 3))
  precision, recall = metrics.precision_recall(generated, real, k)
  assert precision == brute_force_covered(generated, real, k)
  assert recall == brute_force_covered(real, generated, k)
  assert 0 < recall < precision < 1


def test_precision_and_recall_know_collapse_copies_and_distance():
  rng = np.random.default_rng(0)
  real = rng.normal(size=(200, 64)).astype(np.float32) + 30
  assert metrics.precision_recall(real, real) == (1.0, 1.0)
  # One image drawn again and again: balls of radius 0 hold it alone. Far from 0,
  # |x|^2 + |x|^2 - 2 x.x is some rounding error, of either sign.
  collapsed = np.repeat(real[:1], 50, axis=0)
  assert not metrics._squared_radii(np.repeat(real, 5, axis=0), 3).any()
  assert metrics.precision_recall(collapsed, real) == (1.0, 1 / 200)
  assert metrics.precision_recall(real, collapsed) == (1 / 200, 1.0)
  assert metrics.precision_recall(real + 100, real) == (0.0, 0.0)
  with pytest.raises(ValueError, match="more than 3"):
    metrics.precision_recall(real[:3], real)


@pytest.mark.parametrize("blocks", [(1024, 8192), (3, 2)])
def test_a_distance_that_is_the_radius_is_within_it_whatever_the_rounding(monkeypatch, blocks):
  """Every point is as far from its neighbor as the real ones are from theirs."""
  monkeypatch.setattr(metrics, "BLOCK_ROWS", blocks[0])
  monkeypatch.setattr(metrics, "BLOCK_COLUMNS", blocks[1])
  turn = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
  line = np.eye(8)[:1] * np.arange(12)[:, None] / 3
  real, generated = line @ turn + 0.1, (line + np.eye(8)[1] / 3) @ turn + 0.1
  assert metrics.precision_recall(generated, real, k=1) == (1.0, 1.0)


def test_precision_and_recall_hold_no_more_than_blocks_of_distances(monkeypatch):
  monkeypatch.setattr(metrics, "BLOCK_ROWS", 64)
  monkeypatch.setattr(metrics, "BLOCK_COLUMNS", 128)
  features = np.random.default_rng(0).normal(size=(3000, 8)).astype(np.float32)
  tracemalloc.start()
  metrics.precision_recall(features, features)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2**20  # all the distances: 69 MiB


def test_recognition_accuracy_is_the_share_of_equal_labels():
  assert metrics.recognition_accuracy(np.array([1, 2, 3, 4]), np.array([1, 2, 0, 4])) == 0.75


def test_real_digits_are_near_each_other_and_far_from_noise():
  images = np.concatenate([tiny.load_digits(split).images for split in ("train", "eval")]).reshape(
    -1, 64
  )
  rng = np.random.default_rng(0)
  order = rng.permutation(len(images))
  halves = [statistics_of(images[order[i::2]]) for i in (0, 1)]
  assert metrics.frechet_distance(*halves) == pytest.approx(0.28, abs=0.06)
  noise = statistics_of(rng.uniform(-1, 1, size=images.shape))
  assert metrics.frechet_distance(halves[0], noise) > 20
