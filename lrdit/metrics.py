"""Sample quality: distances between sets of images and recognition of labels.

A figure's name says the features it was measured on.
"""

import numpy as np
from jaxtyping import Float, Int

Statistics = tuple[Float[np.ndarray, " D"], Float[np.ndarray, "D D"]]


def gaussian_statistics(features: Float[np.ndarray, "N D"]) -> Statistics:
  """Mean (D,) and unbiased covariance (D, D) of (N, D) features, float64."""
  features = np.asarray(features, np.float64)
  return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet_distance(statistics_1: Statistics, statistics_2: Statistics) -> float:
  """Squared Frechet distance of two Gaussians (Dowson and Landau 1982).

  |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). The trace of the root is the sum
  of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric:
  exact for singular covariances too, where a general matrix root is not.

  Args:
    statistics_1, statistics_2: (mean, covariance) of each.
  """
  (mean_1, cov_1), (mean_2, cov_2) = statistics_1, statistics_2
  values, vectors = np.linalg.eigh(cov_1)
  root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
  product = np.linalg.eigvalsh(root @ cov_2 @ root)
  trace_root = np.sqrt(np.clip(product, 0, None)).sum()
  offset = np.square(mean_1 - mean_2).sum()
  return float(offset + np.trace(cov_1) + np.trace(cov_2) - 2 * trace_root)


def fit_svm(images: Float[np.ndarray, "N H W C"], labels: Int[np.ndarray, " N"]):
  """A support-vector classifier (scikit-learn's default RBF) on raw pixels.

  Args:
    images: (N, H, W, C) in [-1, 1].
    labels: (N,).
  """
  from sklearn import svm

  return svm.SVC().fit(images.reshape(len(images), -1), labels)


def recognition_accuracy(
  classifier, images: Float[np.ndarray, "N H W C"], labels: Int[np.ndarray, " N"]
) -> float:
  """Share of images that `classifier` takes for their label, in [0, 1]."""
  return float((classifier.predict(images.reshape(len(images), -1)) == labels).mean())
