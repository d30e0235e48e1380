"""The Stable Diffusion VAE (Rombach et al. 2022, arXiv:2112.10752), to encode and decode.

Layer for layer `AutoencoderKL` of diffusers, whose files it reads. Modules bear
the names diffusers gives its own, dots included, so that a parameter's path is
its key in a file. Parameters and arithmetic are float32, products at JAX's
default precision for the device.

Axes: N images, B images in flight, H W image, h w latent, C channels, c latent
channels, D features.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jaxtyping import Array, Float, Float32

from lrdit import parallel
from lrdit.errors import UserError

GROUP_NORM_EPSILON = 1e-6
LOG_VARIANCE_RANGE = (-30.0, 20.0)

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}

# What a config may say of fields that are not in `VaeConfig`.
SUPPORTED_VALUES = {"act_fn": "silu", "latents_mean": None, "latents_std": None}
SUPPORTED_BLOCKS = {
  "down_block_types": "DownEncoderBlock2D",
  "up_block_types": "UpDecoderBlock2D",
}

# The attention's layers as older files name them, and their names now.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_KEY = re.compile(rf"(?<=\.mid_block\.attentions\.0\.)({'|'.join(OLD_NAMES)})(?=\.)")

# Of diffusers' axes (channels out, channels in, height, width), where ours are.
STORED_AXES = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}


@dataclasses.dataclass(frozen=True)
class VaeConfig:
  """The fields of diffusers' config that this module honours, with its defaults.

  Attributes:
    in_channels: of the images to encode.
    out_channels: of the decoded images.
    latent_channels: c; the encoder's output has twice as many.
    block_out_channels: features of each resolution, from the image's down.
    layers_per_block: residual blocks per resolution, one more in the decoder.
    norm_num_groups: groups of every GroupNorm.
    scaling_factor, shift_factor: see `scale_latents`.
    use_quant_conv, use_post_quant_conv: 1x1 convolutions around the latents.
    mid_block_add_attention: self-attention at the lowest resolution.
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
    """Image pixels per latent pixel, along one side."""
    return 2 ** (len(self.block_out_channels) - 1)


def _conv3(features: int, name: str) -> nn.Conv:
  return nn.Conv(features, (3, 3), padding=1, name=name)


def _group_norm(groups: int, name: str) -> nn.GroupNorm:
  # The fast variance, E[x^2] - E[x]^2, loses digits on this VAE's large activations.
  return nn.GroupNorm(groups, epsilon=GROUP_NORM_EPSILON, use_fast_variance=False, name=name)


class ResnetBlock(nn.Module):
  """Two normalised convolutions and the residual connection."""

  features: int
  groups: int

  @nn.compact
  def __call__(self, x: Float32[Array, "B H W D_in"]) -> Float32[Array, "B H W D"]:
    """(B, H, W, D_in) to (B, H, W, features)."""
    y = _conv3(self.features, "conv1")(nn.silu(_group_norm(self.groups, "norm1")(x)))
    y = _conv3(self.features, "conv2")(nn.silu(_group_norm(self.groups, "norm2")(y)))
    if x.shape[-1] != self.features:
      x = nn.Conv(self.features, (1, 1), name="conv_shortcut")(x)
    return x + y


class Attention(nn.Module):
  """Single-head self-attention over all positions, and the residual connection.

  The (h w, h w) scores are held at once: for images up to 1024 x 1024 they are
  no larger than the decoder's activations at full resolution.
  """

  groups: int

  @nn.compact
  def __call__(self, x: Float32[Array, "B h w D"]) -> Float32[Array, "B h w D"]:
    """(B, h, w, D) to (B, h, w, D)."""
    b, h, w, d = x.shape
    tokens = _group_norm(self.groups, "group_norm")(x).reshape(b, h * w, d)
    q, k, v = (nn.Dense(d, name=name)(tokens) for name in ("to_q", "to_k", "to_v"))
    weights = nn.softmax(jnp.einsum("bqd,bkd->bqk", q * d**-0.5, k))
    values = jnp.einsum("bqk,bkd->bqd", weights, v)
    return x + nn.Dense(d, name="to_out.0")(values).reshape(x.shape)


