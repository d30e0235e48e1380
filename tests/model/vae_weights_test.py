"""Reading the VAE files of diffusers."""

import dataclasses
import functools
import json
import math
import re
import shutil

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lrdit.model import vae, vae_weights
from lrdit.runtime.errors import UserError
from tests.tiny import GOLDEN

# Weights and outputs written by diffusers.
TINY = GOLDEN / "sd_vae_tiny"
STABLE_DIFFUSION = vae.VaeConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
NAMES_BEFORE = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def tiny_tensors():
  return safetensors.numpy.load_file(TINY / vae_weights.WEIGHTS_NAME)


def tiny_fields():
  return json.loads((TINY / "config.json").read_text())


def write(directory, tensors, fields=None, name=vae_weights.WEIGHTS_NAME):
  """Write weights and, if fields are given, a config.json; return the directory."""
  directory.mkdir(parents=True, exist_ok=True)
  contiguous = {key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}
  safetensors.numpy.save_file(contiguous, directory / name)
  if fields is not None:
    (directory / "config.json").write_text(json.dumps(fields))
  return directory


def old_key(key):
  for now, before in NAMES_BEFORE.items():
    key = key.replace(f".attentions.0.{now}.", f".attentions.0.{before}.")
  return key


def flat(params):
  return flax.traverse_util.flatten_dict(params, sep="/")


TEMPLATE = functools.cache(vae.params_template)


@pytest.fixture(autouse=True)
def architectures_are_traced_once(monkeypatch):
  """Tracing takes a second, and most tests read the same architecture."""
  monkeypatch.setattr(vae, "params_template", TEMPLATE)


@pytest.fixture(scope="module")
def tiny():
  return vae_weights.read_vae(TINY)


def test_stable_diffusion_has_the_published_number_of_parameters():
  layout = vae_weights.stored_layout(STABLE_DIFFUSION)
  assert sum(math.prod(shape) for _, shape in layout.values()) == 83_653_863
  leaves = jax.tree.leaves(vae.params_template(STABLE_DIFFUSION))
  assert sum(math.prod(leaf.shape) for leaf in leaves) == 83_653_863
  assert STABLE_DIFFUSION.downsample_factor == 8


def test_the_layout_maps_one_to_one_to_diffusers_tensors(tiny):
  layout = vae_weights.stored_layout(tiny.config)
  stored = {key: tensor.shape for key, tensor in tiny_tensors().items()}
  assert {key: shape for key, (_, shape) in layout.items()} == stored
  assert {"/".join(path) for path, _ in layout.values()} == set(flat(tiny.params))
  assert len(flat(tiny.params)) == len(stored)


def test_config_is_read(tiny):
  assert tiny.config == vae.VaeConfig(
    block_out_channels=(8, 16, 16, 32), layers_per_block=2, norm_num_groups=8
  )
  assert hash(tiny.config) == hash(dataclasses.replace(tiny.config))


def test_missing_config_fields_have_diffusers_defaults(tmp_path):
  path = tmp_path / "config.json"
  path.write_text(json.dumps({"_class_name": "AutoencoderKL"}))
  config = vae_weights.read_config(path)
  assert config.norm_num_groups == 32
  assert (config.scaling_factor, config.shift_factor) == (0.18215, 0.0)
  assert config.use_quant_conv
  assert config.use_post_quant_conv
  assert config.mid_block_add_attention


def test_the_scaling_is_read(tmp_path, tiny):
  fields = tiny_fields() | {"scaling_factor": 2, "shift_factor": 0.1159}
  read = vae_weights.read_vae(write(tmp_path, tiny_tensors(), fields))
  assert (read.config.scaling_factor, read.config.shift_factor) == (2.0, 0.1159)
  assert read.digest != tiny.digest


def test_directory_file_and_pipeline_give_the_same_vae(tmp_path, tiny):
  pipeline = tmp_path / "pipeline"
  shutil.copytree(TINY, pipeline / "vae")
  other = shutil.copytree(TINY, tmp_path / "other")
  (other / vae_weights.WEIGHTS_NAME).rename(other / "renamed.safetensors")
  paths = [str(TINY), TINY / vae_weights.WEIGHTS_NAME, pipeline, other]
  (tmp_path / "foreign").mkdir()
  foreign = shutil.copytree(pipeline, tmp_path / "foreign", dirs_exist_ok=True)
  (foreign / "config.json").write_text('{"_class_name": "Transformer"}')
  assert {vae_weights.read_vae(path).digest for path in [*paths, foreign]} == {tiny.digest}


def as_convolution(key, tensor):
  is_projection = ".attentions.0." in key and tensor.ndim == 2
  return tensor[:, :, None, None] if is_projection else tensor


@pytest.mark.parametrize("rename", [old_key, str])
@pytest.mark.parametrize("reshape", [as_convolution, lambda key, tensor: tensor])
def test_older_files_give_the_same_vae(tmp_path, tiny, rename, reshape):
  tensors = {rename(key): reshape(key, tensor) for key, tensor in tiny_tensors().items()}
  read = vae_weights.read_vae(write(tmp_path, tensors, tiny_fields()))
  assert read.digest == tiny.digest
  jax.tree.map(np.testing.assert_array_equal, read.params, tiny.params)


