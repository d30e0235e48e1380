"""Effective ranks of a matrix, from its singular spectrum, and angles between subspaces.

All results are computed on the host in float64. Energy ranks are integers, other ranks are real
numbers, and all are 0 for a zero matrix.

Axes: m rows, n columns, K = min(m, n) singular values, r dimensions of a subspace.
"""

import numpy as np
from jaxtyping import Float

from lrdit.model.factors import energy_rank

ENERGIES = (0.90, 0.95, 0.99)
MEASURES = ("stable_rank", "entropy_rank", *(f"energy_rank_{100 * e:.0f}" for e in ENERGIES))


def singular_values(matrix: Float[np.ndarray, "m n"]) -> Float[np.ndarray, " K"]:
  """Return the singular values, descending."""
  return np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)


def product_singular_values(
  left: Float[np.ndarray, "m r"], right: Float[np.ndarray, "r n"]
) -> Float[np.ndarray, " K"]:
  """Return the min(m, r, n) largest singular values of left @ right without forming it."""
  r_left = np.linalg.qr(np.asarray(left, np.float64), mode="r")
  r_right = np.linalg.qr(np.asarray(right, np.float64).T, mode="r")
  return singular_values(r_left @ r_right.T)


def left_singular_vectors(
  matrix: Float[np.ndarray, "m n"],
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, "m m"]]:
  """Return the descending singular values and the left vectors of a matrix with m <= n.

  The Gram matrix in float64 is fast and resolves directions down to 1e-8 of the largest singular
  value, which is enough for float32.
  """
  matrix = np.asarray(matrix, np.float64)
  squares, vectors = np.linalg.eigh(matrix @ matrix.T)
  return np.sqrt(np.maximum(squares[::-1], 0)), vectors[:, ::-1]


def stable_rank(sigma: Float[np.ndarray, " K"]) -> float:
  """Return ||A||_F^2 / ||A||_2^2 (Rudelson and Vershynin 2007, section 1), at least 1."""
  largest = sigma.max(initial=0.0)
  return float(np.square(sigma / largest).sum()) if largest > 0 else 0.0


def entropy_rank(sigma: Float[np.ndarray, " K"]) -> float:
  """Return exp(H(p)) with p_i = sigma_i / sum(sigma) (Roy and Vetterli 2007, eq. 3)."""
  total = sigma.sum()
  if total == 0:
    return 0.0
  p = sigma[sigma > 0] / total
  return float(np.exp(-(p * np.log(p)).sum()))


def measures(sigma: Float[np.ndarray, " K"]) -> dict[str, float]:
  """Return all `MEASURES` by name, from descending singular values."""
  energy_ranks = [energy_rank(sigma, e) for e in ENERGIES]
  return dict(zip(MEASURES, [stable_rank(sigma), entropy_rank(sigma), *energy_ranks], strict=True))


def principal_angle_cosines(
  a: Float[np.ndarray, "m r"], b: Float[np.ndarray, "m r"]
) -> Float[np.ndarray, " r"]:
  """Return the descending cosines of the principal angles (Bjorck and Golub 1973, theorem 1).

  `a` and `b` have orthonormal columns. The mean squared cosine is the share of one subspace that
  lies in the other; its expectation for random subspaces is r / m.
  """
  return np.clip(singular_values(np.asarray(a, np.float64).T @ np.asarray(b, np.float64)), 0, 1)
