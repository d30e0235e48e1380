"""Your own images as the arrays of an .npz file.

`image` is (N, H, W) or (N, H, W, C) uint8: gray, RGB or RGBA. `label`, which may be missing, is
(N,) integers in [0, K). About one image in twenty is held out, by a hash of its index.

Axes: N examples, b requested examples, H W image, C channels.
"""

import hashlib
import logging
import os
import zipfile
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, UInt8
from PIL import Image

from lrdit.data import images
from lrdit.data import source as sources
from lrdit.data.source import DataOptions, DecodedImages, Source
from lrdit.runtime import store
from lrdit.runtime.errors import UserError
from lrdit.runtime.text import name_some

HOW_TO_MAKE = "make it by np.savez(path, image=..., label=...)"

log = logging.getLogger("lrdit")


def fingerprint_npz(split: str, options: DataOptions) -> dict[str, Any]:
  """Return the fingerprint of `load_npz`'s source without its number of examples."""
  with open(_path(options), "rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
  crop = images.crop_name(0, options.image_size)
  return {"name": "npz", "split": split, "crop": crop, "digest": digest[:16]}


def load_npz(split: str, options: DataOptions) -> Source:
  """Load a split of an .npz file into memory, as center-cropped and resized uint8 images."""
  path = _path(options)
  arrays = _read_arrays(path)
  scans = _check_images(path, arrays["image"])
  labels, num_classes = np.zeros(len(scans), np.int32), 0
  if "label" in arrays:
    labels = _check_labels(path, arrays["label"], len(scans))
    num_classes = int(labels.max()) + 1
  chosen = sources.choose_split((str(i).encode() for i in range(len(scans))), split, "add images")
  rows, size = scans[chosen], options.image_size
  if rows.shape[1:] != (size, size, options.num_channels):
    rows = _fit(rows, options)
  fingerprint = fingerprint_npz(split, options) | {"num_examples": len(chosen)}
  return Source(rows, labels[chosen], num_classes, fingerprint)


def _path(options: DataOptions) -> str:
  path = sources.own_path(options, "npz", os.path.isfile, "the .npz file of your images")
  if not zipfile.is_zipfile(path):
    found = sources.describe_path(path)
    raise UserError(f"{path} is not an .npz, or is cut short (it is {found}): {HOW_TO_MAKE}")
  return path


def _read_arrays(path: str) -> dict[str, np.ndarray]:
  """Return the arrays `image` and, if there is one, `label`; warn of others."""
  try:
    with zipfile.ZipFile(path) as archive:
      names = [name.removesuffix(".npy") for name in archive.namelist()]
    arrays = store.read_arrays(path, ("image", "label"))
  except (*store.DAMAGE, OSError) as error:
    raise UserError(
      f"{path} is damaged, or its arrays are not plain numbers ({error}): {HOW_TO_MAKE}"
    ) from error
  if "image" not in arrays:
    rename = "; arr_0 was saved without a name: rename it" if "arr_0" in names else ""
    raise UserError(f"{path} has no array image, only {name_some(names)}{rename}: {HOW_TO_MAKE}")
  unused = sorted(set(names) - set(arrays))
  if unused:
    log.warning("left out: arrays of %s besides image and label: %s", path, name_some(unused))
  return arrays


def _check_images(path: str, image: np.ndarray) -> UInt8[np.ndarray, "N H W C"]:
  """Return the array `image` with a channel axis."""
  if image.dtype != np.uint8:
    raise UserError(f"image in {path} is {image.dtype}: it must be uint8 in [0, 255]")
  shape = image.shape if image.ndim == 4 else (*image.shape, 1)
  if len(shape) != 4 or shape[3] not in (1, 3, 4) or 0 in shape:
    raise UserError(
      f"image in {path} has the shape {image.shape}: it must be (N, H, W), or (N, H, W, C) with 1, "
      "3 or 4 channels, and not empty"
    )
  return image.reshape(shape)


def _check_labels(path: str, label: np.ndarray, total: int) -> Int32[np.ndarray, " N"]:
  if label.shape != (total,):
    raise UserError(f"label in {path} has the shape {label.shape}: it must be ({total},)")
  if label.dtype.kind not in "iu":
    raise UserError(f"label in {path} is {label.dtype}: it must be integers")
  if label.min() < 0 or label.max() >= np.iinfo(np.int32).max:
    raise UserError(
      f"label in {path} runs from {label.min()} to {label.max()}: number the classes from 0"
    )
  return label.astype(np.int32)


def _fit(scans: UInt8[np.ndarray, "N H W C"], options: DataOptions) -> DecodedImages:
  """Return images of another size or kind, converted when they are indexed."""
  size, num_channels = options.image_size, options.num_channels
  scans = scans[..., 0] if scans.shape[-1] == 1 else scans
  sides = np.broadcast_to([scans.shape[2], scans.shape[1]], (len(scans), 2))
  kind = images.conversion(Image.fromarray(scans[0]), num_channels)
  images.report_conversions([kind] * len(scans), sides, size, num_channels)

  def decode(index: Int[np.ndarray, " b"]) -> list[UInt8[np.ndarray, "size size C"]]:
    return [images.fit(Image.fromarray(scans[i]), 0, size, num_channels) for i in index]

  return DecodedImages(decode, (len(scans), size, size, num_channels), options.cache_bytes)
