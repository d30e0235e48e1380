"""Read the VAE files that diffusers saves into the parameters of `vae.py`."""

import dataclasses
import json
import logging
import math
import os
import pathlib
import re
from typing import Any

import flax
import numpy as np

from lrdit.model import tensor_files, vae
from lrdit.model.tensor_files import PICKLE_SUFFIXES, WEIGHTS_NAME
from lrdit.runtime import store
from lrdit.runtime.errors import UserError
from lrdit.runtime.text import name_some

# The only supported values of the fields of config.json that are not in `vae.VaeConfig`.
SUPPORTED = {
  "act_fn": "silu",
  "latents_mean": None,
  "latents_std": None,
  "down_block_types": "DownEncoderBlock2D",
  "up_block_types": "UpDecoderBlock2D",
}

MAX_SIZE = 1 << 16  # of a layer, and number of layers

log = logging.getLogger("lrdit")


def read_vae(path: str | os.PathLike) -> vae.Vae:
  """Read an `AutoencoderKL` that diffusers saved.

  Without a config.json beside the weights, the architecture is inferred from them.

  Args:
    path: a .safetensors file, a directory with config.json and weights, or a whole pipeline's
      directory with a `vae` directory in it.

  Raises:
    UserError: the files are missing, damaged or of another model.
  """
  weights = _find_weights(pathlib.Path(path))
  config_path = weights.with_name("config.json")
  # The config comes first because large weights take a while to read.
  config = read_config(config_path) if config_path.is_file() else None
  tensors = _read_tensors(weights)
  if config is None:
    config = infer_config({key: tensor.shape for key, tensor in tensors.items()}, str(weights))
    log.warning(
      "no config.json beside %s: assuming Stable Diffusion's scaling_factor=%g and "
      "norm_num_groups=%d, which other VAEs do not share",
      *(weights, config.scaling_factor, config.norm_num_groups),
    )
  params = _to_params(tensors, config, str(weights))
  return vae.Vae(config, params, _digest(config, params))


def _digest(config: vae.VaeConfig, params: dict[str, Any]) -> str:
  """Return the SHA-256 of the config's fields and every parameter's path, shape and bytes."""
  arrays = sorted(flax.traverse_util.flatten_dict(params, sep="/").items())
  texts = ((f"\n{path} {array.shape}\n", np.asarray(array, "<f4")) for path, array in arrays)
  return store.digest(json.dumps(dataclasses.asdict(config), sort_keys=True), texts)


