import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrdit.model.matmul import matmul

pytestmark = pytest.mark.floats

# The wider operand is the first, the last, or has leading axes.
SHAPES = {"narrow_b": ((), 9, 7, 3), "wide_b": ((), 9, 3, 7), "batched": ((4, 2), 5, 3, 6)}


@pytest.mark.parametrize(("lead", "m", "k", "n"), SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_value_and_gradients_match_the_plain_product(lead, m, k, n, dtype):
  keys = jax.random.split(jax.random.key(0), 3)
  a, b, weight = (
    jax.random.normal(key, (*lead, *shape)).astype(dtype)
    for key, shape in zip(keys, ((m, k), (k, n), (m, n)), strict=True)
  )

  def gradients(product):
    return jax.jit(jax.grad(lambda a, b: (weight * product(a, b)).sum(), (0, 1)))(a, b)

  tolerance = 1e-6 if dtype == jnp.float32 else 2e-2
  plain = [a @ b, *gradients(jnp.matmul)]
  for got, expected in zip([matmul(a, b), *gradients(matmul)], plain, strict=True):
    assert got.dtype == expected.dtype == dtype
    scale = np.abs(np.asarray(expected, np.float32)).max()
    np.testing.assert_allclose(
      np.asarray(got, np.float32), np.asarray(expected, np.float32), atol=tolerance * scale
    )


def gradient_of_b(k, n):
  """The jitted gradient of b, and its argument."""
  a, b = jnp.ones((64, k)), jnp.ones((k, n))
  return jax.jit(jax.grad(lambda b: jnp.square(matmul(a, b)).sum())), b


@pytest.mark.parametrize(("k", "n"), [(96, 8), (8, 96)])
def test_the_narrower_operand_is_transposed(k, n):
  """In XLA's compiled program the gradient of b has the narrow side first, and in memory so."""
  gradient, b = gradient_of_b(k, n)
  text = gradient.lower(b).compile().as_text()
  assert sorted(re.findall(r"(f32\[[\d,]+\])\S* dot\(", text)) == [f"f32[64,{n}]", "f32[8,96]"]
  assert "lhs_contracting_dims={0}" not in text


def rounded(x):
  """x in float64, rounded to bfloat16."""
  return np.asarray(x.astype(jnp.bfloat16), np.float64)


@pytest.mark.parametrize(("lead", "m", "k", "n"), SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("transposed", [False, True])
def test_operands_are_rounded_and_results_are_not(lead, m, k, n, transposed):
  """Also where the second operand and its gradient are transposed, as in attention."""
  keys = jax.random.split(jax.random.key(0), 3)
  a, b, weight = (
    jax.random.normal(key, (*lead, *shape))
    for key, shape in zip(keys, ((m, k), (k, n), (m, n)), strict=True)
  )

  @jax.jit
  def value_and_gradients(a, b):
    def weighted(a, b):
      c = matmul(a, b.mT if transposed else b, jnp.bfloat16)
      return (weight * c).sum(), c

    gradients, c = jax.grad(weighted, (0, 1), has_aux=True)(a, b)
    return c, *gradients

  c, d_a, d_b = value_and_gradients(a, b.mT if transposed else b)
  a, b, weight = map(rounded, (a, b, weight))
  expected = (a @ b, weight @ b.mT, a.mT @ weight)
  for one, other in zip((c, d_a, d_b.mT if transposed else d_b), expected, strict=True):
    assert one.dtype == jnp.float32
    np.testing.assert_allclose(one, other, atol=1e-6 * np.abs(other).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_other_platforms_choose_for_themselves(dtype):
  a, b = jnp.ones((64, 96)), jnp.ones((96, 8))
  gradients = jax.jit(jax.grad(lambda a, b: jnp.square(matmul(a, b, dtype)).sum(), (0, 1)))

  def layouts(platform):
    text = gradients.trace(a, b).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("barrier") == text.count("LayoutConstraint")
    return text.count("barrier")

  # The two factors of three products and their results in bfloat16; the gradient's two copies.
  assert layouts("cpu") == (11 if dtype == jnp.bfloat16 else 2)
  assert layouts("cuda") == layouts("tpu") == 0