def test_the_golden_weights_have_layers_with_old_names():
  keys = set(tiny_tensors())
  assert len({old_key(key) for key in keys} - keys) == 2 * 4 * 2  # halves, layers, parameters


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_becomes_float32(tmp_path, tiny, dtype):
  tensors = {key: tensor.astype(dtype) for key, tensor in tiny_tensors().items()}
  read = vae_weights.read_vae(write(tmp_path, tensors, tiny_fields()))
  for path, array in flat(read.params).items():
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, flat(tiny.params)[path].astype(dtype))


def test_a_changed_weight_changes_the_digest(tmp_path, tiny):
  tensors = tiny_tensors()
  kernel = tensors["decoder.conv_out.weight"].copy()
  kernel[0, 0, 0, 0] = np.nextafter(kernel[0, 0, 0, 0], np.float32(1e3))
  changed = tensors | {"decoder.conv_out.weight": kernel}
  assert vae_weights.read_vae(write(tmp_path, changed, tiny_fields())).digest != tiny.digest


def test_exchanged_weights_change_the_digest(tmp_path, tiny):
  tensors = tiny_tensors()
  prefix = "encoder.mid_block.attentions.0"
  to_q, to_k = f"{prefix}.to_q.weight", f"{prefix}.to_k.weight"
  changed = tensors | {to_q: tensors[to_k], to_k: tensors[to_q]}
  assert vae_weights.read_vae(write(tmp_path, changed, tiny_fields())).digest != tiny.digest


def test_the_config_is_inferred_except_for_the_groups(tiny):
  """The golden VAE has 8 groups, which its weights do not show."""
  shapes = {key: tensor.shape for key, tensor in tiny_tensors().items()}
  assert vae_weights.infer_config(shapes, "") == dataclasses.replace(
    tiny.config, norm_num_groups=32
  )


@pytest.mark.parametrize(
  "config",
  [
    vae.VaeConfig(block_out_channels=(32,)),
    vae.VaeConfig(
      in_channels=1,
      out_channels=2,
      latent_channels=5,
      block_out_channels=(32, 64),
      layers_per_block=3,
      use_quant_conv=False,
      use_post_quant_conv=False,
      mid_block_add_attention=False,
    ),
    vae.VaeConfig(block_out_channels=(32, 32, 64), use_quant_conv=False),
    vae.VaeConfig(block_out_channels=(64, 32), use_post_quant_conv=False),
  ],
)
def test_weights_are_read_the_same_without_a_config(tmp_path, config):
  layout = vae_weights.stored_layout(config)
  tensors = {key: np.full(shape, 0.5, np.float16) for key, (_, shape) in layout.items()}
  fields = dataclasses.asdict(config) | {"_class_name": "AutoencoderKL"}
  bare = write(tmp_path / "bare", {old_key(key): t for key, t in tensors.items()})
  read = vae_weights.read_vae(bare / vae_weights.WEIGHTS_NAME)
  assert read.config == config
  assert read.digest == vae_weights.read_vae(write(tmp_path / "with", tensors, fields)).digest


def not_finite():
  kernel = tiny_tensors()["quant_conv.weight"]
  kernel.reshape(-1)[-1] = np.nan
  bias = np.array([0, 1, np.inf], jnp.bfloat16)
  return {"quant_conv.weight": kernel, "decoder.conv_out.bias": bias}


