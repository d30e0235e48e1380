"""Penalties on factors: values and gradients against those of the formed product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrdit.model.low_rank import svd_factors
from lrdit.rank.plan import LayerRanks, RankPlan
from lrdit.train import regularizers

KEYS = jax.random.split(jax.random.key(0), 3)
DOWN, UP = jax.random.normal(KEYS[0], (9, 4)), jax.random.normal(KEYS[1], (4, 6))


def product_gradients(of_kernel, down, up):
  """Return the gradients with respect to the factors of a function of their product."""
  return jax.grad(lambda d, u: of_kernel(d @ u), argnums=(0, 1))(down, up)


@pytest.mark.parametrize(
  ("name", "of_kernel"),
  [
    ("frobenius", lambda w: jnp.square(w).sum() / 2),
    ("nuclear", lambda w: jnp.linalg.svd(w, compute_uv=False)[:4].sum()),
  ],
)
def test_a_norm_of_the_product_needs_no_product(name, of_kernel):
  penalty = regularizers.REGULARIZERS[name]
  assert float(penalty(DOWN, UP)) == pytest.approx(float(of_kernel(DOWN @ UP)), rel=1e-5)
  got = jax.grad(penalty, argnums=(0, 1))(DOWN, UP)
  for a, b in zip(got, product_gradients(of_kernel, DOWN, UP), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
  wide = jax.make_jaxpr(penalty)(jnp.zeros((9, 4)), jnp.zeros((4, 6)))
  assert "[9,6]" not in str(wide)


def test_the_nuclear_norm_has_a_finite_gradient_where_it_has_corners():
  """At a product of zero, as adaLN begins, where it is zero, and at one of a lower rank."""
  lower = DOWN.at[:, 3].set(DOWN[:, 2])
  for down, up in ((DOWN, jnp.zeros_like(UP)), (lower, UP)):
    value, grads = jax.value_and_grad(regularizers.nuclear, argnums=(0, 1))(down, up)
    exact = np.linalg.svd(np.asarray(down @ up), compute_uv=False).sum()
    assert float(value) == pytest.approx(exact, rel=1e-4, abs=1e-5)
    assert all(np.isfinite(grad).all() for grad in grads)
    assert up.any() or not any(grad.any() for grad in grads)


def test_orthogonality_is_zero_after_the_svd_whatever_the_lengths():
  down, up = svd_factors(KEYS[2], 9, 6, 4, jax.nn.initializers.xavier_uniform())
  assert float(regularizers.orthogonality(3 * down, up)) == pytest.approx(0, abs=1e-8)
  turned = down.at[:, 0].add(down[:, 1])
  expected = 2 * float(down[:, 1] @ down[:, 1]) ** 2  # of the pair, in both orders
  assert float(regularizers.orthogonality(turned, up)) == pytest.approx(expected, rel=1e-4)


def test_weights_multiply_and_layers_add():
  params = {name: {"down": DOWN, "up": UP, "bias": jnp.ones(6)} for name in ("a", "b")}
  plan = RankPlan(10, ((0, 0),), tuple((name, LayerRanks(4, (4,))) for name in params))
  zeros = jax.tree.map(jnp.zeros_like, params)
  weights = (("frobenius", 0.5), ("orthogonality", 2.0))
  values, grads = regularizers.add_penalties(zeros, params, plan, weights)
  assert float(values["penalty_frobenius"]) == pytest.approx(2 * regularizers.frobenius(DOWN, UP))
  of_pair = [jax.grad(p, 1)(DOWN, UP) for p in (regularizers.frobenius, regularizers.orthogonality)]
  np.testing.assert_allclose(grads["b"]["up"], 0.5 * of_pair[0] + 2 * of_pair[1], rtol=1e-5)
  assert (grads["a"]["bias"] == 0).all()
