"""Sample quality: distances between sets of features, and recognition of labels.

All computations are in float64. The caller knows the extractor, and names the metrics.

Axes: N features of one set, M of the other, b a batch of them, D values of a feature.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Real

Statistics = tuple[Float64[np.ndarray, " D"], Float64[np.ndarray, "D D"]]

KERNEL_SUBSETS = 100
KERNEL_SUBSET_SIZE = 1000
NEIGHBORS = 3

# Rows and columns of distances in memory at once: 64 MiB.
BLOCK_ROWS, BLOCK_COLUMNS = 1024, 8192
# Below this share of the squared norms, |x|^2 + |y|^2 - 2 x.y is a rounding error and set to 0.
DISTANCE_EPSILON = 1e-12
RADIUS_EPSILON = 1e-9  # Radii grow by this share, so that rounding excludes no neighbor.


class Moments(NamedTuple):
  """Running moments of a stream of features.

  Attributes:
    count: number of features.
    mean: (D,) float64.
    scatter: (D, D) float64, the sum of (x - mean)(x - mean)^T.
  """

  count: int
  mean: Float64[np.ndarray, " D"]
  scatter: Float64[np.ndarray, "D D"]


def moments(features: Real[np.ndarray, "b D"]) -> Moments:
  """Return the moments of one batch of at least one feature."""
  features = np.asarray(features, np.float64)
  mean = features.mean(axis=0)
  centered = features - mean
  return Moments(len(features), mean, centered.T @ centered)


def merge_moments(a: Moments, b: Moments) -> Moments:
  """Return the moments of two batches together (Chan, Golub and LeVeque 1983, eq. 2.1)."""
  count = a.count + b.count
  offset = b.mean - a.mean
  mean = a.mean + offset * (b.count / count)
  between = np.outer(offset, offset) * (a.count * b.count / count)
  return Moments(count, mean, a.scatter + b.scatter + between)


def statistics_of(seen: Moments) -> Statistics:
  """Return mean and unbiased covariance; raise ValueError for fewer than two features."""
  if seen.count < 2:
    raise ValueError("a covariance needs at least two features")
  return seen.mean, seen.scatter / (seen.count - 1)


def _factor(covariance: Float64[np.ndarray, "D D"]) -> Float64[np.ndarray, "D r"]:
  """Return A with A A^T the covariance, without directions that hold rounding errors only."""
  values, vectors = np.linalg.eigh(covariance)
  kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
  return vectors[:, kept] * np.sqrt(values[kept])


def frechet_distance(statistics_1: Statistics, statistics_2: Statistics) -> float:
  """Return the squared Frechet distance of two Gaussians (Dowson and Landau 1982).

  |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). With S1 = A A^T and S2 = B B^T, the trace of the root
  is the sum of the singular values of A^T B. Unlike a general matrix root, this is exact for
  singular covariances too.
  """
  (mean_1, cov_1), (mean_2, cov_2) = statistics_1, statistics_2
  product = _factor(cov_1).T @ _factor(cov_2)
  trace_root = np.linalg.svd(product, compute_uv=False).sum() if product.size else 0.0
  offset = np.square(mean_1 - mean_2).sum()
  return float(offset + np.trace(cov_1) + np.trace(cov_2) - 2 * trace_root)


def squared_mmd(x: Float64[np.ndarray, "n D"], y: Float64[np.ndarray, "n D"]) -> float:
  """Return an unbiased estimate of the squared maximum mean discrepancy of equally large sets.

  The kernel is (x.y / D + 1)^3 (Gretton et al. 2012, eq. 3). The estimate may be negative for
  similar sets.
  """
  n, num_values = x.shape
  bases = (a @ b.T / num_values + 1.0 for a, b in ((x, x), (y, y), (x, y)))
  k_xx, k_yy, k_xy = (base * base * base for base in bases)
  within = k_xx.sum() - np.trace(k_xx) + k_yy.sum() - np.trace(k_yy)
  return float(within / (n * (n - 1)) - 2 * k_xy.mean())


def kernel_distance(
  features_1: Real[np.ndarray, "N D"], features_2: Real[np.ndarray, "M D"], seed: int = 0
) -> tuple[float, float]:
  """Return the kernel distance (Binkowski et al. 2018, "KID" over Inception features).

  It is the mean `squared_mmd` of 100 pairs of random subsets, unbiased for any subset size. The
  subsets have 1,000 features each, or half of the smaller set (rounded down, at least 2) if that is
  less: subsets that are whole sets would all give one estimate.

  Returns:
    (mean, standard deviation) over the pairs of subsets. The deviation is one subset's, not the
    mean's.

  Raises:
    ValueError: a set has fewer than two features.
  """
  smaller = min(len(features_1), len(features_2))
  if smaller < 2:
    raise ValueError("a kernel distance needs at least two features of each")
  size = min(KERNEL_SUBSET_SIZE, max(2, smaller // 2))
  rng = np.random.default_rng(seed)

  def subset(features: np.ndarray) -> np.ndarray:
    return features[rng.choice(len(features), size, replace=False)].astype(np.float64)

  estimates = [squared_mmd(subset(features_1), subset(features_2)) for _ in range(KERNEL_SUBSETS)]
  return float(np.mean(estimates)), float(np.std(estimates))


def _distance_blocks(
  x: Float64[np.ndarray, "b D"], features: Real[np.ndarray, "N D"]
) -> Iterator[tuple[slice, Float64[np.ndarray, "b n"]]]:
  """Yield the squared distances of `x` to the features, some columns at a time."""
  x_norms = np.square(x).sum(axis=1)[:, None]
  for start in range(0, len(features), BLOCK_COLUMNS):
    columns = slice(start, start + BLOCK_COLUMNS)
    y = features[columns].astype(np.float64)
    norms = x_norms + np.square(y).sum(axis=1)
    squared = norms - 2 * (x @ y.T)
    squared[squared < DISTANCE_EPSILON * norms] = 0.0
    yield columns, squared


def _row_blocks(features: Real[np.ndarray, "N D"]) -> Iterator[Float64[np.ndarray, "b D"]]:
  for start in range(0, len(features), BLOCK_ROWS):
    yield features[start : start + BLOCK_ROWS].astype(np.float64)


def _squared_radii(features: Real[np.ndarray, "N D"], k: int) -> Float64[np.ndarray, " N"]:
  """Return the squared distance of each feature to its k-th nearest other one."""
  radii = []
  for x in _row_blocks(features):
    nearest = np.empty((len(x), 0))
    for _, squared in _distance_blocks(x, features):
      nearest = np.concatenate([nearest, squared], axis=1)
      # The nearest of the k + 1 is the feature itself.
      nearest = np.partition(nearest, min(k, nearest.shape[1] - 1), axis=1)[:, : k + 1]
    radii.append(nearest.max(axis=1))
  return np.concatenate(radii) * (1 + RADIUS_EPSILON)


def _share_covered(
  features: Real[np.ndarray, "N D"],
  center: Real[np.ndarray, "M D"],
  squared_radii: Float64[np.ndarray, " M"],
) -> float:
  """Return the share of the features that lie in at least one ball."""
  num_covered = 0
  for x in _row_blocks(features):
    covered = np.zeros(len(x), bool)
    for columns, squared in _distance_blocks(x, center):
      covered |= (squared <= squared_radii[columns]).any(axis=1)
    num_covered += int(covered.sum())
  return num_covered / len(features)


def precision_recall(
  generated: Real[np.ndarray, "N D"], real: Real[np.ndarray, "M D"], k: int = NEIGHBORS
) -> tuple[float, float]:
  """Return improved precision and recall (Kynkaanniemi et al. 2019, eq. 1 and 2), in [0, 1].

  Balls around the features of a set, each reaching to its k-th nearest other one, stand for the
  set's manifold. Precision is the share of generated features in the real manifold; recall is the
  share of real features in the generated manifold. Memory beside the features is bounded. Both
  depend on N and M: compare equal numbers only.

  Raises:
    ValueError: a set has no more than k features.
  """
  if min(len(generated), len(real)) <= k:
    raise ValueError(f"precision and recall need more than {k} features of each")
  precision = _share_covered(generated, real, _squared_radii(real, k))
  recall = _share_covered(real, generated, _squared_radii(generated, k))
  return precision, recall


def recognition_accuracy(predicted: Int[np.ndarray, " N"], labels: Int[np.ndarray, " N"]) -> float:
  """Return the share of images whose label a classifier predicts, in [0, 1]."""
  return float((predicted == labels).mean())