# Changed tensors of the golden weights (None drops one), and words of the error.
TENSORS = {
  "dropped": (
    {"quant_conv.bias": None, "quant_conv.weight": None},
    r"2 missing: quant_conv.bias, quant_conv.weight\)",
  ),
  "added": (
    {f"extra.{i}": np.zeros(1, np.float32) for i in range(5)},
    r"5 unknown: extra.0, extra.1, extra.2 and 2 more\).*same VAE",
  ),
  "reshaped": (
    {"encoder.conv_in.weight": np.zeros((8, 4, 3, 3), np.float32)},
    r"1 of another shape: encoder.conv_in.weight \(8, 4, 3, 3\) instead of \(8, 3, 3, 3\)",
  ),
  "not finite": (
    not_finite(),
    r"not finite \(2 of \d+ arrays, such as decoder\.conv_out\.bias\): download or c",
  ),
  "integers": (
    {"quant_conv.bias": np.zeros(8, np.int32)},
    r"quant_conv.bias in I32: .*F32, F16, BF16",
  ),
  "8 bits": (
    {"quant_conv.bias": np.zeros(8, jnp.float8_e4m3fn)},
    r"quant_conv.bias in F8_E4M3: ",
  ),
  "both names": (
    {old_key(key): tensor for key, tensor in tiny_tensors().items()},
    r"both \S*\.mid_block\.attentions\.0\.\S* and \S*\.to_",
  ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_weights_of_another_model_are_refused(tmp_path, name):
  changed, message = TENSORS[name]
  tensors = {key: t for key, t in (tiny_tensors() | changed).items() if t is not None}
  with pytest.raises(UserError, match=message):
    vae_weights.read_vae(write(tmp_path, tensors, tiny_fields()))


def another_layout(directory):
  tensors = {f"first_stage_model.{key}": tensor for key, tensor in tiny_tensors().items()}
  write(directory, tensors)
  (directory / "config.json").unlink()


def several(directory):
  weights = directory / vae_weights.WEIGHTS_NAME
  for name in ("a", "b"):
    shutil.copy(weights, directory / f"{name}.safetensors")
  weights.unlink()


def weights_of(directory):
  return directory / vae_weights.WEIGHTS_NAME


# Changes to a copy of the golden directory, and words of the error.
FILES = {
  "no config": (
    lambda d: (d / "config.json").unlink(),
    r"norm_num_groups=32 does not divide .*: put the VAE's own config.json",
  ),
  "another layout": (another_layout, r"not a VAE in diffusers' layout.*convert it with save_pret"),
  "truncated": (
    lambda d: weights_of(d).write_bytes(weights_of(d).read_bytes()[:-1000]),
    r"diffusion_pytorch_model.safetensors is not a safetensors file, or is damaged",
  ),
  "no safetensors": (
    lambda d: weights_of(d).write_bytes(b"<html>not found</html>"),
    r"diffusion_pytorch_model.safetensors is not a safetensors file, or is damaged",
  ),
  "several": (several, r"several .safetensors files .*a.safetensors, b.safetensors"),
  "no weights": (lambda d: weights_of(d).unlink(), r"has no .safetensors file"),
  "pickled": (
    lambda d: weights_of(d).rename(weights_of(d).with_suffix(".bin")),
    r"\.bin is a pickle.* save_pretrained\(safe_serialization=True\)",
  ),
  "gone": (shutil.rmtree, r"does not exist: give a directory"),
}


@pytest.mark.parametrize("name", FILES)
def test_missing_and_damaged_files_are_refused(tmp_path, name):
  change, message = FILES[name]
  directory = shutil.copytree(TINY, tmp_path / "vae")
  change(directory)
  with pytest.raises(UserError, match=message):
    vae_weights.read_vae(directory)


@pytest.mark.parametrize("suffix", vae_weights.PICKLE_SUFFIXES)
def test_a_pickle_is_refused_without_reading_it(tmp_path, suffix):
  path = tmp_path / f"model{suffix}"
  path.touch()
  with pytest.raises(UserError, match=r"is a pickle.*safe_serialization=True"):
    vae_weights.read_vae(path)


BAD_FIELDS = [
  ("_class_name", "AutoencoderTiny", "_class_name='AutoencoderTiny', not 'AutoencoderKL'"),
  ("_class_name", None, "_class_name=None, not 'AutoencoderKL'"),
  ("act_fn", "relu", "act_fn='relu', but only \"silu\" is supported"),
  ("latents_mean", [0.0], "latents_mean=[0.0], but only null is supported"),
  ("latents_std", [1.0], "latents_std=[1.0], but only null is supported"),
  ("down_block_types", ["AttnDownEncoderBlock2D"], 'only "DownEncoderBlock2D" is supported'),
  ("up_block_types", ["UpDecoderBlock2D", "X"], 'only "UpDecoderBlock2D" is supported'),
  ("up_block_types", None, 'only "UpDecoderBlock2D" is supported'),
  ("latent_channels", 4.5, "latent_channels=4.5 is not a whole number from 1 to 65536"),
  ("norm_num_groups", 0, "norm_num_groups=0 is not a whole number from 1 to 65536"),
  ("layers_per_block", True, "layers_per_block=True is not a whole number from 1 to 65536"),
  ("norm_num_groups", 16, "norm_num_groups=16 does not divide"),
  ("block_out_channels", [], "block_out_channels=[] is not a list of whole numbers from 1"),
  ("block_out_channels", 8, "block_out_channels=8 is not a list of whole numbers from 1"),
  ("scaling_factor", "1", "scaling_factor='1' is not a finite number"),
  ("scaling_factor", 0, "scaling_factor=0 is not a number other than 0"),
  ("shift_factor", math.nan, "shift_factor=nan is not a finite number"),
  ("use_quant_conv", 1, "use_quant_conv=1 is not true or false"),
]


@pytest.mark.parametrize(("field", "value", "words"), BAD_FIELDS)
def test_bad_configs_are_refused(tmp_path, field, value, words):
  shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
  (tmp_path / "config.json").write_text(json.dumps(tiny_fields() | {field: value}))
  with pytest.raises(UserError, match=re.escape(words)):
    vae_weights.read_vae(tmp_path)


@pytest.mark.parametrize("content", [b'{"_class_name": "Auto', b"", b"[]", b"\xff\xfe"])
def test_a_damaged_config_is_refused(tmp_path, content):
  shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
  (tmp_path / "config.json").write_bytes(content)
  for path in (tmp_path, tmp_path / vae_weights.WEIGHTS_NAME):
    with pytest.raises(UserError, match=r"config.json is damaged .*: restore it"):
      vae_weights.read_vae(path)
