"""Arrays that XLA stores on a CPU, where it would compute them again for every use."""

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float


def materialize(x: Array) -> Array:
  """Return x, which XLA has to compute once and store row by row if it computes on a CPU."""
  layout = Layout(major_to_minor=tuple(range(x.ndim)))

  def on_cpu(x: Array) -> Array:
    return jax.lax.optimization_barrier(with_layout_constraint(x, layout))

  return jax.lax.platform_dependent(x, cpu=on_cpu, default=lambda x: x)


@jax.custom_vjp
def materialize_gradient(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """Return x, whose gradient is materialized.

  Between residual blocks this makes the cost of a backward pass linear in the depth. Without it,
  XLA fuses the sum of all later blocks' gradients into most operations of a block on a CPU, and
  computes it again in each: that took a quarter of a training step of DiT-S/2.
  """
  return x


materialize_gradient.defvjp(lambda x: (x, None), lambda _, gradient: (materialize(gradient),))
