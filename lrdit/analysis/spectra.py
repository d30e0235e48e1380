"""Effective ranks of a matrix, from its singular spectrum, and angles between subspaces.

Everything is computed on the host in float64, whatever the matrix is stored in. Energy ranks are
integers and the other ranks real numbers; all are 0 for a matrix of zeros.

Axes: m rows, n columns, K = min(m, n) singular values, r dimensions of a subspace.
"""

import numpy as np
from jaxtyping import Float

ENERGIES = (0.90, 0.95, 0.99)
# The measures by name, in order.
MEASURES = ("stable_rank", "entropy_rank", *(f"energy_rank_{100 * e:.0f}" for e in ENERGIES))


def singular_values(matrix: Float[np.ndarray, "m n"]) -> Float[np.ndarray, " K"]:
  """Return the (K,) singular values, float64, descending."""
  return np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)


def product_singular_values(
  left: Float[np.ndarray, "m r"], right: Float[np.ndarray, "r n"]
) -> Float[np.ndarray, " K"]:
  """Return the K = min(m, r, n) singular values of left @ right that can be above 0, descending.

  They come from the triangular factors of both: the product itself is never formed.
  """
  r_left = np.linalg.qr(np.asarray(left, np.float64), mode="r")
  r_right = np.linalg.qr(np.asarray(right, np.float64).T, mode="r")
  return singular_values(r_left @ r_right.T)


def left_singular_vectors(
  matrix: Float[np.ndarray, "m n"],
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, "m m"]]:
  """Return the singular values and left vectors that float32 resolves, fast.

  They come from the eigenvectors of the Gram matrix in float64, which loses the directions below
  1e-8 of the largest singular value.

  Args:
    matrix: (m, n), m <= n.

  Returns:
    ((m,) float64 descending, (m, m) float64 orthonormal columns in the same order).
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


def energy_rank(sigma: Float[np.ndarray, " K"], energy: float) -> int:
  """Return the least k whose k largest singular values hold `energy` of sum(sigma^2).

  Args:
    sigma: (K,) descending.
    energy: in (0, 1].
  """
  held = np.cumsum(np.square(sigma))
  if len(held) == 0 or held[-1] == 0:
    return 0
  # A share that only rounding keeps from being met counts as met.
  return 1 + int(np.argmax(held >= energy * held[-1] * (1 - 1e-12)))


def measures(sigma: Float[np.ndarray, " K"]) -> dict[str, float]:
  """Return all of `MEASURES` by name, from descending singular values."""
  energy_ranks = [energy_rank(sigma, e) for e in ENERGIES]
  return dict(zip(MEASURES, [stable_rank(sigma), entropy_rank(sigma), *energy_ranks], strict=True))


def principal_angle_cosines(
  a: Float[np.ndarray, "m r"], b: Float[np.ndarray, "m r"]
) -> Float[np.ndarray, " r"]:
  """Return the cosines of the principal angles (Bjorck and Golub 1973, theorem 1).

  Args:
    a, b: (m, r) orthonormal columns.

  Returns:
    (r,) float64 in [0, 1], descending. Their mean square is the share of one subspace that lies in
    the other, r / m for random ones.
  """
  return np.clip(singular_values(np.asarray(a, np.float64).T @ np.asarray(b, np.float64)), 0, 1)
