"""Matrix product in the operand dtype and layouts that the device multiplies fast.

Axes: M rows, K contracted, N columns; any equal leading axes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lrdit.model.materialize import materialize


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(
  a: Float[Array, "*B M K"], b: Float[Array, "*B K N"], dtype: Any = None
) -> Float[Array, "*B M N"]:
  """Return a @ b for operands of one dtype, which the result and the gradients have too.

  The gradient of `b` contracts the rows M, so one operand has to be transposed. On a CPU, XLA's
  products take up to 1.7 times as long if that is the wider one (9.2 against 5.4 ms for 4,096 rows
  and 153 and 1,536 columns), and longer still if they transpose it as they go. This gradient
  transposes the narrower one beforehand, and then the small result. Other platforms choose for
  themselves.

  Args:
    dtype: to which operands, and gradients before their own products, are rounded; None for no
      rounding. Sums are float32 in any case.
  """
  return _forward(a, b, dtype)[0]


def _forward(a, b, dtype):
  operands = a.astype(dtype or a.dtype), b.astype(dtype or b.dtype)
  return _product(*operands, a.dtype), operands


def _backward(_dtype, operands, gradient):
  a, b = operands
  result = gradient.dtype
  gradient = gradient.astype(a.dtype)
  if gradient.shape[-1] < a.shape[-1]:
    d_b = materialize(_product(materialize(gradient.mT), a, result)).mT
  else:
    d_b = materialize(_product(materialize(a.mT), gradient, result))
  return _product(gradient, b.mT, result), d_b


def _product(a: Array, b: Array, result: Any) -> Array:
  """Return a @ b in dtype `result`."""
  if a.dtype != jnp.bfloat16:
    return jnp.matmul(a, b, preferred_element_type=result)
  # XLA multiplies bfloat16 on a CPU in this layout alone. It converts others back to float32, or
  # fails where it found the layout later, such as that of a result whose transpose is wanted.
  return materialize(jnp.matmul(materialize(a), materialize(b), preferred_element_type=result))


matmul.defvjp(_forward, _backward)
