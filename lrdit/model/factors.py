"""Trained kernels as factors: cut, whitened, taken by prefix, or merged again.

A kernel W is replaced by W V V^T for orthonormal columns V, so that down = W V and up = V^T, scaled
to equal norms. The columns are nested: the first r of them serve a timestep of active rank r.

- `svd`: the leading right singular vectors of W, the best cut of the kernel at every rank (Eckart
  and Young 1936).
- `whitened`: those of C^(1/2) W for the second moments C = E[x x^T] of the inputs, the best cut of
  the outputs x W (ASVD, Yuan et al. 2023, arXiv:2312.05821; SVD-LLM, Wang et al. 2024,
  arXiv:2403.07378). Inputs differ between timesteps, so each rank bucket adds its own columns: the
  first bucket's timesteps choose the columns that they use, and every further bucket's moments
  choose more from what is left of the kernel.

Axes: D_in, D_out widths, R rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from lrdit.model.low_rank import VANISHING
from lrdit.runtime.errors import UserError

COMPRESSIONS = ("svd", "whitened")
# Share of the mean variance that is added to every direction of the inputs, so that directions
# which few examples reach keep the order of the plain SVD.
DAMPING = 1e-4

Factors = tuple[Float[np.ndarray, "D_in R"], Float[np.ndarray, "R D_out"]]


def merge(
  down: Float[np.ndarray, "D_in R"], up: Float[np.ndarray, "R D_out"]
) -> Float[np.ndarray, "D_in D_out"]:
  """Return the kernel of two factors, float32."""
  return np.asarray(down, np.float32) @ np.asarray(up, np.float32)


def square_root(moments: Float[np.ndarray, "D_in D_in"]) -> Float[np.ndarray, "D_in D_in"]:
  """Return the symmetric root of damped second moments, float64."""
  values, vectors = np.linalg.eigh(np.asarray(moments, np.float64))
  damped = np.maximum(values, 0) + DAMPING * max(np.trace(moments) / len(moments), 1e-30)
  return (vectors * np.sqrt(damped)) @ vectors.T


def _right_vectors(
  matrix: Float[np.ndarray, "D_in D_out"], count: int
) -> Float[np.ndarray, "D_out R"]:
  """Return at most `count` leading right singular vectors, without those that vanish, float64.

  The Gram matrix of the shorter side resolves directions down to 1e-8 of the largest.
  """
  is_wide = matrix.shape[0] < matrix.shape[1]
  squares, vectors = np.linalg.eigh(matrix @ matrix.T if is_wide else matrix.T @ matrix)
  values, vectors = np.sqrt(np.maximum(squares[::-1], 0)), vectors[:, ::-1]
  kept = np.flatnonzero(values[:count] > VANISHING * values[0])
  if is_wide:
    return matrix.T @ (vectors[:, kept] / values[kept])
  return vectors[:, kept]


def energy_rank(sigma: Float[np.ndarray, " K"], energy: float) -> int:
  """Return the least k for which the k largest values hold a share `energy` of sum(sigma^2).

  `sigma` descends; the rank of zeros is 0.
  """
  held = np.cumsum(np.square(sigma))
  if len(held) == 0 or held[-1] == 0:
    return 0
  # Tolerate rounding just below the share.
  return 1 + int(np.argmax(held >= energy * held[-1] * (1 - 1e-12)))


def rank_by_energy(
  kernel: Float[np.ndarray, "D_in D_out"],
  energy: float,
  multiple_of: int,
  root: Float[np.ndarray, "D_in D_in"] | None = None,
) -> int:
  """Return the least rank whose cut keeps a share `energy` of a kernel's squared norm.

  It is the next multiple of `multiple_of`, or min(D_in, D_out). It is 0, for a layer to keep dense,
  where factors of that rank would have as many parameters as the kernel.

  Args:
    root: `square_root` of the inputs' second moments, to keep that share of the outputs instead.
  """
  seen = np.asarray(kernel, np.float64)
  dim_in, dim_out = seen.shape
  seen = seen if root is None else root @ seen
  squares = np.linalg.eigvalsh(seen @ seen.T if dim_in < dim_out else seen.T @ seen)
  rank = energy_rank(np.sqrt(np.maximum(squares[::-1], 0)), energy)
  rank = min(multiple_of * max(1, -(-rank // multiple_of)), dim_in, dim_out)
  return rank if rank * (dim_in + dim_out) < dim_in * dim_out else 0


def factorize(
  kernel: Float[np.ndarray, "D_in D_out"],
  ranks: Sequence[int],
  seed: int,
  roots: Sequence[Float[np.ndarray, "D_in D_in"]] | None = None,
) -> Factors:
  """Return a trained kernel's (down, up), float32, of rank ranks[-1].

  Components that the kernel lacks get random unit columns of `down` and a zero `up`, as a component
  whose factors are both zero gets no gradient.

  Args:
    ranks: ascending active ranks of the rank buckets; without `roots` only the last one counts.
    seed: of the random columns.
    roots: for each bucket, `square_root` of its inputs' second moments.
  """
  kernel = np.asarray(kernel, np.float64)
  columns = np.zeros((kernel.shape[1], 0))
  for bucket, rank in enumerate(ranks if roots else ranks[-1:]):
    rest = kernel - (kernel @ columns) @ columns.T if bucket else kernel
    seen = roots[bucket] @ rest if roots else rest
    columns = np.hstack([columns, _right_vectors(seen, rank - columns.shape[1])])
  down, up = kernel @ columns, columns.T
  norms = np.maximum(np.linalg.norm(down, axis=0), np.finfo(np.float32).tiny)
  down, up = down / np.sqrt(norms), up * np.sqrt(norms)[:, None]
  missing = ranks[-1] - down.shape[1]
  if missing:
    random = np.random.default_rng(seed).standard_normal((len(kernel), missing))
    down = np.hstack([down, random / np.linalg.norm(random, axis=0)])
    up = np.vstack([up, np.zeros((missing, kernel.shape[1]))])
  return down.astype(np.float32), up.astype(np.float32)


def fit(
  trained: Mapping[str, np.ndarray],
  templates: Mapping[str, Any],
  source: str,
) -> dict[str, np.ndarray]:
  """Return trained parameters by path with the layers of a model, whose shapes are `templates`.

  Factors become a kernel by their product, and factors of a larger rank are cut to a prefix.

  Raises:
    UserError: factors have a smaller rank than the model; `source` names them.
  """
  params = {}
  for path, template in templates.items():
    name, _, part = path.rpartition("/")
    if path in trained and part not in ("down", "up"):
      params[path] = trained[path]
    elif part == "kernel":
      params[path] = merge(trained[f"{name}/down"], trained[f"{name}/up"])
    elif part == "down":
      rank, there = template.shape[1], trained[path].shape[1]
      if rank > there:
        raise UserError(
          f"{source} has {name} at rank {there}, and this model needs {rank}: lower "
          "config.rank.ratio, or start from a model of a higher rank"
        )
      params[path], params[f"{name}/up"] = trained[path][:, :rank], trained[f"{name}/up"][:rank]
  return params


def merged(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Return parameters by path with every pair of factors as a kernel."""
  dense = {}
  for path, value in params.items():
    name, _, part = path.rpartition("/")
    if part == "down":
      dense[f"{name}/kernel"] = merge(value, params[f"{name}/up"])
    elif part != "up":
      dense[path] = value
  return dense
