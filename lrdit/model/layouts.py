"""The files in which trained DiTs come: the names, order and axes of their parameters.

- `own`: a parameter's path is its name, such as "blocks_0/attn/qkv/kernel"; a layer has a kernel,
  or the factors down and up.
- `official`: the published PyTorch code (Peebles and Xie 2023), dense.
- `diffusers`: `DiTTransformer2DModel`, dense, with query, key and value apart and the embedders of
  timestep and label once in every block.

PyTorch stores a kernel as (D_out, D_in), and the patch embedding as a convolution (D, C, p, p).

Timestep frequencies: the official code divides them by half of 256, and diffusers by half - 1. The
published diffusers checkpoints hold the official weights, which diffusers' own conversion script
(scripts/convert_dit_to_diffusers.py) downloads and copies without a change to the timestep
embedder: they were trained with half. So `model.frequency_shift=0` is right for both, and 1 gives
the outputs that diffusers computes, which is right for weights that were trained in diffusers.
"""

import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import flax
import numpy as np

from lrdit.model import dit, tensor_files
from lrdit.model.tensor_files import Shape
from lrdit.runtime import store
from lrdit.runtime.errors import UserError

OWN, OFFICIAL, DIFFUSERS = LAYOUTS = ("own", "official", "diffusers")
# A tensor that only files of a layout have.
MARKERS = {OWN: "patch_embed/bias", OFFICIAL: "x_embedder.proj.bias"}
MARKERS |= {DIFFUSERS: "pos_embed.proj.bias"}
POSITIONS = "pos_embed"  # the official layout's fixed embedding, which no parameter holds
CLASS_NAMES = ("DiTTransformer2DModel", "Transformer2DModel")  # the latter of older diffusers
EMBEDDING = "y_embedder/embedding"

# A parameter's copies in a file, each of one or more parts along the output axis, by their names.
Copies = tuple[tuple[str, ...], ...]

_OFFICIAL_NAMES = {
  "patch_embed": "x_embedder.proj",
  "t_embedder/fc1": "t_embedder.mlp.0",
  "t_embedder/fc2": "t_embedder.mlp.2",
  "final_layer/adaln": "final_layer.adaLN_modulation.1",
  "final_layer/linear": "final_layer.linear",
}
_OFFICIAL_BLOCK = {
  "adaln": "adaLN_modulation.1",
  "attn/qkv": "attn.qkv",
  "attn/proj": "attn.proj",
  "mlp/fc1": "mlp.fc1",
  "mlp/fc2": "mlp.fc2",
}
_DIFFUSERS_NAMES = {
  "patch_embed": "pos_embed.proj",
  "final_layer/adaln": "proj_out_1",
  "final_layer/linear": "proj_out_2",
}
_DIFFUSERS_BLOCK = {
  "adaln": ("norm1.linear",),
  "attn/qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
  "attn/proj": ("attn1.to_out.0",),
  "mlp/fc1": ("ff.net.0.proj",),
  "mlp/fc2": ("ff.net.2",),
}
_DIFFUSERS_EMBEDDERS = {
  "t_embedder/fc1": "norm1.emb.timestep_embedder.linear_1",
  "t_embedder/fc2": "norm1.emb.timestep_embedder.linear_2",
}


