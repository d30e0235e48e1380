"""PNG files: grids and single images."""

import math
import pathlib

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from lrdit.workdir import atomic_path

MIN_TILE = 48  # pixels; smaller images are enlarged by a whole factor
GAP = 2  # white pixels between tiles


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