class MidBlock(nn.Module):
  """The layers at the lowest resolution."""

  config: VaeConfig

  @nn.compact
  def __call__(self, x: Float32[Array, "B h w D"]) -> Float32[Array, "B h w D"]:
    """(B, h, w, D) to (B, h, w, D)."""
    groups = self.config.norm_num_groups
    x = ResnetBlock(x.shape[-1], groups, name="resnets.0")(x)
    if self.config.mid_block_add_attention:
      x = Attention(groups, name="attentions.0")(x)
    return ResnetBlock(x.shape[-1], groups, name="resnets.1")(x)


class Encoder(nn.Module):
  """Images to the Gaussian of their latents."""

  config: VaeConfig

  @nn.compact
  def __call__(self, images: Float32[Array, "B H W C"]) -> Float32[Array, "B 2 h w c"]:
    """(B, H, W, C) in [-1, 1] to (B, 2, h, w, c): mean and log-variance, unscaled."""
    c = self.config
    x = _conv3(c.block_out_channels[0], "conv_in")(images)
    for i, features in enumerate(c.block_out_channels):
      if i > 0:
        # Padded at the bottom and the right only, as in the published code.
        name, padding = f"down_blocks.{i - 1}.downsamplers.0.conv", ((0, 1), (0, 1))
        x = nn.Conv(x.shape[-1], (3, 3), strides=2, padding=padding, name=name)(x)
      for j in range(c.layers_per_block):
        x = ResnetBlock(features, c.norm_num_groups, name=f"down_blocks.{i}.resnets.{j}")(x)
    x = MidBlock(c, name="mid_block")(x)
    x = nn.silu(_group_norm(c.norm_num_groups, "conv_norm_out")(x))
    x = _conv3(2 * c.latent_channels, "conv_out")(x)
    if c.use_quant_conv:
      x = nn.Conv(2 * c.latent_channels, (1, 1), name="quant_conv")(x)
    mean, log_variance = jnp.split(x, 2, axis=-1)
    return jnp.stack([mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)], axis=1)


class Decoder(nn.Module):
  """Latents to images."""

  config: VaeConfig

  @nn.compact
  def __call__(self, latents: Float32[Array, "B h w c"]) -> Float32[Array, "B H W C"]:
    """(B, h, w, c) unscaled to (B, H, W, C), about [-1, 1] but not clipped."""
    c = self.config
    x = latents
    if c.use_post_quant_conv:
      x = nn.Conv(c.latent_channels, (1, 1), name="post_quant_conv")(x)
    x = _conv3(c.block_out_channels[-1], "conv_in")(x)
    x = MidBlock(c, name="mid_block")(x)
    for i, features in enumerate(reversed(c.block_out_channels)):
      if i > 0:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        x = _conv3(x.shape[-1], f"up_blocks.{i - 1}.upsamplers.0.conv")(x)
      for j in range(c.layers_per_block + 1):
        x = ResnetBlock(features, c.norm_num_groups, name=f"up_blocks.{i}.resnets.{j}")(x)
    x = nn.silu(_group_norm(c.norm_num_groups, "conv_norm_out")(x))
    return _conv3(c.out_channels, "conv_out")(x)


def scale_latents(
  config: VaeConfig, latents: Float[Array | np.ndarray, "*shape"]
) -> Float[Array | np.ndarray, "*shape"]:
  """The VAE's latents to those a diffusion model sees, of about unit variance."""
  return (latents - config.shift_factor) * config.scaling_factor


def unscale_latents(
  config: VaeConfig, latents: Float[Array | np.ndarray, "*shape"]
) -> Float[Array | np.ndarray, "*shape"]:
  """Inverse of `scale_latents`."""
  return latents / config.scaling_factor + config.shift_factor


