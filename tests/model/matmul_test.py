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


def test_other_platforms_choose_for_themselves():
  gradient, b = gradient_of_b(96, 8)
  counts = {
    platform: gradient.trace(b).lower(lowering_platforms=(platform,)).as_text().count("barrier")
    for platform in ("cpu", "cuda", "tpu")
  }
  assert counts == {"cpu": 2, "cuda": 0, "tpu": 0}
