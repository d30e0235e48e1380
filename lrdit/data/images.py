"""Image decoding, cropping and resizing, and PNG files of images and grids."""

import collections
import io
import logging
import math
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from lrdit.runtime.errors import system_limit
from lrdit.runtime.store import atomic_path

MIN_TILE = 48  # pixels; a grid enlarges smaller images by a whole factor
GAP = 2  # white pixels between the tiles of a grid
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
KIND_OF_MODE = {"1": "black and white", "L": "gray", "P": "palette", "RGB": "color"}

log = logging.getLogger("lrdit")


class UnreadableImage(Exception):
  """The bytes are not an image, or only part of one."""


def crop_name(crop_size: int, size: int) -> str:
  """Describe what `fit` does, for the fingerprints of datasets."""
  side = f"{crop_size} pixels" if crop_size else "short side"
  # British in the fingerprints of runs and latents that there are.
  return f"centre crop of the {side}, bicubic antialiased resize to {size}"


def decode(content: bytes) -> Image.Image:
  """Decode a whole image.

  Raises:
    UnreadableImage: the format is unknown, the bytes are damaged or cut short, or the pixels
      cannot become RGB.
  """
  try:
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    image.load()
    if image.mode.startswith("I;"):  # PIL can do little with 16 bits of either byte order.
      image = image.convert("I")
  except Exception as error:  # PIL does not document what its readers raise.
    if system_limit(error) is not None:
      raise
    raise UnreadableImage(str(error) or type(error).__name__) from error
  if image.mode == "F":
    raise UnreadableImage("its pixels are floats of unknown range")
  if image.mode == "LAB":
    raise UnreadableImage("its colors are CIELAB, not RGB or gray")
  if image.mode == "I" and not 0 <= image.getextrema()[0] <= image.getextrema()[1] < 2**16:
    raise UnreadableImage("its pixels are not 16-bit numbers")
  return image


def fit(
  image: Image.Image, crop_size: int, size: int, num_channels: int
) -> UInt8[np.ndarray, "size size C"]:
  """Bring an image of any kind to one size and to RGB (3 channels) or gray (1), as uint8.

  Palettes and CMYK are converted, and transparent pixels are laid over white. The center square of
  `crop_size` pixels, or of the short side for 0, is resized to `size` by antialiased bicubic
  interpolation.
  """
  if image.mode.startswith("I"):  # "I;16" comes from an array.
    image = _to_8_bits(image)
  if image.has_transparency_data:
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
  image = image.convert("L" if num_channels == 1 else "RGB")
  width, height = image.size
  side = min(crop_size or width, width, height)
  if (width, height, side) != (size, size, size):
    left, top = (width - side) // 2, (height - side) // 2
    # The `box` of `resize` would mix in pixels from outside at the border.
    image = image.crop((left, top, left + side, top + side))
    image = image.resize((size, size), Image.Resampling.BICUBIC)
  return np.asarray(image).reshape(size, size, num_channels)


def _to_8_bits(image: Image.Image) -> Image.Image:
  """Return the upper 8 bits of 16-bit gray, which PIL would clip at 255."""
  values = np.asarray(image, np.int64)
  gray = Image.fromarray((values >> 8).astype(np.uint8))
  transparent = image.info.get("transparency")
  if transparent is not None:
    gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
  return gray


def conversion(image: Image.Image, num_channels: int) -> str:
  """Name the kind of image that `fit` converts, or return "" if it keeps the pixels."""
  if image.has_transparency_data:
    return "with transparency"
  if image.mode == ("L" if num_channels == 1 else "RGB"):
    return ""
  return "16-bit gray" if image.mode[0] == "I" else KIND_OF_MODE.get(image.mode, image.mode)


def report_conversions(
  kinds: Sequence[str], sides: Int[np.ndarray, "N 2"], size: int, num_channels: int
) -> None:
  """Log how `fit` changes a dataset, from each image's `conversion` and (width, height)."""
  total = len(kinds)
  converted = collections.Counter(kind for kind in kinds if kind)
  if converted:
    target = "gray" if num_channels == 1 else "RGB"
    named = ", ".join(f"{count} {kind}" for kind, count in converted.most_common())
    log.info("%d of %d images converted to %s: %s", converted.total(), total, target, named)
  oblong = np.count_nonzero(sides[:, 0] != sides[:, 1])
  if oblong:
    log.info("%d of %d images are not square: only the center is used", oblong, total)
  small = np.count_nonzero(sides.min(axis=1) < size)
  if small:
    log.warning("%d of %d images are smaller than %d pixels and enlarged", small, total, size)


def to_uint8(images: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
  """Return [-1, 1] as uint8: 127.5 x + 127.5, rounded half up.

  NaN becomes a meaningless 0: check the values with `are_finite`.
  """
  levels = np.clip(np.floor(127.5 * images.astype(np.float64) + 128.0), 0, 255)
  return np.nan_to_num(levels, nan=0).astype(np.uint8)


def are_finite(rows: Float[np.ndarray, "N ..."]) -> Bool[np.ndarray, " N"]:
  """Return whether all values of each image, or of each image's latents, are finite."""
  return np.isfinite(rows).all(axis=tuple(range(1, rows.ndim)))


def to_rgb(images: UInt8[np.ndarray, "N H W C"]) -> UInt8[np.ndarray, "N H W 3"]:
  """Repeat gray to RGB, and return RGB as it is."""
  return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def make_grid(
  images: UInt8[np.ndarray, "N H W 3"], columns: int
) -> UInt8[np.ndarray, "grid_H grid_W 3"]:
  """Tile images row by row, `GAP` pixels apart, with white for missing last tiles."""
  images = np.pad(images, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
  n, h, w, c = images.shape
  rows = math.ceil(n / columns)
  tiles = np.full((rows * columns, h, w, c), 255, np.uint8)
  tiles[:n] = images
  tiles = tiles.reshape(rows, columns, h, w, c).transpose(0, 2, 1, 3, 4)
  return tiles.reshape(rows * h, columns * w, c)[:-GAP, :-GAP]


def write_png(path: pathlib.Path, image: UInt8[np.ndarray, "H W 3"]) -> None:
  """Write an image atomically."""
  with atomic_path(path) as temporary:
    Image.fromarray(image).save(temporary, format="PNG")


def write_grid(path: pathlib.Path, images: UInt8[np.ndarray, "N H W C"], columns: int) -> None:
  """Write uint8 images, gray or RGB, as one grid in which small ones are enlarged."""
  factor = max(1, MIN_TILE // images.shape[1])
  enlarged = to_rgb(images).repeat(factor, axis=1).repeat(factor, axis=2)
  write_png(path, make_grid(enlarged, columns))
