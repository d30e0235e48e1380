"""The Stable Diffusion VAE (Rombach et al. 2022, arXiv:2112.10752).

The layers are those of `AutoencoderKL` in diffusers, whose files `vae_weights.py` reads. Modules
have diffusers' names, dots included, so that a parameter's path is its key in a file. Parameters
and arithmetic are float32, with JAX's default precision for products.

Axes: N images, B batch, H W image, h w latent, C channels, c latent channels, D features.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from lrdit.runtime import parallel
from lrdit.runtime.errors import UserError

GROUP_NORM_EPSILON = 1e-6
LOG_VARIANCE_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class VaeConfig:
  """The supported fields of diffusers' config, with its defaults.

  Attributes:
    block_out_channels: features of each resolution, from the image's down.
    layers_per_block: residual blocks per resolution; the decoder has one more.
    scaling_factor, shift_factor: see `scale_latents`.
    use_quant_conv, use_post_quant_conv: whether 1x1 convolutions surround the latents.
  """

  in_channels: int = 3
  out_channels: int = 3
  latent_channels: int = 4
  block_out_channels: tuple[int, ...] = (64,)
  layers_per_block: int = 1
  norm_num_groups: int = 32
  scaling_factor: float = 0.18215
  shift_factor: float = 0.0
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True
  mid_block_add_attention: bool = True

  @property
  def downsample_factor(self) -> int:
    """The number of image pixels per latent pixel along one side."""
    return 2 ** (len(self.block_out_channels) - 1)


def _conv3(features: int, name: str) -> nn.Conv:
  return nn.Conv(features, (3, 3), padding=1, name=name)


def _group_norm(groups: int, name: str) -> nn.GroupNorm:
  # The fast variance, E[x^2] - E[x]^2, loses digits on this VAE's large activations.
  return nn.GroupNorm(groups, epsilon=GROUP_NORM_EPSILON, use_fast_variance=False, name=name)


class _ResnetBlock(nn.Module):
  """Two normalised convolutions and the residual connection."""

  features: int
  groups: int

  @nn.compact
  def __call__(self, x: Float32[Array, "B H W D_in"]) -> Float32[Array, "B H W D"]:
    y = _conv3(self.features, "conv1")(nn.silu(_group_norm(self.groups, "norm1")(x)))
    y = _conv3(self.features, "conv2")(nn.silu(_group_norm(self.groups, "norm2")(y)))
    if x.shape[-1] != self.features:
      x = nn.Conv(self.features, (1, 1), name="conv_shortcut")(x)
    return x + y


class _Attention(nn.Module):
  """Single-head self-attention and the residual connection; stores all (h w, h w) scores."""

  groups: int

  @nn.compact
  def __call__(self, x: Float32[Array, "B h w D"]) -> Float32[Array, "B h w D"]:
    b, h, w, d = x.shape
    tokens = _group_norm(self.groups, "group_norm")(x).reshape(b, h * w, d)
    q, k, v = (nn.Dense(d, name=name)(tokens) for name in ("to_q", "to_k", "to_v"))
    weights = nn.softmax(jnp.einsum("bqd,bkd->bqk", q * d**-0.5, k))
    values = jnp.einsum("bqk,bkd->bqd", weights, v)
    return x + nn.Dense(d, name="to_out.0")(values).reshape(x.shape)


class _MidBlock(nn.Module):
  config: VaeConfig

  @nn.compact
  def __call__(self, x: Float32[Array, "B h w D"]) -> Float32[Array, "B h w D"]:
    groups = self.config.norm_num_groups
    x = _ResnetBlock(x.shape[-1], groups, name="resnets.0")(x)
    if self.config.mid_block_add_attention:
      x = _Attention(groups, name="attentions.0")(x)
    return _ResnetBlock(x.shape[-1], groups, name="resnets.1")(x)


class Encoder(nn.Module):
  """The Gaussian posterior of an image's latents."""

  config: VaeConfig

  @nn.compact
  def __call__(self, images: Float32[Array, "B H W C"]) -> Float32[Array, "B 2 h w c"]:
    """Return unscaled means and log-variances of images in [-1, 1]."""
    c = self.config
    x = _conv3(c.block_out_channels[0], "conv_in")(images)
    for i, features in enumerate(c.block_out_channels):
      if i > 0:
        # The published code pads only at the bottom and the right.
        name, padding = f"down_blocks.{i - 1}.downsamplers.0.conv", ((0, 1), (0, 1))
        x = nn.Conv(x.shape[-1], (3, 3), strides=2, padding=padding, name=name)(x)
      for j in range(c.layers_per_block):
        x = _ResnetBlock(features, c.norm_num_groups, name=f"down_blocks.{i}.resnets.{j}")(x)
    x = _MidBlock(c, name="mid_block")(x)
    x = nn.silu(_group_norm(c.norm_num_groups, "conv_norm_out")(x))
    x = _conv3(2 * c.latent_channels, "conv_out")(x)
    if c.use_quant_conv:
      x = nn.Conv(2 * c.latent_channels, (1, 1), name="quant_conv")(x)
    mean, log_variance = jnp.split(x, 2, axis=-1)
    return jnp.stack([mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)], axis=1)


