"""Images as files: decoding and cropping to a size, grids and single PNGs."""

import io
import math
import os
import pathlib

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from lrdit.runtime.errors import system_limit
from lrdit.runtime.store import atomic_path

MIN_TILE = 48  # pixels; smaller images are enlarged by a whole factor
GAP = 2  # white pixels between tiles
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


class UnreadableImage(Exception):
  """Bytes that are no image, or only part of one."""


def crop_name(crop_size: int, size: int) -> str:
  """Says what `fit` does, for the records that figures are compared by."""
  side = f"{crop_size} pixels" if crop_size else "short side"
  return f"centre crop of the {side}, bicubic antialiased resize to {size}"


def decode(file: bytes | os.PathLike) -> Image.Image:
  """Decodes a whole image from its bytes or a path.

  Raises:
    UnreadableImage: it is of no known format, damaged, cut short, or of a kind that cannot
      become RGB.
  """
  try:
    image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS)
    image.load()
    if image.mode.startswith("I;"):  # 16 bits in either order, of which PIL can do little
      image = image.convert("I")
    _check_kind(image)
  except UnreadableImage:
    raise
  except Exception as error:  # whatever the bytes lead PIL to, which keeps no list of it
    if system_limit(error) is not None:
      raise
    raise UnreadableImage(str(error) or type(error).__name__) from error
  return image


def _check_kind(image: Image.Image) -> None:
  """Refuses what `fit` cannot convert, or could only guess how to."""
  if image.mode == "F":
    raise UnreadableImage("its pixels are floats of unknown range")
  if image.mode == "LAB":
    raise UnreadableImage("its colours are CIELAB, not RGB or grey")
  if image.mode == "I":
    low, high = image.getextrema()
    if low < 0 or high >= 2**16:
      raise UnreadableImage("its pixels are not 16-bit numbers")


def fit(
  image: Image.Image, crop_size: int, size: int, num_channels: int
) -> UInt8[np.ndarray, "size size C"]:
  """Brings an image of any kind to one size and RGB or grey.

  Palettes and CMYK are converted, transparent pixels laid over white.

  Args:
    image: decoded.
    crop_size: side of the centre crop; 0 for the short side.
    size: side of the result; antialiased (bicubic) where it differs.
    num_channels: 3, or 1 for grey.

  Returns:
    (size, size, num_channels) uint8.
  """
  image = _flatten(image, "L" if num_channels == 1 else "RGB")
  width, height = image.size
  side = min(crop_size or width, width, height)
  if (width, height, side) != (size, size, size):
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    # Not resize's own `box`, which lets pixels outside it bleed in at the border.
    image = image.crop(box).resize((size, size), Image.Resampling.BICUBIC)
  return np.asarray(image).reshape(size, size, num_channels)


def _flatten(image: Image.Image, mode: str) -> Image.Image:
  """Any mode to `mode`, "L" or "RGB"."""
  if image.mode.startswith("I"):  # "I;16" of an array
    image = _to_8_bits(image)
  if image.has_transparency_data:
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
  return image.convert(mode)


def _to_8_bits(image: Image.Image) -> Image.Image:
  """16-bit grey, which PIL would clip at 255, to its upper 8 bits."""
  values = np.asarray(image, np.int64)
  grey = Image.fromarray((values >> 8).astype(np.uint8))
  transparent = image.info.get("transparency")
  if transparent is not None:
    grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
  return grey


def to_uint8(images: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
  """Return [-1, 1] as uint8, round half up of 127.5 x + 127.5 (design, section 8).

  NaN becomes 0, which says nothing of the image: see `are_finite`.
  """
  levels = np.clip(np.floor(127.5 * images.astype(np.float64) + 128.0), 0, 255)
  return np.nan_to_num(levels, nan=0).astype(np.uint8)


def are_finite(rows: Float[np.ndarray, "N ..."]) -> Bool[np.ndarray, " N"]:
  """Return whether all values of each image, or of each image's latents, are finite."""
  return np.isfinite(rows).all(axis=tuple(range(1, rows.ndim)))


def to_rgb(images: UInt8[np.ndarray, "N H W C"]) -> UInt8[np.ndarray, "N H W 3"]:
  """(N, H, W, 1 or 3) to (N, H, W, 3); grey is repeated."""
  return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def make_grid(
  images: UInt8[np.ndarray, "N H W 3"], columns: int
) -> UInt8[np.ndarray, "grid_H grid_W 3"]:
  """Tiles (N, H, W, 3) uint8 row by row into one image, `GAP` pixels apart.

  Missing last tiles are white.
  """
  images = np.pad(images, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
  n, h, w, c = images.shape
  rows = math.ceil(n / columns)
  tiles = np.full((rows * columns, h, w, c), 255, np.uint8)
  tiles[:n] = images
  tiles = tiles.reshape(rows, columns, h, w, c).transpose(0, 2, 1, 3, 4)
  return tiles.reshape(rows * h, columns * w, c)[:-GAP, :-GAP]


def write_png(path: pathlib.Path, image: UInt8[np.ndarray, "H W 3"]) -> None:
  """Writes one (H, W, 3) uint8 image, whole or not at all."""
  with atomic_path(path) as temporary:
    Image.fromarray(image).save(temporary, format="PNG")


def write_grid(path: pathlib.Path, images: UInt8[np.ndarray, "N H W C"], columns: int) -> None:
  """Writes (N, H, W, 1 or 3) uint8 images as one grid, small ones enlarged."""
  factor = max(1, MIN_TILE // images.shape[1])
  enlarged = to_rgb(images).repeat(factor, axis=1).repeat(factor, axis=2)
  write_png(path, make_grid(enlarged, columns))