def flat(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Return a tree of parameters by path; `nest` inverts it."""
  return flax.traverse_util.flatten_dict(dict(params), sep="/")


def nest(params: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Return parameters by path as a tree."""
  return flax.traverse_util.unflatten_dict(dict(params), sep="/")


def dense_shapes(shape: dit.DiTShape) -> dict[str, Shape]:
  """Return the shape of every parameter of a dense model by its path."""
  shapes: dict[str, Shape] = {}
  for name, dims in dit.layer_shapes(shape).items():
    shapes |= {f"{name}/kernel": dims, f"{name}/bias": dims[1:]}
  table = {EMBEDDING: (shape.num_classes + 1, shape.hidden_size)} if shape.num_classes else {}
  return shapes | table


def _official_layers(shape: dit.DiTShape) -> dict[str, Copies]:
  layers = {ours: ((theirs,),) for ours, theirs in _OFFICIAL_NAMES.items()}
  for i in range(shape.depth):
    names = _OFFICIAL_BLOCK.items()
    layers |= {f"blocks_{i}/{ours}": ((f"blocks.{i}.{theirs}",),) for ours, theirs in names}
  return layers


def _diffusers_layers(shape: dit.DiTShape) -> dict[str, Copies]:
  layers = {ours: ((theirs,),) for ours, theirs in _DIFFUSERS_NAMES.items()}
  blocks = [f"transformer_blocks.{i}" for i in range(shape.depth)]
  for ours, theirs in _DIFFUSERS_EMBEDDERS.items():
    layers[ours] = tuple((f"{block}.{theirs}",) for block in blocks)
  for i, block in enumerate(blocks):
    for ours, parts in _DIFFUSERS_BLOCK.items():
      layers[f"blocks_{i}/{ours}"] = (tuple(f"{block}.{part}" for part in parts),)
  return layers


def _names(layout: str, shape: dit.DiTShape) -> dict[str, Copies]:
  """Return the names of every parameter of a dense model by its path, in a foreign layout."""
  if layout == OFFICIAL:
    layers, table = _official_layers(shape), (("y_embedder.embedding_table.weight",),)
  else:
    layers = _diffusers_layers(shape)
    key = "norm1.emb.class_embedder.embedding_table.weight"
    table = tuple((f"transformer_blocks.{i}.{key}",) for i in range(shape.depth))
  names = {}
  for path in dense_shapes(shape):
    layer, _, part = path.rpartition("/")
    part = "weight" if part == "kernel" else part
    copies = layers.get(layer, ())
    names[path] = tuple(tuple(f"{key}.{part}" for key in keys) for keys in copies) or table
  return names


def _stored_axes(path: str, shape: dit.DiTShape) -> tuple[Shape, Shape]:
  """Return the shape to view a parameter of ours in, and its axes in PyTorch's order."""
  if path == "patch_embed/kernel":
    return (shape.patch_size, shape.patch_size, shape.channels, shape.hidden_size), (3, 2, 0, 1)
  dims = dense_shapes(shape)[path]
  return dims, (1, 0) if path.endswith("/kernel") else tuple(range(len(dims)))


def to_tensors(
  layout: str, params: Mapping[str, np.ndarray], shape: dit.DiTShape
) -> dict[str, np.ndarray]:
  """Return a dense model's tensors by name in a foreign layout, from parameters by path."""
  tensors = {}
  for path, copies in _names(layout, shape).items():
    view, axes = _stored_axes(path, shape)
    stored = np.asarray(params[path]).reshape(view).transpose(axes)
    for keys in copies:
      tensors |= dict(zip(keys, np.split(stored, len(keys)), strict=True))
  if layout == OFFICIAL:
    tensors[POSITIONS] = _positions(shape)
  return tensors


def detect(names: Collection[str], source: str) -> str:
  """Return the layout of a file with tensors of these names; `source` names it in the error."""
  for layout, marker in MARKERS.items():
    if marker in names:
      return layout
  known = "; ".join(f"{layout} has {marker}" for layout, marker in MARKERS.items())
  first = f", such as {min(names)}" if names else ""
  raise UserError(
    f"{source} has no layout of a DiT that is known ({known}): it has {len(names)} tensors{first}"
  )


def to_params(
  layout: str, tensors: Mapping[str, np.ndarray], shape: dit.DiTShape, source: str
) -> dict[str, np.ndarray]:
  """Return the parameters in float32 by path; of the layout `own` with factors as they are.

  Raises:
    UserError: a tensor is missing, unknown, misshaped or not finite, or embedders differ between
      blocks; the message names `source` and the tensor.
  """
  expected = _own_shapes(tensors, shape) if layout == OWN else _foreign_shapes(layout, shape)
  if named := tensor_files.differences(expected, tensors):
    raise UserError(
      f"{source} has the {layout} layout, but is not of this model ({named}): choose the model and "
      "classes that it was trained with, or another file"
    )
  store.check_finite(source, tensors, "download or convert the model again")
  if layout == OWN:
    return {path: np.asarray(tensor, np.float32) for path, tensor in tensors.items()}
  if layout == OFFICIAL and not np.allclose(tensors[POSITIONS], _positions(shape), atol=1e-3):
    raise UserError(f"{source} has another {POSITIONS} than the fixed one, and cannot be used")
  params = {}
  for path, copies in _names(layout, shape).items():
    for keys in copies[1:]:
      if not np.array_equal(tensors[keys[0]], tensors[copies[0][0]]):
        raise UserError(
          f"{source} has another {keys[0]} than {copies[0][0]}: this model has one embedder for "
          "all blocks, and cannot represent embedders that differ"
        )
    view, axes = _stored_axes(path, shape)
    stored = np.concatenate([np.asarray(tensors[key], np.float32) for key in copies[0]])
    params[path] = np.ascontiguousarray(stored.transpose(np.argsort(axes)))
    params[path] = params[path].reshape(dense_shapes(shape)[path])
    assert stored.shape == tuple(view[axis] for axis in axes)
  return params


def _positions(shape: dit.DiTShape) -> np.ndarray:
  return dit.position_embedding(shape.hidden_size, shape.image_size // shape.patch_size)[None]


def _foreign_shapes(layout: str, shape: dit.DiTShape) -> dict[str, Shape]:
  shapes = {}
  for path, copies in _names(layout, shape).items():
    view, axes = _stored_axes(path, shape)
    first, *rest = (view[axis] for axis in axes)
    shapes |= {key: (first // len(keys), *rest) for keys in copies for key in keys}
  return shapes | ({POSITIONS: _positions(shape).shape} if layout == OFFICIAL else {})


def _own_shapes(tensors: Mapping[str, np.ndarray], shape: dit.DiTShape) -> dict[str, Shape]:
  """Return the shapes of our parameters, where layers with a factor have the rank of `down`."""
  shapes = dense_shapes(shape)
  for name, (dim_in, dim_out) in dit.layer_shapes(shape).items():
    down = tensors.get(f"{name}/down")
    if down is not None and down.ndim == 2:
      del shapes[f"{name}/kernel"]
      rank = down.shape[1]
      shapes |= {f"{name}/down": (dim_in, rank), f"{name}/up": (rank, dim_out)}
  return shapes


def diffusers_config(shape: dit.DiTShape) -> dict[str, Any]:
  """Return the fields of a `DiTTransformer2DModel`'s config.json that fix what it computes."""
  return {
    "_class_name": CLASS_NAMES[0],
    "sample_size": shape.image_size,
    "in_channels": shape.channels,
    "out_channels": shape.out_channels,
    "num_layers": shape.depth,
    "num_attention_heads": shape.num_heads,
    "attention_head_dim": shape.head_size,
    "patch_size": shape.patch_size,
    "num_embeds_ada_norm": shape.num_classes,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": dit.LAYER_NORM_EPSILON,
  }


def check_diffusers_config(path: pathlib.Path, shape: dit.DiTShape) -> dict[str, Any]:
  """Return the fields of a diffusers config.json, or raise a UserError if it is another model's.

  Its `norm_eps`, of one of a block's norms, is not compared: it is 1e-5 in the published files by
  default, although their weights were trained with 1e-6.
  """
  stored, ours = store.read_json(path, "restore it"), diffusers_config(shape)
  theirs = {name: stored.get(name, value) for name, value in ours.items()}
  theirs["out_channels"] = theirs["out_channels"] or theirs["in_channels"]
  theirs["norm_eps"] = ours["norm_eps"]
  if theirs["_class_name"] in CLASS_NAMES:
    theirs["_class_name"] = CLASS_NAMES[0]
  fix = "choose the model and classes that it was trained with, or another directory"
  store.check_same(f"{path} is of another model", ours, theirs, fix)
  return stored
