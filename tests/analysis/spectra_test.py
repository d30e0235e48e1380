"""Every measure against plain numpy in float64 on matrices of known spectrum."""

import numpy as np
import pytest
import scipy.linalg

from lrdit.analysis import spectra

pytestmark = pytest.mark.floats

SPECTRA = {
  "geometric": lambda k: 0.7 ** np.arange(k),
  "power": lambda k: 3.0 / (1 + np.arange(k)) ** 1.5,
  "flat": lambda k: np.full(k, 2.5),
  "one": lambda k: np.eye(1, k)[0],
  "tiny_tail": lambda k: np.where(np.arange(k) < 3, 5.0, 1e-7),
}
SHAPES = [(24, 24), (40, 17), (13, 50), (1, 9), (6, 1)]


def orthonormal(rng, rows, columns):
  return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def of_spectrum(shape, sigma, seed=0):
  """A random matrix of these singular values."""
  rng = np.random.default_rng(seed)
  k = len(sigma)
  return orthonormal(rng, shape[0], k) * sigma @ orthonormal(rng, shape[1], k).T


def reference(sigma):
  """The definitions, term by term."""
  energy = sorted((float(s) ** 2 for s in sigma), reverse=True)
  p = [float(s) / float(sum(sigma)) for s in sigma]
  found = {
    "stable_rank": sum(energy) / energy[0],
    "entropy_rank": np.exp(-sum(x * np.log(x) for x in p if x > 0)),
  }
  for percent in (90, 95, 99):
    k = next(k for k in range(1, len(energy) + 1) if sum(energy[:k]) >= percent / 100 * sum(energy))
    found[f"energy_rank_{percent}"] = k
  return found


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [name for name in SPECTRA if name != "flat"])
def test_measures_are_those_of_the_known_spectrum(name, shape, dtype):
  known = SPECTRA[name](min(shape))
  matrix = of_spectrum(shape, known).astype(dtype)
  sigma = spectra.singular_values(matrix)
  # Storing in float32 is itself an error of the matrix: the reference takes the stored one.
  true = known if dtype == np.float64 else scipy.linalg.svdvals(matrix.astype(np.float64))
  assert sigma.dtype == np.float64
  np.testing.assert_allclose(sigma, true, rtol=1e-6, atol=1e-12 * true[0])
  found, expected = spectra.measures(sigma), reference(true)
  assert tuple(found) == spectra.MEASURES == tuple(expected)
  assert found == pytest.approx(expected, rel=1e-6)


def test_float32_input_is_computed_in_float64():
  matrix = of_spectrum((30, 20), 10.0 ** -np.arange(20.0)).astype(np.float32)
  exact = scipy.linalg.svdvals(matrix.astype(np.float64))
  np.testing.assert_allclose(spectra.singular_values(matrix), exact, rtol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 7, 10, 19, 20])