def params_template(config: VaeConfig) -> dict[str, Any]:
  """Shapes of the parameters, {"encoder": ..., "decoder": ...}; computes nothing."""
  side = config.downsample_factor
  images = jnp.zeros((1, side, side, config.in_channels))
  latents = jnp.zeros((1, 1, 1, config.latent_channels))

  def init() -> dict[str, Any]:
    key = jax.random.key(0)
    return {
      "encoder": Encoder(config).init(key, images)["params"],
      "decoder": Decoder(config).init(key, latents)["params"],
    }

  return jax.eval_shape(init)


# Reading files.


@dataclasses.dataclass(frozen=True, eq=False)
class Vae:
  """A VAE as read.

  Attributes:
    config: its architecture and scaling.
    params: {"encoder": ..., "decoder": ...} of float32 numpy arrays.
    digest: hexadecimal SHA-256 of the config and the parameters; the same
      however they were stored.
  """

  config: VaeConfig
  params: dict[str, Any]
  digest: str


def read_vae(path: str | os.PathLike) -> Vae:
  """Reads an `AutoencoderKL` that diffusers saved.

  The architecture is that of the config.json beside the weights or, where
  there is none, inferred from the weights.

  Args:
    path: a directory with config.json and weights, a whole pipeline's
      directory with a `vae` directory in it, or a .safetensors file.

  Raises:
    UserError: nothing there, not such a VAE, or one that is damaged.
  """
  weights = _find_weights(pathlib.Path(path))
  config_path = weights.with_name("config.json")
  # First, as a large file takes a while to read.
  config = read_config(config_path) if config_path.is_file() else None
  tensors = _with_current_keys(_read_tensors(weights), weights)
  if config is None:
    config = infer_config({key: tensor.shape for key, tensor in tensors.items()}, str(weights))
  params = _to_params(tensors, config, str(weights))
  return Vae(config, params, _digest(config, params))


def _find_weights(path: pathlib.Path) -> pathlib.Path:
  """The file with the weights."""
  if not path.exists():
    raise UserError(
      f"the VAE {path} does not exist: give a directory that diffusers saved, or a .safetensors "
      "file"
    )
  if path.is_dir():
    return _find_weights_in(_vae_directory(path))
  if path.suffix in PICKLE_SUFFIXES:
    raise _pickle_error(path)
  return path


def _vae_directory(path: pathlib.Path) -> pathlib.Path:
  """The directory itself, or its `vae` where it is a whole pipeline."""
  config = path / "config.json"
  if config.is_file() and _read_json(config).get("_class_name") == "AutoencoderKL":
    return path
  inner = path / "vae"
  return inner if (inner / "config.json").is_file() else path


def _find_weights_in(directory: pathlib.Path) -> pathlib.Path:
  if (directory / WEIGHTS_NAME).is_file():
    return directory / WEIGHTS_NAME
  found = sorted(directory.glob("*.safetensors"))
  if len(found) == 1:
    return found[0]
  if found:
    raise UserError(
      f"{directory} has several .safetensors files and none is {WEIGHTS_NAME}: give the path of "
      f"one of them ({_some([file.name for file in found])})"
    )
  pickles = sorted(file for file in directory.iterdir() if file.suffix in PICKLE_SUFFIXES)
  if pickles:
    raise _pickle_error(pickles[0])
  raise UserError(f"{directory} has no .safetensors file: give the directory of a diffusers VAE")


def _pickle_error(path: pathlib.Path) -> UserError:
  return UserError(
    f"{path} is a pickle, which could run any code when read: load it with diffusers and convert "
    "it with save_pretrained(safe_serialization=True)"
  )


def _some(names: list[str]) -> str:
  """Up to three names, and how many more there are."""
  more = f" and {len(names) - 3} more" if len(names) > 3 else ""
  return ", ".join(names[:3]) + more


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(f"{path} is damaged ({error}): restore it") from error
  if not isinstance(value, dict):
    raise UserError(f"{path} is damaged (not a JSON object): restore it")
  return value


