"""What a GPU may change, on whatever device the tests run on.

`LRDIT_TEST_PLATFORM=cuda python -m pytest -m gpu` runs these, and the tests marked `gpu`
in other files, on a GPU.

Axes: B batch, N tokens, D width.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrdit.experiment import Experiment
from lrdit.model import dit, low_rank
from lrdit.modes import train
from tests import tiny
from tests.tiny import tiny_config
from tests.trained import assert_same_run, noisy_params

pytestmark = pytest.mark.gpu

# A width whose heads cuDNN's kernel takes.
FUSED = {"model__hidden_size": 64, "model__num_heads": 2, "model__dtype": "bfloat16"}
# Compiled often.


def relative_error(got, expected):
  """Norm of the difference of two trees over the norm of the second, in float64."""
  got, expected = (
    np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])
    for tree in (got, expected)
  )
  assert np.isfinite(got).all()
  return np.linalg.norm(got - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("head_width", [64, 72])
def test_fused_attention_is_plain_attention(head_width):
  if dit.choose_attention(jax.devices(), jnp.bfloat16, head_width) is not dit.fused_attention:
    pytest.skip("cuDNN's kernel is not there")
  num_heads = 6
  keys = jax.random.split(jax.random.key(0), 2)
  qkv = 2 * jax.random.normal(keys[0], (4, 256, 3 * num_heads * head_width))
  weight = jax.random.normal(keys[1], (4, 256, num_heads * head_width))

  def output_and_gradient(attention, dtype):
    def weighted(qkv):
      out = attention(qkv, num_heads).astype(jnp.float32)
      return (weight * out).sum(), out

    # Both get the rounded input, so that only the computation differs.
    rounded = qkv.astype(jnp.bfloat16).astype(dtype)
    gradient, out = jax.jit(jax.grad(weighted, has_aux=True))(rounded)
    return [out, gradient]

  expected = output_and_gradient(dit.plain_attention, jnp.float32)
  for attention in (dit.plain_attention, dit.fused_attention):
    for got, exact in zip(output_and_gradient(attention, jnp.bfloat16), expected, strict=True):
      assert relative_error(got, exact) < 0.01


@pytest.mark.parametrize("arm", ["full", "adaptive"])
def test_bfloat16_is_float32_rounded(arm):
  def output_and_gradient(dtype):
    config = tiny_config(f"method={arm}", **FUSED | {"model__dtype": dtype})
    model, params = Experiment(config).model(jax.devices()[:1]), noisy_params(config)
    x = jax.random.normal(jax.random.key(0), (8, 8, 8, 1))
    t, y = jnp.arange(8) * 120, jnp.arange(8)

    def loss(params):
      out = model.apply({"params": params}, x, t, y, low_rank.RankSelection())
      return jnp.square(out - x).mean(), out

    gradient, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    return [out, gradient]

  halves, wholes = output_and_gradient("bfloat16"), output_and_gradient("float32")
  for half, whole in zip(halves, wholes, strict=True):
    assert 0 < relative_error(half, whole) < 0.03


@pytest.mark.slow  # on a CPU: there the command line's tests hold it
def test_two_runs_are_equal_and_a_resumed_one_is_too(tmp_path):
  """To the bit, with compilations of their own."""
  runs = {"once": [8], "again": [8], "resumed": [4, 8]}
  devices = jax.devices()[:1]
  for name, stops in runs.items():
    for num_steps in stops:
      train.train(tiny_config(**FUSED, training__num_steps=num_steps), tmp_path / name, devices)
      jax.clear_caches()
  for one, other in itertools.pairwise(runs):
    assert_same_run(tmp_path / one, tmp_path / other, **FUSED)
  losses = [tiny.losses(tmp_path / name) for name in runs]
  assert len(set(losses[0])) == 8 and losses[0] == losses[1] == losses[2]