def _find_weights(path: pathlib.Path) -> pathlib.Path:
  if not path.exists():
    raise UserError(
      f"the VAE {path} does not exist: give a directory that diffusers saved, or a .safetensors "
      "file"
    )
  pickles = [path] if path.suffix in PICKLE_SUFFIXES else []
  if path.is_dir():
    config = path / "config.json"
    stored = store.read_json(config, "restore it") if config.is_file() else {}
    is_vae = stored.get("_class_name") == "AutoencoderKL"
    if not is_vae and (path / "vae" / "config.json").is_file():  # a whole pipeline
      path = path / "vae"
    found = sorted(path.glob("*.safetensors"))
    if path / WEIGHTS_NAME in found:
      return path / WEIGHTS_NAME
    if len(found) == 1:
      return found[0]
    if found:
      raise UserError(
        f"{path} has several .safetensors files and none is {WEIGHTS_NAME}: give the path of one "
        f"of them ({name_some([file.name for file in found])})"
      )
    pickles = sorted(file for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if not pickles:
      raise UserError(f"{path} has no .safetensors file: give the directory of a diffusers VAE")
  if pickles:
    raise UserError(
      f"{pickles[0]} is a pickle, which can run any code when it is read: load it with diffusers "
      "and convert it with save_pretrained(safe_serialization=True)"
    )
  return path


def read_config(path: pathlib.Path) -> vae.VaeConfig:
  """Read diffusers' config.json, or raise UserError if it is damaged or not supported."""
  stored = store.read_json(path, "restore it")
  class_name = stored.get("_class_name")
  if class_name != "AutoencoderKL":
    raise UserError(
      f"{path} has _class_name={class_name!r}, not 'AutoencoderKL': give the path of a VAE of "
      "Stable Diffusion's kind, with its own config.json"
    )
  for name, supported in SUPPORTED.items():
    value = stored.get(name, supported)
    if any(each != supported for each in (value if isinstance(value, list) else [value])):
      raise UserError(
        f"{path} has {name}={value!r}, but only {json.dumps(supported)} is supported: use another "
        "VAE"
      )
  return parse_config(stored, path)


def parse_config(stored: dict[str, Any], path: pathlib.Path) -> vae.VaeConfig:
  """Return the fields of a VAE in a JSON file at `path`, or raise UserError if one is damaged."""
  fields = {}
  for field in dataclasses.fields(vae.VaeConfig):
    value = stored.get(field.name, field.default)
    if field.name == "shift_factor" and value is None:
      value = 0.0
    wanted = _fault(value, field.default)
    if field.name == "scaling_factor" and value == 0:
      wanted = "a number other than 0"
    if wanted:
      raise UserError(f"{path} is damaged ({field.name}={value!r} is not {wanted}): restore it")
    fields[field.name] = type(field.default)(value)
  return vae.VaeConfig(**fields)


def _fault(value: Any, default: Any) -> str:
  """Return what a field must be instead, judged by the type of its default; "" if it is fine."""

  def is_size(x: Any) -> bool:
    return type(x) is int and 0 < x <= MAX_SIZE

  match default:
    case bool():
      return "" if isinstance(value, bool) else "true or false"
    case int():
      return "" if is_size(value) else f"a whole number from 1 to {MAX_SIZE}"
    case float():
      is_number = type(value) in (int, float) and math.isfinite(value)
      return "" if is_number else "a finite number"
  are_sizes = isinstance(value, (list, tuple)) and value and all(map(is_size, value))
  return "" if are_sizes else f"a list of whole numbers from 1 to {MAX_SIZE}"


def infer_config(shapes: dict[str, tuple[int, ...]], source: str) -> vae.VaeConfig:
  """Return the architecture of weights from their shapes by current key.

  The number of groups and the scaling leave no trace in the weights, so they keep their defaults,
  which are Stable Diffusion's. `source` names the weights in the error.
  """

  def count(pattern: str) -> int:
    pattern = rf"encoder\.down_blocks\.{pattern}\.conv1\.weight"
    return sum(bool(re.fullmatch(pattern, key)) for key in shapes)

  num_blocks = max(1, count(r"\d+\.resnets\.0"))
  first_convs = [f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in range(num_blocks)]
  try:
    return vae.VaeConfig(
      in_channels=shapes["encoder.conv_in.weight"][1],
      out_channels=shapes["decoder.conv_out.weight"][0],
      latent_channels=shapes["decoder.conv_in.weight"][1],
      block_out_channels=tuple(shapes[key][0] for key in first_convs),
      layers_per_block=count(r"0\.resnets\.\d+"),
      use_quant_conv="quant_conv.weight" in shapes,
      use_post_quant_conv="post_quant_conv.weight" in shapes,
      mid_block_add_attention="encoder.mid_block.attentions.0.to_q.weight" in shapes,
    )
  except LookupError as error:
    raise UserError(
      f"{source} is not a VAE in diffusers' layout (no convolution {error}): load it with "
      "AutoencoderKL.from_single_file and convert it with "
      "save_pretrained(safe_serialization=True)"
    ) from error


# By number of axes: our axes in diffusers' order, channels out, channels in, height, width.
STORED_AXES = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
# Current names of the attention's layers, by their names in older files.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_KEY = re.compile(rf"(?<=\.mid_block\.attentions\.0\.)({'|'.join(OLD_NAMES)})(?=\.)")


def stored_layout(config: vae.VaeConfig) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
  """Return (our path, diffusers' shape) of every parameter, by diffusers' key."""
  layout = {}
  for path, leaf in flax.traverse_util.flatten_dict(vae.params_template(config)).items():
    *modules, name = path
    if modules[-1] in ("quant_conv", "post_quant_conv"):  # outside the encoder and decoder
      modules = modules[1:]
    key = ".".join([*modules, "bias" if name == "bias" else "weight"])
    layout[key] = path, tuple(leaf.shape[axis] for axis in STORED_AXES[leaf.ndim])
  return layout


def _read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Return every tensor of a file by its current key, in the stored dtype."""
  stored = tensor_files.read_safetensors(path)
  tensors: dict[str, np.ndarray] = {}
  for key, tensor in stored.items():
    current = OLD_KEY.sub(lambda match: OLD_NAMES[match[1]], key)
    if current != key and current in stored:
      raise UserError(f"{path} has both {key} and {current}: save the VAE again with diffusers")
    # Older files store the attention's layers as 1x1 convolutions.
    is_convolution = ".attentions.0.to_" in current and tensor.shape[2:] == (1, 1)
    tensors[current] = tensor[:, :, 0, 0] if is_convolution else tensor
  return tensors


def _to_params(
  tensors: dict[str, np.ndarray], config: vae.VaeConfig, source: str
) -> dict[str, Any]:
  """Return the parameters in float32, or raise UserError unless the tensors match one to one."""
  if any(features % config.norm_num_groups for features in config.block_out_channels):
    raise UserError(
      f"{source}: norm_num_groups={config.norm_num_groups} does not divide block_out_channels="
      f"{list(config.block_out_channels)}: put the VAE's own config.json beside its weights"
    )
  num_layers = config.layers_per_block * len(config.block_out_channels)
  if num_layers > len(tensors):  # building so many would take forever
    raise UserError(
      f"{source} has {len(tensors)} tensors, fewer than the {num_layers} layers of its config: put "
      "config.json and weights of the same VAE together"
    )
  layout = stored_layout(config)
  expected = {key: shape for key, (_, shape) in layout.items()}
  if named := tensor_files.differences(expected, tensors):
    raise UserError(
      f"{source} does not have the weights of its config ({named}): put config.json and weights "
      "of the same VAE together, as save_pretrained of diffusers writes them"
    )
  store.check_finite(source, tensors, "download or convert the VAE again")
  params = {}
  for key, (path, shape) in layout.items():
    axes = np.argsort(STORED_AXES[len(shape)])
    params[path] = np.array(tensors[key].transpose(axes), np.float32, order="C")
  return flax.traverse_util.unflatten_dict(params)