def read_config(path: pathlib.Path) -> VaeConfig:
  """Reads diffusers' config.json.

  Raises:
    UserError: damaged, of another model, or of a VAE that is not supported.
  """
  stored = _read_json(path)
  class_name = stored.get("_class_name")
  if class_name != "AutoencoderKL":
    raise UserError(
      f"{path} has _class_name={class_name!r}, not 'AutoencoderKL': give the path of a VAE of "
      "Stable Diffusion's kind, with its own config.json"
    )
  _check_supported(stored, path)
  fields = {}
  for field in dataclasses.fields(VaeConfig):
    value = stored.get(field.name, field.default)
    if field.name == "shift_factor" and value is None:
      value = 0.0
    fields[field.name] = _checked_field(field, value, path)
  return VaeConfig(**fields)


def _check_supported(stored: dict[str, Any], path: pathlib.Path) -> None:
  """Refuses what would change the computation and is not implemented."""
  for name, supported in SUPPORTED_VALUES.items():
    if stored.get(name, supported) != supported:
      raise UserError(
        f"{path} has {name}={stored[name]!r}, but only {json.dumps(supported)} is supported: use "
        "another VAE"
      )
  for name, supported in SUPPORTED_BLOCKS.items():
    blocks = stored.get(name, [])
    if not isinstance(blocks, list) or any(block != supported for block in blocks):
      raise UserError(
        f"{path} has {name}={blocks!r}, but only {supported!r} is supported: use another VAE"
      )


def _checked_field(field: dataclasses.Field, value: Any, path: pathlib.Path) -> Any:
  """The value with the type of the field's default."""

  def is_size(x: Any) -> bool:
    return type(x) is int and x > 0

  match field.default:
    case bool():
      good, wanted = isinstance(value, bool), "true or false"
    case int():
      good, wanted = is_size(value), "a whole number above 0"
    case float():
      good, wanted = type(value) in (int, float) and math.isfinite(value), "a finite number"
    case _:
      good = isinstance(value, (list, tuple)) and len(value) > 0 and all(map(is_size, value))
      wanted = "a list of whole numbers above 0"
  if field.name == "scaling_factor" and value == 0:
    good, wanted = False, "a number other than 0"
  if not good:
    raise UserError(f"{path} is damaged ({field.name}={value!r} is not {wanted}): restore it")
  return type(field.default)(value)


def _check_groups(config: VaeConfig, source: str) -> None:
  if any(features % config.norm_num_groups for features in config.block_out_channels):
    raise UserError(
      f"{source}: norm_num_groups={config.norm_num_groups} does not divide block_out_channels="
      f"{list(config.block_out_channels)}: put the VAE's own config.json beside its weights"
    )


def infer_config(shapes: dict[str, tuple[int, ...]], source: str) -> VaeConfig:
  """The architecture that weights of these names and shapes have.

  The number of groups and the scaling leave no trace in the weights: they are
  Stable Diffusion's, which are diffusers' defaults.

  Args:
    shapes: shape of every tensor by its current key, as stored.
    source: what to call the weights in an error.

  Raises:
    UserError: not the keys of an `AutoencoderKL`.
  """

  def kernel_shape(key: str) -> tuple[int, ...]:
    shape = shapes.get(f"{key}.weight", ())
    if len(shape) != 4:
      raise UserError(
        f"{source} is not a VAE in diffusers' layout (no convolution {key}.weight): load it with "
        "AutoencoderKL.from_single_file and convert it with "
        "save_pretrained(safe_serialization=True)"
      )
    return shape

  def count(pattern: str) -> int:
    found = {int(match[1]) for key in shapes if (match := re.fullmatch(pattern, key))}
    return len(found)

  blocks = count(r"encoder\.down_blocks\.(\d+)\.resnets\.0\.conv1\.weight")
  first_convs = [f"encoder.down_blocks.{i}.resnets.0.conv1" for i in range(max(1, blocks))]
  return VaeConfig(
    in_channels=kernel_shape("encoder.conv_in")[1],
    out_channels=kernel_shape("decoder.conv_out")[0],
    latent_channels=kernel_shape("decoder.conv_in")[1],
    block_out_channels=tuple(kernel_shape(key)[0] for key in first_convs),
    layers_per_block=count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.conv1\.weight"),
    use_quant_conv="quant_conv.weight" in shapes,
    use_post_quant_conv="post_quant_conv.weight" in shapes,
    mid_block_add_attention="encoder.mid_block.attentions.0.to_q.weight" in shapes,
  )


