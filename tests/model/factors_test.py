"""Kernels as factors: the best cut at every rank, of the kernel or of the outputs."""

import numpy as np
import pytest

from lrdit.model import factors
from lrdit.runtime.errors import UserError

RANKS = (3, 5, 8)


def kernel_of(dim_in, dim_out, seed=0):
  return np.random.default_rng(seed).standard_normal((dim_in, dim_out)).astype(np.float32)


def inputs_of(dim_in, seed):
  """Inputs whose directions differ in variance by a factor of a thousand."""
  rng = np.random.default_rng(seed)
  mix = np.linalg.qr(rng.standard_normal((dim_in, dim_in)))[0]
  return rng.standard_normal((400, dim_in)) * np.geomspace(1, 0.03, dim_in) @ mix


def error(kernel, pair, rank, inputs=None):
  down, up = pair
  rest = kernel - down[:, :rank] @ up[:rank]
  return np.linalg.norm(rest if inputs is None else inputs @ rest)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (12, 12)])
def test_every_prefix_is_the_best_cut(shape):
  kernel = kernel_of(*shape)
  pair = factors.factorize(kernel, RANKS, 0)
  sigma = np.linalg.svd(kernel, compute_uv=False)
  for rank in range(1, 9):
    assert error(kernel, pair, rank) == pytest.approx(np.linalg.norm(sigma[rank:]), rel=1e-4)
  np.testing.assert_allclose(
    np.linalg.norm(pair[0], axis=0), np.linalg.norm(pair[1], axis=1), rtol=1e-4
  )


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_the_whitened_cut_is_best_for_the_outputs(shape):
  kernel, inputs = kernel_of(*shape), inputs_of(shape[0], 1)
  root = factors.square_root(inputs.T @ inputs / len(inputs))
  plain = factors.factorize(kernel, (8,), 0)
  whitened = factors.factorize(kernel, (8,), 0, [root])
  best = np.linalg.norm(np.linalg.svd(inputs @ kernel, compute_uv=False)[8:])
  assert error(kernel, whitened, 8, inputs) < 1.1 * best
  assert error(kernel, plain, 8, inputs) > 2 * best


def test_each_bucket_chooses_for_its_own_inputs():
  kernel, inputs = kernel_of(20, 12), [inputs_of(20, seed) for seed in range(3)]
  roots = [factors.square_root(x.T @ x / len(x)) for x in inputs]
  pair = factors.factorize(kernel, RANKS, 0, roots)
  alone = factors.factorize(kernel, (3,), 0, roots[:1])
  np.testing.assert_allclose(pair[0][:, :3], alone[0], atol=1e-6)  # the first bucket's own cut
  swapped = factors.factorize(kernel, RANKS, 0, roots[::-1])
  assert error(kernel, pair, 3, inputs[0]) < error(kernel, swapped, 3, inputs[0])


@pytest.mark.parametrize("rank", [0, 2])
def test_components_that_a_kernel_lacks_still_learn(rank):
  kernel = kernel_of(12, 20) @ np.diag(np.ones(20))
  u, s, vt = np.linalg.svd(kernel, full_matrices=False)
  kernel = ((u[:, :rank] * s[:rank]) @ vt[:rank]).astype(np.float32)
  down, up = factors.factorize(kernel, RANKS, 0)
  np.testing.assert_allclose(down @ up, kernel, atol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(down[:, rank:], axis=0), 1, rtol=1e-5)
  assert not up[rank:].any()


def test_the_rank_by_energy_is_the_least_that_keeps_it():
  kernel, root = kernel_of(20, 24), np.diag(np.geomspace(1, 0.01, 20))
  for seen, given in ((kernel, None), (root @ kernel, root)):
    held = np.cumsum(np.linalg.svd(seen.astype(np.float64), compute_uv=False) ** 2)
    for energy in (0.2, 0.4, 0.6):
      rank = factors.rank_by_energy(kernel, energy, 1, given)
      assert held[rank - 1] >= energy * held[-1] > (held[rank - 2] if rank > 1 else 0)
      assert factors.rank_by_energy(kernel, energy, 4, given) == -(-rank // 4) * 4
  assert factors.rank_by_energy(kernel, 0.99, 1) == 0  # factors of rank 11 are larger than it
  assert factors.rank_by_energy(0 * kernel, 0.9, 4) == 4


def test_factors_are_cut_to_a_prefix_or_merged():
  down, up, bias = kernel_of(12, 8), kernel_of(8, 20), np.ones(20, np.float32)
  trained = {"a/down": down, "a/up": up, "a/bias": bias}
  cut = factors.fit(trained, {"a/down": down[:, :3], "a/up": up[:3], "a/bias": bias}, "x")
  np.testing.assert_array_equal(cut["a/down"], down[:, :3])
  np.testing.assert_array_equal(cut["a/up"], up[:3])
  dense = factors.fit(trained, {"a/kernel": down @ up, "a/bias": bias}, "x")
  assert dense.keys() == factors.merged(trained).keys() == {"a/kernel", "a/bias"}
  np.testing.assert_allclose(dense["a/kernel"], down @ up, rtol=1e-5)
  larger = {"a/down": kernel_of(12, 9), "a/up": kernel_of(9, 20), "a/bias": bias}
  with pytest.raises(UserError, match="x has a at rank 8, and this model needs 9"):
    factors.fit(trained, larger, "x")
