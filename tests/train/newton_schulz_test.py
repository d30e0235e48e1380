"""Newton-Schulz steps in runs against single ones and against their polynomial in float64."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lrdit.train import newton_schulz

a, b, c = newton_schulz.COEFFICIENTS


def stack_of(short, long, seed=0):
  """Return two matrices of Frobenius norm 1 whose rows differ in scale by orders of magnitude."""
  generator = np.random.default_rng(seed)
  scale = np.geomspace(1, 1e-3, short)[:, None]
  matrices = generator.normal(size=(2, short, long)) * scale
  return matrices / np.linalg.norm(matrices, axis=(1, 2), keepdims=True)


def expected(x, steps):
  u, s, vt = np.linalg.svd(x, full_matrices=False)
  for _ in range(steps):
    s = a * s + b * s**3 + c * s**5
  return u * s[:, None] @ vt


@pytest.mark.parametrize("shape", [(8, 8), (8, 9), (8, 16), (8, 64)])
@pytest.mark.parametrize("steps", [1, 2, 5, 7])
def test_steps_apply_the_polynomial_to_the_singular_values(shape, steps):
  x = stack_of(*shape)
  wide = newton_schulz.orthogonalize(jnp.asarray(x, "float32"), steps)
  np.testing.assert_allclose(wide, expected(x, steps), atol=2e-4)
  tall = newton_schulz.orthogonalize(jnp.asarray(x, "float32").mT, steps)
  np.testing.assert_allclose(tall.swapaxes(1, 2), wide, atol=2e-4)


def test_the_coefficients_are_those_of_optax():
  state = optax.contrib.scale_by_muon().init(stack_of(6, 7)[0])
  assert np.asarray(state.ns_coeffs) == pytest.approx((a, b, c))


def test_runs_are_taken_where_they_cost_less():
  assert newton_schulz.runs_of(10, 15, 5) == [1] * 5
  assert newton_schulz.runs_of(10, 16, 5) == [2, 3]
  assert newton_schulz.runs_of(10, 100, 7) == [2, 2, 3]
  assert newton_schulz.macs(10, 10, 5) == 5 * 3 * 10**3
  assert newton_schulz.macs(10, 100, 5) == 4 * 10 * 10 * 100 + 14 * 10**3
