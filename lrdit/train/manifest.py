"""A checkpoint's record of its arrays, against which a restored one is checked.

A manifest is JSON: the step; the dtype, shape and CRC-32 of every array by its path; the CRC-32 of
the run's config; and a CRC-32 of all that.
"""

import re
import zlib
from typing import Any

import flax
import jax
import numpy as np

from lrdit.runtime.store import crc32_of_json


class DamagedCheckpoint(Exception):
  """A checkpoint that cannot be read or whose contents changed."""


def _leaves(tree: Any) -> dict[str, Any]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def layout(tree: Any) -> dict[str, str]:
  """Return dtype and shape of every leaf by its path, for arrays and templates."""
  return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in _leaves(tree).items()}


def checksums(tree: Any) -> dict[str, int]:
  """Return the CRC-32 of every array by its path."""
  return {path: zlib.crc32(np.ascontiguousarray(leaf)) for path, leaf in _leaves(tree).items()}


def make_manifest(step: int, items: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
  """Return the manifest of a checkpoint's trees by name and of its config."""
  arrays = {n: {"layout": layout(tree), "crc32": checksums(tree)} for n, tree in items.items()}
  contents = {"step": step, "items": arrays, "config": crc32_of_json(config)}
  return {"contents": contents, "crc32": crc32_of_json(contents)}


def check_manifest(step: int, manifest: Any, config: Any) -> dict[str, Any]:
  """Return the "layout" and "crc32" of each tree by name.

  Raise DamagedCheckpoint if the manifest or the config changed, or they belong to another step.
  """
  contents = manifest.get("contents") if isinstance(manifest, dict) else None
  if contents is None or manifest.get("crc32") != crc32_of_json(contents):
    raise DamagedCheckpoint("its manifest changed")
  if contents["step"] != step:
    raise DamagedCheckpoint(
      f"it holds step {contents['step']}: give the directory that name to use it"
    )
  # Checkpoints from before 2026-11-28 do not tell their config's checksum.
  if contents.get("config", crc32_of_json(config)) != crc32_of_json(config):
    raise DamagedCheckpoint("its config changed")
  return contents["items"]


def zeros(layout: dict[str, str]) -> Any:
  """Return the tree of plain dicts with read-only zeros, of no size, that a layout describes.

  Raise DamagedCheckpoint if it describes none.
  """
  flat = {}
  for path, kind in layout.items():
    try:
      dtype, shape = re.fullmatch(r"(\w+)\[(.*)\]", kind).groups()
      sizes = [int(size) for size in shape.split(",") if size]
      leaf = np.broadcast_to(np.zeros((), dtype), sizes)
    except (AttributeError, TypeError, ValueError) as error:
      raise DamagedCheckpoint(f"its manifest has {path} of {kind}") from error
    flat[tuple(re.findall(r"\['([^']*)'\]", path))] = leaf
  return flax.traverse_util.unflatten_dict(flat)


def merge(fresh: Any, stored: Any) -> Any:
  """Return the tree `fresh` of plain dicts with those leaves of `stored` that have its layout."""
  if isinstance(fresh, dict):
    stored = stored if isinstance(stored, dict) else {}
    return {name: merge(value, stored.get(name)) for name, value in fresh.items()}
  return stored if stored is not None and layout(fresh) == layout(stored) else fresh