def _read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Every tensor by its key, in the stored dtype.

  From the raw bytes, as safetensors' own numpy loader does not know bfloat16.
  """
  try:
    stored = safetensors.deserialize(path.read_bytes())
  except safetensors.SafetensorError as error:
    raise UserError(
      f"{path} is not a safetensors file, or is damaged ({error}): copy or download it again"
    ) from error
  tensors = {}
  for key, tensor in stored:
    if tensor["dtype"] not in DTYPES:
      raise UserError(
        f"{path} has {key} in {tensor['dtype']}: give weights in one of {', '.join(DTYPES)}"
      )
    flat = np.frombuffer(tensor["data"], DTYPES[tensor["dtype"]])
    tensors[key] = flat.reshape(tensor["shape"])
  return tensors


def _with_current_keys(tensors: dict[str, np.ndarray], path: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors with the attention's layers named as diffusers names them now."""
  current = {}
  for key, tensor in tensors.items():
    new_key = OLD_KEY.sub(lambda match: OLD_NAMES[match[1]], key)
    if new_key != key and new_key in tensors:
      raise UserError(f"{path} has both {key} and {new_key}: save the VAE again with diffusers")
    current[new_key] = tensor
  return current


def stored_layout(config: VaeConfig) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
  """(our path, diffusers' shape) of every parameter by diffusers' key."""
  template = flax.traverse_util.flatten_dict(params_template(config))
  return {_stored_key(path): (path, _stored_shape(leaf.shape)) for path, leaf in template.items()}


def _stored_key(path: tuple[str, ...]) -> str:
  *modules, name = path
  if modules[-1] in ("quant_conv", "post_quant_conv"):  # beside the two halves there
    modules = modules[1:]
  return ".".join([*modules, {"kernel": "weight", "scale": "weight", "bias": "bias"}[name]])


def _stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  return tuple(shape[axis] for axis in STORED_AXES[len(shape)])


def _to_params(tensors: dict[str, np.ndarray], config: VaeConfig, source: str) -> dict[str, Any]:
  """The parameters, each from exactly one tensor and every tensor used."""
  _check_groups(config, source)
  layout = stored_layout(config)
  tensors = {key: _without_window(key, tensor) for key, tensor in tensors.items()}
  faults = _faults(
    {key: tensor.shape for key, tensor in tensors.items()},
    {key: shape for key, (_, shape) in layout.items()},
  )
  if faults:
    raise UserError(
      f"{source} has not the weights of its config ({faults}): put config.json and weights of "
      "the same VAE together, as save_pretrained of diffusers writes them"
    )
  return flax.traverse_util.unflatten_dict(
    {path: _to_ours(tensors[key]) for key, (path, _) in layout.items()}
  )


