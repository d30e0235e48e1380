"""Tensors by name in files: safetensors, its shards with an index, and PyTorch's pickles."""

import pathlib
import pickle
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from lrdit.runtime import store
from lrdit.runtime.errors import UserError
from lrdit.runtime.paths import is_plain_name
from lrdit.runtime.text import name_some

Shape = tuple[int, ...]

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"  # in a directory that diffusers saved
INDEX_SUFFIX = ".index.json"  # of the file beside a model's shards that says where a tensor is
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
COPY_AGAIN = "copy or download it again"


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Return every tensor of a file by name, in the stored dtype and read from disk when used.

  Raises:
    UserError: the file is damaged, or has a tensor of another dtype than those of `DTYPES`.
  """
  try:
    with safetensors.safe_open(path, framework="numpy"):  # compares the header with the size
      pass
  except FileNotFoundError as error:
    raise UserError(f"{path} is missing: {COPY_AGAIN}") from error
  except safetensors.SafetensorError as error:
    raise UserError(
      f"{path} is not a safetensors file, or is damaged ({error}): {COPY_AGAIN}"
    ) from error
  data = np.memmap(path, np.uint8, "r")  # safetensors' own loaders do not know bfloat16
  size = int.from_bytes(data[:8].tobytes(), "little")
  with store.damage_of(path, COPY_AGAIN):
    header, data = store.parse_json(data[8 : 8 + size].tobytes()), data[8 + size :]
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in header.items():
      if entry["dtype"] not in DTYPES:
        raise UserError(
          f"{path} has {key} in {entry['dtype']}: give weights in one of {', '.join(DTYPES)}"
        )
      raw = data[slice(*entry["data_offsets"])]
      tensors[key] = np.frombuffer(raw, DTYPES[entry["dtype"]]).reshape(entry["shape"])
  return tensors


def read_shards(index: pathlib.Path) -> dict[str, np.ndarray]:
  """Return the tensors of the safetensors files that an index lists.

  Raises:
    UserError: index and files do not fit each other; the message names a tensor.
  """
  weight_map = store.read_json(index, COPY_AGAIN).get("weight_map")
  if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
    raise UserError(f"{index} has no weight_map of file names: {COPY_AGAIN}")
  tensors: dict[str, np.ndarray] = {}
  for name in sorted({*weight_map.values()}):
    if not is_plain_name(name):
      raise UserError(f"{index} names the file {name!r}, which is not beside it: {COPY_AGAIN}")
    path = index.with_name(name)
    if not path.is_file():
      raise UserError(f"{path}, which {index.name} lists, is missing: {COPY_AGAIN}")
    own = read_safetensors(path)
    listed = {key for key, file in weight_map.items() if file == name}
    if differing := sorted(own.keys() ^ listed):
      where = "the file" if differing[0] in own else "the index"
      raise UserError(f"{path} and {index.name} differ: {differing[0]} is only in {where}")
    tensors |= own
  return tensors


def read_torch(path: pathlib.Path, weights: str) -> dict[str, np.ndarray]:
  """Return the tensors of a file that PyTorch saved, in float32.

  It is read with weights_only=True, so no code in it is run. Of a training checkpoint, `weights`
  chooses the averaged ("ema") or raw ("raw") parameters.

  Raises:
    UserError: PyTorch is not installed, or the file is damaged or holds more than tensors.
  """
  try:
    import torch
  except ImportError as error:
    raise UserError(
      f"{path} is a pickle of PyTorch, which is not installed: install torch, or convert the file "
      "to safetensors with the same names"
    ) from error
  try:
    stored = torch.load(path, map_location="cpu", weights_only=True)
  except (pickle.UnpicklingError, *store.DAMAGE) as error:
    reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else "it is cut off"
    raise UserError(
      f"{path} is damaged, or holds more than tensors, which could run any code ({reason}): save "
      "its state_dict alone, or convert it to safetensors"
    ) from error
  if isinstance(stored, dict) and isinstance(stored.get("ema"), dict):
    stored = stored.get("ema" if weights == "ema" else "model")
  if not isinstance(stored, dict) or not all(map(torch.is_tensor, stored.values())):
    raise UserError(f"{path} is no state_dict of tensors: save one, or convert it to safetensors")
  return {key: tensor.detach().float().numpy() for key, tensor in stored.items()}


def read_tensors(path: pathlib.Path, weights: str) -> dict[str, np.ndarray]:
  """Return the tensors of safetensors, their shards' index (.json) or PyTorch's, by the name."""
  if path.suffix == ".json":
    return read_shards(path)
  return read_torch(path, weights) if path.suffix in PICKLE_SUFFIXES else read_safetensors(path)


def write_safetensors(
  path: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
  """Write tensors and text about them atomically."""
  contiguous = {key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}
  with store.atomic_path(path) as temporary:
    safetensors.numpy.save_file(contiguous, temporary, dict(metadata))


def differences(expected: Mapping[str, Shape], tensors: Mapping[str, Any]) -> str:
  """Return which tensors are missing, unknown or misshaped, or "" if all are as expected."""
  faults = {
    "missing": sorted(expected.keys() - tensors.keys()),
    "unknown": sorted(tensors.keys() - expected.keys()),
    "of another shape": [
      f"{key} {tensors[key].shape} instead of {shape}"
      for key, shape in expected.items()
      if key in tensors and tensors[key].shape != shape
    ],
  }
  return "; ".join(f"{len(k)} {kind}: {name_some(k)}" for kind, k in faults.items() if k)
