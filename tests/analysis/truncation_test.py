"""Cutting layers to a rank, dense and low-rank."""

import jax
import numpy as np
import pytest

from lrdit.analysis import truncation
from lrdit.analysis.unit_cache import UnitCache
from lrdit.evaluation.held_out import HeldOutLosses
from lrdit.experiment import Experiment
from lrdit.model import low_rank
from tests.tiny import DEEPER, tiny_config
from tests.trained import noisy_params

NAME = "blocks_1/attn/qkv"


def layer(params, name=NAME):
  for part in name.split("/"):
    params = params[part]
  return params


@pytest.mark.parametrize("name", [NAME, "blocks_1/attn/proj", "blocks_1/mlp/fc2"])  # wide to tall
@pytest.mark.parametrize("rank", [1, 5, 31])
def test_a_dense_kernel_becomes_its_best_approximation(rank, name):
  config = tiny_config("method=full", **DEEPER)
  params = jax.device_get(noisy_params(config))
  cut = truncation.Truncator(params, Experiment(config).factorized_layers).cut(rank)
  got, kernel = layer(cut, name)["kernel"], np.asarray(layer(params, name)["kernel"], np.float64)
  sigma = np.linalg.svd(kernel, compute_uv=False)
  assert np.linalg.matrix_rank(got.astype(np.float64), tol=1e-4) == rank
  # Eckart and Young: no matrix of the rank is nearer.
  assert np.linalg.norm(kernel - got) == pytest.approx(np.sqrt(np.square(sigma[rank:]).sum()), 1e-5)
  dense = "final_layer/linear"  # which no arm factorizes
  np.testing.assert_array_equal(layer(cut, dense)["kernel"], layer(params, dense)["kernel"])


def test_a_low_rank_layer_keeps_its_first_components():
  """The model cut to a bucket's ranks is the sliced model of that bucket."""
  config = tiny_config("method=adaptive", **DEEPER)
  params, plan = jax.device_get(noisy_params(config)), Experiment(config).plan
  names = [NAME]
  rank = plan.by_name[NAME].active[0]
  got = layer(truncation.Truncator(params, names).cut(rank))
  sliced = layer(low_rank.slice_params(params, plan, 0))
  np.testing.assert_allclose(
    got["down"] @ got["up"], sliced["down"] @ sliced["up"], rtol=1e-5, atol=1e-6
  )
  assert not got["up"][rank:].any()
  assert layer(params)["up"][rank:].any()  # the given parameters are left alone


@pytest.mark.parametrize("method", ["full", "adaptive"])
def test_nothing_is_cut_at_the_largest_rank(method):
  config = tiny_config(f"method={method}", **DEEPER)
  params = jax.device_get(noisy_params(config))
  truncator = truncation.Truncator(params, Experiment(config).factorized_layers)
  placed = []
  cut = truncator.cut(truncator.largest_rank, lambda values: placed.append(values) or values)
  jax.tree.map(np.testing.assert_array_equal, cut, params)
  assert len(placed) == len(jax.tree.leaves(params))


def test_rises_are_over_the_whole_model_and_are_kept(tmp_path):
  config = tiny_config("method=full", **DEEPER)
  params = jax.device_get(noisy_params(config))
  truncator = truncation.Truncator(params, Experiment(config).factorized_layers)
  asked = []

  def losses_of(cut):
    kernel = layer(cut)["kernel"]
    asked.append(np.linalg.matrix_rank(kernel, tol=1e-4))
    return HeldOutLosses(np.array([asked[-1], 0.0]), np.array([2, 0]))

  for _ in range(2):
    cache = UnitCache(tmp_path / "cache", {"of": "these"})
    found = truncation.analyze_truncation(truncator, (4, 16), np.asarray, losses_of, cache)
    assert asked == [32, 4, 16]  # once
    assert found == {
      "ranks": [4, 16],
      "largest_rank": 32,
      "baseline": [16.0, None],
      "loss": [[2.0, None], [8.0, None]],
      "rise": [[-14.0, None], [-8.0, None]],
    }


def test_default_ranks_rise_and_stay_below_the_largest():
  assert truncation.default_ranks(384) == (12, 24, 48, 72, 96, 144, 192, 240, 288, 336)
  assert truncation.default_ranks(8) == (1, 2, 3, 4, 5, 6, 7)
