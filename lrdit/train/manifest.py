"""A checkpoint's record of its contents, against which a restored one is checked.

A manifest is JSON: the step; the dtype, shape and CRC-32 of every array by its path; the CRC-32 of
the run's config; and a CRC-32 of all that.
"""

import contextlib
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


def _is_complete(contents: Any) -> bool:
  """Return whether a manifest has the step, and a layout and a checksum of the same arrays."""
  try:
    items = contents["items"].values()
    return "step" in contents and all(i["layout"].keys() == i["crc32"].keys() for i in items)
  except (AttributeError, KeyError, TypeError):
    return False


def check_manifest(step: int, manifest: Any, config: Any) -> dict[str, Any]:
  """Return the "layout" and "crc32" of each tree by name.

  Raise DamagedCheckpoint if the manifest or the config changed, or they belong to another step.
  """
  contents = manifest.get("contents") if isinstance(manifest, dict) else None
  if contents is None or manifest.get("crc32") != crc32_of_json(contents):
    raise DamagedCheckpoint("its manifest changed")
  if not _is_complete(contents):
    raise DamagedCheckpoint("its manifest is not complete")
  if contents["step"] != step:
    raise DamagedCheckpoint(
      f"it holds step {contents['step']}: give the directory that name to use it"
    )
  # The manifests of checkpoints from before 2026-11-28 lack their config's checksum.
  if contents.get("config", crc32_of_json(config)) != crc32_of_json(config):
    raise DamagedCheckpoint("its config changed")
  return contents["items"]


def zeros(described: dict[str, str]) -> Any:
  """Return the tree of plain dicts that a `layout` describes, of zeros that take no memory.

  Raise DamagedCheckpoint if it describes none.
  """
  flat = {}
  for path, kind in described.items():
    try:
      dtype, shape = re.fullmatch(r"(\w+)\[(.*)\]", kind).groups()
      sizes = [int(size) for size in shape.split(",") if size]
      leaf = np.broadcast_to(np.zeros((), dtype), sizes)
    except (AttributeError, TypeError, ValueError) as error:
      raise DamagedCheckpoint(f"its manifest has {path} of {kind}") from error
    flat[tuple(re.findall(r"\['([^']*)'\]", path))] = leaf
  # The path of an array may be the beginning of another's.
  with contextlib.suppress(IndexError, TypeError, ValueError):
    tree = flax.traverse_util.unflatten_dict(flat)
    if layout(tree) == described:
      return tree
  raise DamagedCheckpoint("its manifest describes no tree")


def merge(fresh: Any, stored: Any) -> Any:
  """Return the tree `fresh` of plain dicts with those leaves of `stored` that have its layout."""
  if isinstance(fresh, dict):
    stored = stored if isinstance(stored, dict) else {}
    return {name: merge(value, stored.get(name)) for name, value in fresh.items()}
  return stored if stored is not None and layout(fresh) == layout(stored) else fresh