class Decoder(nn.Module):
  """The decoder of unscaled latents."""

  config: VaeConfig

  @nn.compact
  def __call__(self, latents: Float32[Array, "B h w c"]) -> Float32[Array, "B H W C"]:
    """Return images in about [-1, 1], not clipped."""
    c = self.config
    x = latents
    if c.use_post_quant_conv:
      x = nn.Conv(c.latent_channels, (1, 1), name="post_quant_conv")(x)
    x = _conv3(c.block_out_channels[-1], "conv_in")(x)
    x = _MidBlock(c, name="mid_block")(x)
    for i, features in enumerate(reversed(c.block_out_channels)):
      if i > 0:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        x = _conv3(x.shape[-1], f"up_blocks.{i - 1}.upsamplers.0.conv")(x)
      for j in range(c.layers_per_block + 1):
        x = _ResnetBlock(features, c.norm_num_groups, name=f"up_blocks.{i}.resnets.{j}")(x)
    x = nn.silu(_group_norm(c.norm_num_groups, "conv_norm_out")(x))
    return _conv3(c.out_channels, "conv_out")(x)


def scale_latents(
  config: VaeConfig, latents: Float[Array | np.ndarray, "*shape"]
) -> Float[Array | np.ndarray, "*shape"]:
  """Scale the VAE's latents to about unit variance, for the diffusion model."""
  return (latents - config.shift_factor) * config.scaling_factor


def unscale_latents(
  config: VaeConfig, latents: Float[Array | np.ndarray, "*shape"]
) -> Float[Array | np.ndarray, "*shape"]:
  """Invert `scale_latents`."""
  return latents / config.scaling_factor + config.shift_factor


def params_template(config: VaeConfig) -> dict[str, Any]:
  """Return the parameters' shapes, {"encoder": ..., "decoder": ...}."""
  side, key = config.downsample_factor, jax.random.key(0)
  images = jnp.zeros((1, side, side, config.in_channels))
  latents = jnp.zeros((1, 1, 1, config.latent_channels))
  encoder = jax.eval_shape(Encoder(config).init, key, images)
  decoder = jax.eval_shape(Decoder(config).init, key, latents)
  return {"encoder": encoder["params"], "decoder": decoder["params"]}


@dataclasses.dataclass(frozen=True, eq=False)
class Vae:
  """A VAE and its weights.

  Attributes:
    config: its architecture and scaling.
    params: {"encoder": ..., "decoder": ...} of float32 numpy arrays.
    digest: hexadecimal SHA-256 of the config and the parameters, whatever format they were
      stored in.
  """

  config: VaeConfig
  params: dict[str, Any]
  digest: str


class VaeRunner:
  """Encodes and decodes any number of images on this process's devices.

  The last batch is padded, so each function is compiled once per image size.
  """

  def __init__(self, vae: Vae, devices: parallel.Devices, batch_size: int):
    """Take a VAE, the devices of all processes and the images in flight over them."""
    parallel.check_divisible("config.vae.batch_size", batch_size, devices)
    self.config, self.digest = vae.config, vae.digest
    # Images in flight in this process.
    self.batch_size = batch_size // len(devices) * len(parallel.own_devices(devices))
    self._batch_sharding, replicated = parallel.shardings(devices)
    self._params = jax.device_put(vae.params, replicated)
    self._encode = self._compile(Encoder(vae.config))
    self._decode = self._compile(Decoder(vae.config))

  def _compile(self, half: Encoder | Decoder) -> Callable:
    return jax.jit(
      lambda params, x: half.apply({"params": params}, x), out_shardings=self._batch_sharding
    )

  def encode(self, images: Float32[np.ndarray, "N H W C"]) -> Float32[np.ndarray, "N 2 h w c"]:
    """Return the unscaled means and log-variances (in [-30, 20]) of images in [-1, 1].

    Raises:
      UserError: the VAE cannot encode this size or number of channels.
    """
    _, height, width, channels = images.shape
    factor, wanted = self.config.downsample_factor, self.config.in_channels
    if channels != wanted:
      raise UserError(
        f"the images have {channels} channels and the VAE encodes {wanted}: use other data or "
        "another VAE"
      )
    if height % factor or width % factor:
      raise UserError(
        f"images of {height} x {width} pixels cannot be encoded: the VAE needs sides that are "
        f"multiples of {factor}"
      )
    return self._run(self._encode, self._params["encoder"], images)

  def decode(self, latents: Float32[np.ndarray, "N h w c"]) -> Float32[np.ndarray, "N H W C"]:
    """Return the images, not clipped, of unscaled latents."""
    return self._run(self._decode, self._params["decoder"], latents)

  def _run(self, function: Callable, params: Any, inputs: np.ndarray) -> np.ndarray:
    def run(batch: np.ndarray) -> Array:
      return function(params, jax.device_put(batch, self._batch_sharding))

    return parallel.run_batches(run, inputs, self.batch_size)
