"""Feature extractors, by whose features and predicted classes images are compared.

This module has the protocol and the simplest extractor, raw pixels. The name of a metric begins
with its extractor's.

Axes: B images, H W image, C channels, D values of a feature.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int, Int32, UInt8

from lrdit.data import pipeline
from lrdit.data.images import to_rgb, to_uint8
from lrdit.data.source import Source
from lrdit.runtime.errors import UserError
from lrdit.runtime.store import digest

EXTRACTORS = ("classifier", "efficientnet", "inception", "pixel")
MAX_PIXEL_VALUES = 4096


class Extracted(NamedTuple):
  """The result of one pass over a batch.

  Attributes:
    features: (B, D) float32.
    predictions: (B,) int32 classes in [0, K), or None from an extractor that predicts none.
  """

  features: Float32[np.ndarray, "B D"]
  predictions: Int32[np.ndarray, " B"] | None


@runtime_checkable
class Extractor(Protocol):
  """A map from images to features.

  Attributes:
    name: prefix of its metrics.
    digest: SHA-256, in hex, of weights and preprocessing.
    batch_size: images at once.
    num_features: D.
    held_out_accuracy: share of real held-out images whose label it predicts, or None.
  """

  name: str
  digest: str
  batch_size: int
  num_features: int
  held_out_accuracy: float | None

  def extract(self, images: UInt8[np.ndarray, "B H W 3"]) -> Extracted:
    """Return features and predictions of uint8 images, with gray repeated to RGB."""
    ...


def digest_of(description: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
  """Return the SHA-256, in hex, of an extractor's description and weights."""
  named = sorted(arrays.items())
  texts = ((f"\n{name} {array.dtype.str} {array.shape}\n", array) for name, array in named)
  return digest(json.dumps(description, sort_keys=True), texts)


def check_size(images: UInt8[np.ndarray, "B H W 3"], name: str, image_size: int) -> None:
  """Raise UserError unless images are `image_size` high and wide, as the named extractor needs."""
  height, width = images.shape[1:3]
  if (height, width) != (image_size, image_size):
    raise UserError(
      f"the images are {height}x{width} and the extractor {name!r} is for {image_size}x{image_size}"
      ": measure samples of the same config"
    )


class PixelExtractor:
  """Raw pixels in [-1, 1] as features, row by row; gray images have one value a pixel."""

  name = "pixel"
  batch_size = 256
  held_out_accuracy = None

  def __init__(self, image_size: int, num_channels: int):
    """Raise UserError if an image has more than `MAX_PIXEL_VALUES` values."""
    self.num_features = image_size * image_size * num_channels
    if self.num_features > MAX_PIXEL_VALUES:
      raise UserError(
        f"the extractor 'pixel' takes at most {MAX_PIXEL_VALUES} values an image, as a covariance "
        f"of raw pixels has that number squared, and {image_size}x{image_size}x{num_channels} has "
        f"{self.num_features}: use the extractor 'classifier' or 'efficientnet'"
      )
    self._image_size, self._num_channels = image_size, num_channels
    shape = [image_size, image_size, num_channels]
    self.digest = digest_of({"extractor": self.name, "shape": shape, "range": [-1, 1]}, {})

  def extract(self, images: UInt8[np.ndarray, "B H W 3"]) -> Extracted:
    """Return features (B, H W C), and no predictions."""
    check_size(images, self.name, self._image_size)
    pixels = images[..., : self._num_channels].reshape(len(images), -1)
    return Extracted(pixels.astype(np.float32) / 127.5 - 1.0, None)


def read_images(
  source: Source, batch_size: int
) -> Iterator[tuple[UInt8[np.ndarray, "B H W 3"], Int[np.ndarray, " B"]]]:
  """Yield a split's images in order, quantized as sampled ones are, and their labels.

  The last batch may be smaller.
  """

  def read(start: int) -> tuple[np.ndarray, np.ndarray]:
    index = np.arange(start, min(start + batch_size, len(source)))
    batch = source.gather(index, np.zeros(len(index), bool))
    return to_rgb(to_uint8(batch["image"])), batch["label"]

  return pipeline.read_ahead(read, range(0, len(source), batch_size))
