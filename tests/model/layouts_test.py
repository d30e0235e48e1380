"""Layouts of trained DiTs: outputs of the reference implementations, and files of other models."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lrdit.model import dit, layouts, low_rank, tensor_files
from lrdit.rank import plan as rank_plan
from lrdit.runtime.errors import UserError
from tests.tiny import GOLDEN

FOREIGN = (layouts.OFFICIAL, layouts.DIFFUSERS)


@functools.cache
def golden(layout):
  """The shape, tensors and arrays of a reference file."""
  with np.load(GOLDEN / f"dit_{layout}_layout.npz") as file:
    arrays = dict(file)
  c = json.loads(str(arrays.pop("config")))
  prefix = "state_dict/"
  tensors = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
  if layout == layouts.OFFICIAL:
    width, classes, depth, size = "hidden_size", "num_classes", "depth", "input_size"
    heads, sigma = c["num_heads"], c["learn_sigma"]
  else:
    width, classes, depth, size = "hidden_size", "num_embeds_ada_norm", "num_layers", "sample_size"
    heads, sigma = c["num_attention_heads"], c["out_channels"] == 2 * c["in_channels"]
    c[width] = heads * c["attention_head_dim"]
  names = (size, "in_channels", classes, width, depth)
  patch = c["patch_size"]
  return dit.DiTShape(*(c[name] for name in names), heads, patch, sigma), tensors, arrays


def output(params, shape, arrays, frequency_shift=0):
  """The model's output for a reference's inputs, NCHW."""
  model = dit.DiT(shape, rank_plan.dense_plan(1000), frequency_shift=frequency_shift)
  tree = {"params": jax.tree.map(jnp.asarray, layouts.nest(params))}
  x, t, y = arrays["x"].transpose(0, 2, 3, 1), arrays["t"], arrays["y"]
  ids = (jnp.asarray(t, jnp.int32), jnp.asarray(y, jnp.int32))
  out = model.apply(tree, jnp.asarray(x), *ids, low_rank.RankSelection())
  return np.asarray(out).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("layout", FOREIGN)
def test_outputs_are_those_of_the_reference(layout):
  shape, tensors, arrays = golden(layout)
  assert layouts.detect(tensors, "a") == layout
  params = layouts.to_params(layout, tensors, shape, "a")
  shift = int(layout == layouts.DIFFUSERS)
  np.testing.assert_allclose(output(params, shape, arrays, shift), arrays["out"], atol=1e-5)
  # Another divisor of the timestep frequencies is another function.
  assert np.abs(output(params, shape, arrays, 1 - shift) - arrays["out"]).max() > 1e-3


@pytest.mark.parametrize("layout", FOREIGN)
def test_writing_a_layout_inverts_reading_it(layout):
  shape, tensors, _ = golden(layout)
  written = layouts.to_tensors(layout, layouts.to_params(layout, tensors, shape, "a"), shape)
  assert written.keys() == tensors.keys()
  for key, tensor in tensors.items():
    np.testing.assert_allclose(written[key], tensor, atol=1e-6)


def changed(layout, key, value):
  _, tensors, _ = golden(layout)
  return {k: v for k, v in (tensors | {key: value}).items() if v is not None}


NAN = np.full(48, np.nan, np.float32)
MLP, TIME = "blocks.1.mlp.fc1.bias", "norm1.emb.timestep_embedder.linear_1.bias"
FAULTS = [
  ("official", MLP, None, r"1 missing: blocks\.1\.mlp\.fc1\.bias"),
  ("official", "extra", np.zeros(3), r"1 unknown: extra"),
  ("official", MLP, np.zeros(7), r"blocks\.1\.mlp\.fc1\.bias \(7,\) instead of \(192,\)"),
  ("official", "x_embedder.proj.bias", NAN, r"not finite \(1 of .*x_embedder\.proj\.bias\)"),
  ("official", "pos_embed", np.zeros((1, 16, 48), np.float32), r"another pos_embed"),
  ("diffusers", f"transformer_blocks.1.{TIME}", np.ones(48, np.float32), r"one embedder for all"),
  ("diffusers", "transformer_blocks.0.attn1.to_v.bias", None, r"1 missing: .*to_v\.bias"),
]


@pytest.mark.parametrize(("layout", "key", "value", "words"), FAULTS)
def test_a_wrong_tensor_is_named(layout, key, value, words):
  shape, _, _ = golden(layout)
  with pytest.raises(UserError, match=words):
    layouts.to_params(layout, changed(layout, key, value), shape, "the file")


def test_a_file_of_no_known_layout_is_refused():
  with pytest.raises(UserError, match=r"x has no layout of a DiT.* 1 tensors, such as a\.b"):
    layouts.detect(["a.b"], "x")


def test_own_layers_have_a_kernel_or_both_factors():
  shape, tensors, _ = golden("official")
  params = layouts.to_params("official", tensors, shape, "a")
  kernel = params.pop("blocks_0/attn/proj/kernel")
  factors = {"down": kernel[:, :5], "up": kernel[:5]}
  params |= {f"blocks_0/attn/proj/{part}": value for part, value in factors.items()}
  assert layouts.to_params("own", params, shape, "a").keys() == params.keys()
  params["blocks_0/attn/proj/up"] = kernel[:4]
  with pytest.raises(UserError, match=re.escape("proj/up (4, 48) instead of (5, 48)")):
    layouts.to_params("own", params, shape, "a")


def test_a_diffusers_config_of_another_model_is_refused(tmp_path):
  shape, _, _ = golden("diffusers")
  path = tmp_path / "config.json"
  old = layouts.diffusers_config(shape) | {"_class_name": "Transformer2DModel", "norm_eps": 1e-5}
  path.write_text(json.dumps(old))
  assert layouts.check_diffusers_config(path, shape) == old
  with pytest.raises(UserError, match=r"num_layers \(2 there, 3 asked for\)"):
    layouts.check_diffusers_config(path, dataclasses.replace(shape, depth=3))


def test_shards_are_read_by_their_index(tmp_path):
  _, tensors, _ = golden("diffusers")
  keys = list(tensors)
  shards = {"a.safetensors": keys[:9], "b.safetensors": keys[9:]}
  for name, own in shards.items():
    safetensors.numpy.save_file({k: tensors[k].copy() for k in own}, tmp_path / name)
  weight_map = {key: name for name, own in shards.items() for key in own}
  index = tmp_path / "m.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": weight_map}))
  read = tensor_files.read_tensors(index, "ema")
  assert all(np.array_equal(read[key], tensors[key]) for key in tensors)
  index.write_text(json.dumps({"weight_map": weight_map | {keys[0]: "b.safetensors"}}))
  with pytest.raises(UserError, match=re.escape(f"differ: {keys[0]} is only in the file")):
    tensor_files.read_tensors(index, "ema")
  (tmp_path / "b.safetensors").unlink()
  index.write_text(json.dumps({"weight_map": weight_map}))
  with pytest.raises(UserError, match=r"b\.safetensors, which m.*index\.json lists, is missing"):
    tensor_files.read_tensors(index, "ema")


def test_a_pickle_is_read_as_tensors_alone(tmp_path):
  torch = pytest.importorskip("torch")
  _, tensors, _ = golden("official")
  state = {key: torch.from_numpy(tensor) for key, tensor in tensors.items()}
  path = tmp_path / "a.pt"
  for stored in (state, {"ema": state, "model": {}}):
    torch.save(stored, path)
    read = tensor_files.read_tensors(path, "ema")
    assert all(np.array_equal(read[key], tensors[key]) for key in tensors)
  torch.save({"ema": state}, path)
  with pytest.raises(UserError, match=r"a\.pt is no state_dict of tensors"):
    tensor_files.read_tensors(path, "raw")
  torch.save({"model": print}, path)
  with pytest.raises(UserError, match=r"a\.pt is damaged, or holds more than tensors"):
    tensor_files.read_tensors(path, "ema")