def _faults(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> str:
  """What is wrong with the shapes by key; empty if nothing is."""
  kinds = {
    "missing": sorted(wanted.keys() - found.keys()),
    "unknown": sorted(found.keys() - wanted.keys()),
    "of another shape": [
      f"{key} {found[key]} instead of {shape}"
      for key, shape in wanted.items()
      if found.get(key, shape) != shape
    ],
  }
  return "; ".join(f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in kinds.items() if keys)


def _without_window(key: str, tensor: np.ndarray) -> np.ndarray:
  """An attention projection stored as a 1x1 convolution, as a matrix."""
  if ".attentions.0.to_" in key and tensor.shape[2:] == (1, 1):
    return tensor[:, :, 0, 0]
  return tensor


def _to_ours(tensor: np.ndarray) -> np.ndarray:
  """diffusers' axes to ours, in float32."""
  axes = np.argsort(STORED_AXES[tensor.ndim])
  return np.ascontiguousarray(tensor.transpose(axes), np.float32)


def _digest(config: VaeConfig, params: dict[str, Any]) -> str:
  """SHA-256 over the config's fields and every parameter's path, shape and bytes."""
  digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
  for path, array in sorted(flax.traverse_util.flatten_dict(params, sep="/").items()):
    digest.update(f"\n{path} {array.shape}\n".encode())
    digest.update(np.asarray(array, "<f4"))
  return digest.hexdigest()


class Codec:
  """Encodes and decodes any number of images, on all devices.

  Inputs go through in batches of one size, the last one padded, so each
  function is compiled once per image size.
  """

  def __init__(self, vae: Vae, devices: parallel.Devices, batch_size: int):
    """Puts the parameters on the devices; compiles nothing yet.

    Args:
      vae: as read.
      devices: where to run.
      batch_size: images in flight, B.

    Raises:
      UserError: the batch does not divide over the devices.
    """
    parallel.check_divisible("config.vae.batch_size", batch_size, devices)
    self.config, self.digest, self.batch_size = vae.config, vae.digest, batch_size
    self._batch_sharding, replicated = parallel.shardings(devices)
    self._params = jax.device_put(vae.params, replicated)
    self._encode = self._compiled(Encoder(vae.config))
    self._decode = self._compiled(Decoder(vae.config))

  def _compiled(self, half: Encoder | Decoder) -> Callable:
    def apply(params, x):
      return half.apply({"params": params}, x)

    return jax.jit(apply, out_shardings=self._batch_sharding)

  def encode(self, images: Float32[np.ndarray, "N H W C"]) -> Float32[np.ndarray, "N 2 h w c"]:
    """Means and log-variances of the latents, unscaled.

    Args:
      images: (N, H, W, C) in [-1, 1].

    Returns:
      (N, 2, h, w, c): mean, and log-variance in [-30, 20].

    Raises:
      UserError: a size or a number of channels the VAE cannot encode.
    """
    _, height, width, channels = images.shape
    factor, config = self.config.downsample_factor, self.config
    if channels != config.in_channels:
      raise UserError(
        f"the images have {channels} channels and the VAE encodes {config.in_channels}: use other "
        "data or another VAE"
      )
    if height % factor or width % factor:
      raise UserError(
        f"images of {height} x {width} pixels cannot be encoded: the VAE needs sides that are "
        f"multiples of {factor}"
      )
    shape = (2, height // factor, width // factor, config.latent_channels)
    return self._in_batches(self._encode, self._params["encoder"], images, shape)

  def decode(self, latents: Float32[np.ndarray, "N h w c"]) -> Float32[np.ndarray, "N H W C"]:
    """(N, h, w, c) unscaled latents to (N, H, W, C) images, not clipped."""
    _, height, width, _ = latents.shape
    factor = self.config.downsample_factor
    shape = (height * factor, width * factor, self.config.out_channels)
    return self._in_batches(self._decode, self._params["decoder"], latents, shape)

  def _in_batches(
    self, function: Callable, params: Any, inputs: np.ndarray, shape: tuple[int, ...]
  ) -> np.ndarray:
    """(N, *shape) outputs; a batch is fetched while the next one is computed."""
    outputs = np.empty((len(inputs), *shape), np.float32)
    pending: list[tuple[int, Array]] = []

    def fetch() -> None:
      start, batch = pending.pop(0)
      outputs[start : start + self.batch_size] = np.asarray(batch)[: len(inputs) - start]

    for start in range(0, len(inputs), self.batch_size):
      batch = inputs[start : start + self.batch_size]
      padded = np.zeros((self.batch_size, *inputs.shape[1:]), np.float32)
      padded[: len(batch)] = batch
      pending.append((start, function(params, jax.device_put(padded, self._batch_sharding))))
      if len(pending) > 1:
        fetch()
    while pending:
      fetch()
    return outputs
