"""The files of a VAE as diffusers saves it, read into `vae.py`'s parameters."""

import dataclasses
import json
import logging
import math
import os
import pathlib
import re
from typing import Any

import flax
import jax.numpy as jnp
import numpy as np
import safetensors

from lrdit.model import vae
from lrdit.runtime import store
from lrdit.runtime.errors import UserError

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}

# What a config may say of fields that are not in `vae.VaeConfig`.
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

log = logging.getLogger("lrdit")


def read_vae(path: str | os.PathLike) -> vae.Vae:
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
    log.warning(
      "no config.json beside %s: taken to be Stable Diffusion's, with scaling_factor=%g and "
      "norm_num_groups=%d, which other VAEs do not share",
      weights,
      config.scaling_factor,
      config.norm_num_groups,
    )
  params = _to_params(tensors, config, str(weights))
  return vae.Vae(config, params, _digest(config, params))


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


def read_config(path: pathlib.Path) -> vae.VaeConfig:
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
  for field in dataclasses.fields(vae.VaeConfig):
    value = stored.get(field.name, field.default)
    if field.name == "shift_factor" and value is None:
      value = 0.0
    fields[field.name] = _checked_field(field, value, path)
  return vae.VaeConfig(**fields)


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


def _check_groups(config: vae.VaeConfig, source: str) -> None:
  if any(features % config.norm_num_groups for features in config.block_out_channels):
    raise UserError(
      f"{source}: norm_num_groups={config.norm_num_groups} does not divide block_out_channels="
      f"{list(config.block_out_channels)}: put the VAE's own config.json beside its weights"
    )


def infer_config(shapes: dict[str, tuple[int, ...]], source: str) -> vae.VaeConfig:
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
  return vae.VaeConfig(
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


def stored_layout(config: vae.VaeConfig) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
  """(our path, diffusers' shape) of every parameter by diffusers' key."""
  template = flax.traverse_util.flatten_dict(vae.params_template(config))
  return {_stored_key(path): (path, _stored_shape(leaf.shape)) for path, leaf in template.items()}


def _stored_key(path: tuple[str, ...]) -> str:
  *modules, name = path
  if modules[-1] in ("quant_conv", "post_quant_conv"):  # beside the two halves there
    modules = modules[1:]
  return ".".join([*modules, {"kernel": "weight", "scale": "weight", "bias": "bias"}[name]])


def _stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  return tuple(shape[axis] for axis in STORED_AXES[len(shape)])


def _to_params(
  tensors: dict[str, np.ndarray], config: vae.VaeConfig, source: str
) -> dict[str, Any]:
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
  store.check_finite(source, tensors, "download or convert the VAE again")
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


def _digest(config: vae.VaeConfig, params: dict[str, Any]) -> str:
  """Return the SHA-256 of the config's fields and every parameter's path, shape and bytes."""
  arrays = sorted(flax.traverse_util.flatten_dict(params, sep="/").items())
  texts = ((f"\n{path} {array.shape}\n", np.asarray(array, "<f4")) for path, array in arrays)
  return store.digest(json.dumps(dataclasses.asdict(config), sort_keys=True), texts)
