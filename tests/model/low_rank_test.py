import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import initializers

from lrdit.model import low_rank
from lrdit.rank.plan import LayerRanks, RankPlan

pytestmark = pytest.mark.floats

ACTIVE = (2, 5, 8)
RANKS = LayerRanks(5, ACTIVE)
B, N, D_IN, D_OUT = 6, 3, 12, 10
BUCKETS = np.array([2, 2, 1, 1, 0, 0], np.int32)


def factors(seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  shapes = ((D_IN, 8), (8, D_OUT), (B, N, D_IN))
  return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def reference(x, down, up, ranks):
  """Compute the layer in float64, one example at a time."""
  x, down, up = (np.asarray(a, np.float64) for a in (x, down, up))
  return np.stack([x[i] @ down[:, :r] @ up[:r] for i, r in enumerate(ranks)])


COMPUTES = {
  "masked": ((6, 2),),
  "grouped exactly": ((2, 2), (2, 1), (2, 0)),
  "grouped with a mask inside": ((3, 2), (3, 1)),
}


def multiply(x, down, up, groups, buckets=BUCKETS):
  """Apply the layer of these factors to each group."""
  module = low_rank.LowRankDense(D_OUT, ACTIVE)
  params = {"down": down, "up": up, "bias": jnp.zeros(D_OUT)}

  def apply(selection, x):
    return module.apply({"params": params}, x, selection)

  return low_rank.apply_by_group(apply, groups, jnp.asarray(buckets), x)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", COMPUTES.values(), ids=COMPUTES.keys())
@pytest.mark.parametrize("with_tokens", [True, False])
def test_every_compute_uses_each_example_s_rank(groups, with_tokens):
  down, up, x = factors()
  x = x if with_tokens else x[:, 0]
  y = multiply(x, down, up, groups)
  expected = reference(x, down, up, np.asarray(ACTIVE)[BUCKETS])
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("bucket", range(3))
def test_sliced_equals_masked(bucket):
  down, up, x = factors()
  rank = ACTIVE[bucket]
  sliced = low_rank.low_rank_matmul(x, down[:, :rank], up[:rank])
  masked = low_rank.low_rank_matmul(x, down, up, jnp.full(B, rank))
  np.testing.assert_allclose(sliced, masked, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", COMPUTES.values(), ids=COMPUTES.keys())
def test_inactive_components_get_exactly_zero_gradient(groups):
  down, up, x = factors()
  buckets = np.minimum(BUCKETS, 1)
  groups = tuple((size, min(bucket, 1) if len(groups) > 1 else bucket) for size, bucket in groups)

  def loss(down, up):
    return jnp.square(multiply(x, down, up, groups, buckets)).sum()

  d_down, d_up = jax.grad(loss, argnums=(0, 1))(down, up)
  assert (d_down[:, 5:] == 0).all()
  assert (d_up[5:] == 0).all()
  assert (jnp.abs(d_down[:, :5]) > 0).all()
  assert (jnp.abs(d_up[:5]) > 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("groups", list(COMPUTES.values())[1:], ids=list(COMPUTES)[1:])
def test_gradients_do_not_depend_on_the_groups(groups):
  down, up, x = factors()

  def loss(x, down, up, groups):
    return jnp.sin(multiply(x, down, up, groups)).sum()

  gradient = jax.grad(loss, argnums=(0, 1, 2))
  for got, expected in zip(
    gradient(x, down, up, groups), gradient(x, down, up, COMPUTES["masked"]), strict=True
  ):
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_every_prefix_of_the_factors_is_the_best_approximation():
  key = jax.random.key(1)
  down, up = low_rank.svd_factors(key, D_IN, D_OUT, 8, low_rank.XAVIER)
  kernel = np.asarray(low_rank.XAVIER(key, (D_IN, D_OUT), jnp.float32))
  singular = np.linalg.svd(kernel, compute_uv=False)
  for rank in (1, 4, 8):
    error = np.linalg.norm(kernel - np.asarray(down[:, :rank] @ up[:rank]))
    assert error == pytest.approx(np.sqrt((singular[rank:] ** 2).sum()), rel=1e-4)
  np.testing.assert_allclose(np.linalg.norm(down, axis=0), np.sqrt(singular[:8]), rtol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(up, axis=1), np.sqrt(singular[:8]), rtol=1e-5)


def layer(kernel_init):
  module = low_rank.LowRankDense(D_OUT, ACTIVE, kernel_init=kernel_init)
  x = factors()[2]
  return module, module.init(jax.random.key(0), x, low_rank.RankSelection()), x


def constant_columns(key, shape, dtype):
  """Return a kernel of rank one."""
  del key
  return jnp.broadcast_to(jnp.arange(1, shape[1] + 1, dtype=dtype) / 10, shape)


@pytest.mark.parametrize(
  "kernel_init",
  [
    initializers.zeros,
    initializers.zeros_init(),
    initializers.constant(0.0),
    lambda key, shape, dtype: 0 * initializers.ones(key, shape, dtype),
    constant_columns,
  ],
  ids=["zeros", "zeros_init()", "constant(0.)", "lambda", "rank one"],
)
def test_a_layer_starts_at_its_kernel_and_every_component_can_learn(kernel_init):
  module, variables, x = layer(kernel_init)
  selection = low_rank.RankSelection(2)
  kernel = kernel_init(None, (D_IN, D_OUT), jnp.float32)
  got = module.apply(variables, x, selection)
  np.testing.assert_allclose(got, x @ kernel, rtol=0, atol=1e-5)
  if not kernel.any():
    assert (got == 0).all()
  # Every component's `up` has a gradient.
  grads = jax.grad(lambda v: (module.apply(v, x, selection) * x[..., :1]).sum())(variables)
  size = jnp.abs(grads["params"]["up"]).sum(axis=1)
  assert (size > 1e-2 * size.max()).all()


def test_a_zero_kernel_is_recognized_under_jit():
  x = factors()[2]
  module = low_rank.LowRankDense(D_OUT, ACTIVE, kernel_init=initializers.constant(0.0))
  variables = jax.jit(lambda key: module.init(key, x, low_rank.RankSelection()))(jax.random.key(0))
  assert variables["params"]["down"].any(axis=0).all()
  assert not variables["params"]["up"].any()


def test_slicing_keeps_the_prefix_and_shares_the_rest():
  module, variables, x = layer(low_rank.XAVIER)
  params = {"a": variables["params"], "b": {"kernel": jnp.ones(2)}}
  plan = RankPlan(10, ((0, 2), (3, 1), (6, 0)), (("a", RANKS),))
  for bucket in range(3):
    sliced = low_rank.slice_params(params, plan, bucket)
    assert sliced["a"]["down"].shape == (D_IN, ACTIVE[bucket])
    assert sliced["b"]["kernel"] is params["b"]["kernel"]
    small = low_rank.LowRankDense(D_OUT, plan.at_bucket(bucket).by_name["a"].active)
    np.testing.assert_allclose(
      small.apply({"params": sliced["a"]}, x, low_rank.RankSelection()),
      module.apply(variables, x, low_rank.RankSelection(bucket)),
      rtol=1e-5,
      atol=1e-6,
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_products_keep_float32_parameters_and_the_inputs_dtype(dtype):
  x = factors()[2]
  for module in (
    low_rank.LowRankDense(D_OUT, ACTIVE, dtype=jnp.bfloat16),
    low_rank.Dense(D_OUT, dtype=jnp.bfloat16),
  ):
    variables = module.init(jax.random.key(0), x, low_rank.RankSelection())
    assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert module.apply(variables, x.astype(dtype), low_rank.RankSelection()).dtype == dtype


class LowRankMlp(nn.Module):
  """A user's own model, without a plan."""

  rank: int | tuple[int, ...]

  @nn.compact
  def __call__(self, x, selection=None):
    x = nn.relu(low_rank.LowRankDense(16, rank=self.rank)(x, selection))
    return low_rank.LowRankDense(4, rank=3)(x)


def test_the_layer_works_in_any_flax_model():
  x, model = factors()[2], LowRankMlp(ACTIVE)
  variables = model.init(jax.random.key(0), x)
  apply = jax.jit(model.apply)
  everything = apply(variables, x)
  assert everything.shape == (B, N, 4)
  np.testing.assert_allclose(apply(variables, x[:, 0]), everything[:, 0], rtol=1e-5, atol=1e-6)
  # Without a selection all ranks are active, as in a model with a single rank.
  for same in (
    apply(variables, x, low_rank.RankSelection(2)),
    jax.jit(LowRankMlp(ACTIVE[-1]).apply)(variables, x),
  ):
    np.testing.assert_array_equal(everything, same)
  # Each example has its own rank.
  least = apply(variables, x, low_rank.RankSelection())
  mixed = apply(variables, x, low_rank.RankSelection(2, jnp.asarray(BUCKETS)))
  assert np.abs(least - everything).max() > 1e-3
  np.testing.assert_allclose(mixed[:2], everything[:2], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(mixed[4:], least[4:], rtol=1e-5, atol=1e-6)


def test_a_rank_above_the_dimensions_is_refused():
  with pytest.raises(ValueError, match="rank 17 is above min"):
    low_rank.LowRankDense(16, rank=17).init(jax.random.key(0), jnp.ones((2, 32)))
