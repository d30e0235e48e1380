"""Newton-Schulz steps for stacks of matrices, on their Gram matrices where that is cheaper.

A step is X <- (a I + b A + c A A) X with A = X X^T (Jordan 2024). Steps in a row are one product
Q X, where Q and every later A are polynomials of the first A. Only the first and the last product
of such a run touch the long side of X. A run of one step is what optax computes.

Axes: S stack, M short side, N long side.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# A singular value s of X is s * s in A, so rounding errors grow with every step that does not
# begin with X. Runs of 2 and 3 steps stay within 1e-4 of single ones, a run of 5 within 1e-3.
LONGEST_RUN = 3


def orthogonalize(x: Float[Array, "S P Q"], steps: int) -> Float[Array, "S P Q"]:
  """Return matrices of Frobenius norm 1 with singular values near 1 instead of their own."""
  is_tall = x.shape[1] > x.shape[2]
  x = x.mT if is_tall else x
  for run in runs_of(*x.shape[1:], steps):
    x = _run_of_steps(x @ x.mT, run) @ x
  return x.mT if is_tall else x


def _run_of_steps(gram: Float[Array, "S M M"], steps: int) -> Float[Array, "S M M"]:
  """Return the product Q of consecutive steps from their first Gram matrix."""
  a, b, c = COEFFICIENTS
  identity, product = jnp.eye(gram.shape[-1], dtype=gram.dtype), None
  for step in range(steps):
    polynomial = a * identity + b * gram + c * (gram @ gram)
    product = polynomial if product is None else product @ polynomial
    if step < steps - 1:
      gram = gram @ polynomial @ polynomial
  return product


def runs_of(short: int, long: int, steps: int) -> Sequence[int]:
  """Return the lengths of the cheapest runs that make up the steps, shorter ones first."""
  splits = {
    longest: sorted(map(len, np.array_split(range(steps), -(-steps // longest))))
    for longest in range(1, LONGEST_RUN + 1)
  }
  return min(splits.values(), key=lambda runs: _macs_of(short, long, runs))


def _macs_of(short: int, long: int, runs: Sequence[int]) -> int:
  return sum(2 * short * short * long + (4 * run - 3) * short**3 for run in runs)


def macs(short: int, long: int, steps: int) -> int:
  """Return the MACs of the steps for one matrix."""
  return _macs_of(short, long, runs_of(short, long, steps))