@pytest.mark.parametrize("shape", [(20, 20), (64, 20), (33, 60)])
def test_ranks_are_exact_on_matrices_of_that_rank(shape, rank):
  sigma = spectra.singular_values(of_spectrum(shape, np.full(rank, 0.3), seed=rank))
  found = spectra.measures(sigma)
  assert found["entropy_rank"] == pytest.approx(rank, rel=1e-12)
  assert found["stable_rank"] == pytest.approx(rank, rel=1e-12)
  # Integers: 0.9 * 10 in floating point is not a reference. At rank 10 and 20 a share is met
  # exactly by the 9th and by the 18th and 19th value.
  for percent in (90, 95, 99):
    assert found[f"energy_rank_{percent}"] == -(-percent * rank // 100)


def test_a_share_that_is_met_but_for_rounding_is_met():
  rng = np.random.default_rng(6)
  for rank in (10, 20, 100, 300):
    sigma = -np.sort(-rng.uniform(0.1, 9) * (1 + 1e-15 * rng.standard_normal((50, rank))))
    for percent in (90, 95):  # at rank 10 the latter is not met exactly
      found = {spectra.energy_rank(row, percent / 100) for row in sigma}
      assert found == {-(-percent * rank // 100)}


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_ranks_do_not_depend_on_the_scale(scale):
  sigma = SPECTRA["power"](15)
  assert spectra.measures(scale * sigma) == pytest.approx(spectra.measures(sigma), rel=1e-12)


def test_energy_rank_counts_squares():
  # Of 100 the squares hold 90 and 10; of 4 the values hold 3 and 1.
  assert spectra.energy_rank(np.sqrt([90.0, 10.0]), 0.90) == 1
  assert spectra.energy_rank(np.sqrt([89.9, 10.1]), 0.90) == 2
  assert spectra.energy_rank(np.ones(8), 1.0) == 8


@pytest.mark.parametrize("shape", [(5, 3), (1, 1)])
def test_zeros_have_rank_0(shape):
  found = spectra.measures(spectra.singular_values(np.zeros(shape, np.float32)))
  assert found == dict.fromkeys(spectra.MEASURES, 0)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("dims", [(40, 6, 30), (6, 9, 30), (30, 9, 6), (5, 5, 5), (8, 1, 3)])
def test_a_products_spectrum_without_the_product(dims, dtype):
  m, r, n = dims
  rng = np.random.default_rng(1)
  left = (rng.standard_normal((m, r)) * 0.5 ** np.arange(r)).astype(dtype)
  right = rng.standard_normal((r, n)).astype(dtype)
  sigma = spectra.product_singular_values(left, right)
  product = left.astype(np.float64) @ right.astype(np.float64)
  exact = scipy.linalg.svdvals(product)
  assert sigma.shape == (min(dims),) and sigma.dtype == np.float64
  np.testing.assert_allclose(sigma, exact[: min(dims)], rtol=1e-6)
  assert spectra.measures(sigma) == pytest.approx(reference(exact), rel=1e-6)


def test_a_products_spectrum_is_the_known_one():
  rng = np.random.default_rng(2)
  known = 0.4 ** np.arange(12)
  u, v = orthonormal(rng, 50, 12), orthonormal(rng, 35, 12)
  mixing = np.eye(12) + 0.2 * rng.standard_normal((12, 12))
  left, right = u * known @ mixing, np.linalg.inv(mixing) @ v.T
  np.testing.assert_allclose(spectra.product_singular_values(left, right), known, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(("m", "r"), [(30, 5), (9, 8), (12, 1)])
def test_cosines_are_those_of_scipys_angles(m, r, dtype):
  rng = np.random.default_rng(3)
  a, b = (orthonormal(rng, m, r).astype(dtype) for _ in range(2))
  cosines = spectra.principal_angle_cosines(a, b)
  angles = scipy.linalg.subspace_angles(a.astype(np.float64), b.astype(np.float64))
  # scipy's are descending angles of orthonormalised columns; float32 ones are not quite so.
  tolerance = 1e-12 if dtype == np.float64 else 1e-6
  np.testing.assert_allclose(cosines, np.cos(angles[::-1]), rtol=0, atol=tolerance)


def test_cosines_of_known_angles():
  basis = orthonormal(np.random.default_rng(4), 10, 10)
  angles = np.array([0.0, 0.3, 1.1, np.pi / 2])
  a = basis[:, :4]
  b = basis[:, :4] * np.cos(angles) + basis[:, 4:8] * np.sin(angles)
  np.testing.assert_allclose(spectra.principal_angle_cosines(a, b), np.cos(angles), atol=1e-12)
  assert spectra.principal_angle_cosines(a, a).max() <= 1


def test_a_random_subspace_holds_r_of_m():
  rng = np.random.default_rng(5)
  shares = [
    np.square(
      spectra.principal_angle_cosines(orthonormal(rng, 20, 4), orthonormal(rng, 20, 4))
    ).mean()
    for _ in range(400)
  ]
  assert np.mean(shares) == pytest.approx(4 / 20, abs=0.01)


def test_left_singular_vectors_are_those_of_the_decomposition():
  matrix = np.random.default_rng(0).standard_normal((5, 9)).astype(np.float32)
  sigma, vectors = spectra.left_singular_vectors(matrix)
  u, expected, _ = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
  np.testing.assert_allclose(sigma, expected, rtol=1e-12)
  np.testing.assert_allclose(np.abs(vectors.T @ u), np.eye(5), atol=1e-12)
  sigma, vectors = spectra.left_singular_vectors(np.zeros((2, 3)))
  assert not sigma.any()
  np.testing.assert_allclose(vectors.T @ vectors, np.eye(2), atol=1e-12)
