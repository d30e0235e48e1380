"""Encoding and decoding with the Stable Diffusion VAE."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrdit.model import vae, vae_weights
from lrdit.runtime import parallel
from lrdit.runtime.errors import UserError
from tests.tiny import GOLDEN

# Weights and outputs written by diffusers.
TINY = GOLDEN / "sd_vae_tiny"


def random_images(count, side=32):  # as large as the golden images
  return np.random.default_rng(0).uniform(-1, 1, (count, side, side, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def tiny():
  return vae_weights.read_vae(TINY)


@pytest.fixture(scope="module")
def runner(tiny):
  """A runner whose batch size of three divides few numbers of images."""
  return vae.VaeRunner(tiny, jax.devices()[:1], 3)


@pytest.fixture(scope="module")
def wide_runner(tiny):
  return vae.VaeRunner(tiny, jax.devices(), 8)


@pytest.fixture(scope="module")
def golden():
  """Return images, means, log-variances and decoded means, NHWC."""
  with np.load(TINY / "io.npz") as stored:
    names = ("image", "latent_mean", "latent_logvar", "decoded_mean")
    return [stored[name].transpose(0, 2, 3, 1) for name in names]


def test_outputs_match_diffusers(runner, wide_runner, golden):
  images, mean, log_variance, decoded = golden
  for each in (runner, wide_runner):
    encoded = each.encode(images)
    assert encoded.dtype == np.float32
    np.testing.assert_allclose(encoded[:, 0], mean, rtol=0, atol=2e-5)
    np.testing.assert_allclose(encoded[:, 1], log_variance, rtol=0, atol=2e-5)
    output = each.decode(mean)
    assert output.dtype == np.float32
    np.testing.assert_allclose(output, decoded, rtol=0, atol=5e-5)


def test_results_do_not_depend_on_the_batch(runner, wide_runner):
  images = random_images(7)
  encoded = runner.encode(images)
  decoded = runner.decode(encoded[:, 0])
  np.testing.assert_allclose(wide_runner.encode(images), encoded, rtol=0, atol=1e-5)
  np.testing.assert_allclose(wide_runner.decode(encoded[:, 0]), decoded, rtol=0, atol=1e-5)
  # Another order and number moves every image to another slot.
  np.testing.assert_allclose(runner.encode(images[:5][::-1]), encoded[:5][::-1], rtol=0, atol=1e-5)


def test_any_number_of_images_compiles_one_shape(wide_runner):
  for count in (0, 1, 8, 11):
    encoded = wide_runner.encode(random_images(count))
    assert encoded.shape == (count, 2, 4, 4, 4)
    assert wide_runner.decode(encoded[:, 0]).shape == (count, 32, 32, 3)
  assert wide_runner._encode._cache_size() == wide_runner._decode._cache_size() == 1


def test_images_need_not_be_square(runner):
  images = random_images(2)[:, :8, :16]
  encoded = runner.encode(images)
  assert encoded.shape == (2, 2, 1, 2, 4)
  assert runner.decode(encoded[:, 0]).shape == images.shape


def test_group_norm_survives_a_large_mean():
  x = 3000 + np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
  norm = vae._group_norm(2, "norm")
  output = norm.apply(norm.init(jax.random.key(0), x), x)
  groups = x.astype(np.float64).reshape(1, 64, 2, 2)
  centered = groups - groups.mean((1, 3), keepdims=True)
  expected = centered / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-6)
  np.testing.assert_allclose(output, expected.reshape(x.shape), rtol=0, atol=1e-3)


def test_log_variance_is_clipped(tiny, runner, monkeypatch):
  params = jax.tree.map(np.copy, tiny.params)
  params["encoder"]["quant_conv"]["bias"][4:] = [-100, 100, -29, 19]
  params["encoder"]["quant_conv"]["kernel"][:] = 0
  on_device = jax.tree.map(
    lambda new, old: jax.device_put(new, old.sharding), params, runner._params
  )
  monkeypatch.setattr(runner, "_params", on_device)  # avoids a new compilation
  encoded = runner.encode(random_images(1))
  np.testing.assert_array_equal(encoded[0, 1, 0, 0], [-30, 20, -29, 19])


@pytest.mark.parametrize("shape", [(1, 12, 16, 3), (1, 16, 20, 3), (1, 16, 16, 1)])
def test_images_of_an_unsupported_shape_are_refused(runner, shape):
  with pytest.raises(UserError, match=r"multiples of 8|1 channels and the VAE encodes 3"):
    runner.encode(np.zeros(shape, np.float32))


def test_batch_must_divide_over_the_devices(tiny):
  with pytest.raises(UserError, match=r"config.vae.batch_size=6 .* multiple of 4"):
    vae.VaeRunner(tiny, jax.devices(), 6)


def test_a_process_computes_its_share_of_the_images_in_flight(tiny, runner, monkeypatch):
  monkeypatch.setattr(parallel, "own_devices", lambda devices: devices[:2])  # of a first process
  shared = vae.VaeRunner(tiny, jax.devices(), 8)
  assert shared.batch_size == 4
  images = np.random.default_rng(0).uniform(-1, 1, (5, 16, 16, 3)).astype(np.float32)
  np.testing.assert_allclose(shared.encode(images), runner.encode(images), atol=1e-5)


@pytest.mark.parametrize("library", [np, jnp])
def test_scaling_and_its_inverse(library):
  config = vae.VaeConfig(scaling_factor=0.5, shift_factor=3.0)
  latents = library.asarray([1.0, 3.0, 7.0], library.float32)
  scaled = vae.scale_latents(config, latents)
  assert isinstance(scaled, type(latents))
  assert scaled.dtype == np.float32
  np.testing.assert_array_equal(scaled, [-1.0, 0.0, 2.0])
  np.testing.assert_array_equal(vae.unscale_latents(config, scaled), latents)
