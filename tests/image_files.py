"""Images, damaged and odd files, and sources of them."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from lrdit.data.source import DataOptions

SIZE = 8


def make_options(path="", **changes):
  options = dict(
    data_dir=str(path), image_size=SIZE, num_channels=3, cache_bytes=10**9, skip_unreadable=False
  )
  return DataOptions(**options | changes)


def pixels(seed, height=SIZE, width=SIZE, channels=3):
  shape = (height, width, channels) if channels > 1 else (height, width)
  return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def numbered(i):
  """An image that holds its number in every pixel."""
  return np.full((SIZE, SIZE, 3), i, np.uint8)


def save(path, image, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  if not isinstance(image, Image.Image):
    image = Image.fromarray(image)
  image.save(path, **options)
  return path


def encoded(image, kind, **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def read(source):
  """Every image and label of a source."""
  index = np.arange(len(source))
  return source.images[index], source.labels[index]


def numbers_of(source):
  return read(source)[0][:, 0, 0, 0].tolist()


def is_held_out(name):
  return zlib.crc32(name.encode()) % 20 == 0


def striped(mode, colors):
  """An image with the left half in one color and the right half in another."""
  image = Image.new(mode, (SIZE, SIZE), colors[0])
  image.paste(colors[1], (SIZE // 2, 0, SIZE, SIZE))
  return image


def palette_image(**info):
  image = striped("P", (0, 1))
  image.putpalette([200, 100, 50, 10, 20, 30])
  image.info.update(info)
  return image


def deep_grey():
  row = [0x1234] * (SIZE // 2) + [0xAB00] * (SIZE // 2)
  return Image.fromarray(np.array([row] * SIZE, np.uint16))


def tiff(values, order, extra=()):
  """A TIFF of (H, W) 16-bit gray, made by hand: PIL writes only one byte order.

  Args:
    values: the pixels.
    order: ">" for big-endian, "<" for little.
    extra: further (tag, SHORT value).
  """
  height, width = values.shape
  data = values.astype(f"{order}u2").tobytes()
  shorts = {256: width, 257: height, 258: 16, 259: 1, 262: 1, 277: 1, 278: height} | dict(extra)
  longs = {273: 8, 279: len(data)}
  head = {">": b"MM", "<": b"II"}[order] + struct.pack(f"{order}HI", 42, 8 + len(data))
  entries = struct.pack(f"{order}H", len(shorts) + len(longs))
  for tag in sorted(shorts | longs):
    if tag in shorts:
      entries += struct.pack(f"{order}HHIHH", tag, 3, 1, shorts[tag], 0)
    else:
      entries += struct.pack(f"{order}HHII", tag, 4, 1, longs[tag])
  return head + data + entries + bytes(4)


def damaged_files():
  """Bytes by name, and a part of the reason each must be refused for."""
  photograph = Image.fromarray(pixels(1, 64, 64))
  exif = Image.Exif()
  exif[0x0112] = 6
  jpeg, png = encoded(photograph, "JPEG"), encoded(photograph, "PNG")
  damaged_exif = encoded(photograph, "WEBP", exif=exif).replace(b"MM\0*", b"M2\0*")
  return {
    "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
    "cut.png": (png[: len(png) // 2], "truncated"),
    "empty.png": (b"", "an empty file"),
    "exif.webp": (damaged_exif, "its EXIF data are damaged"),
    "lab.tif": (encoded(Image.new("LAB", (8, 8)), "TIFF"), "its colors are CIELAB"),
    "text.png": (b"these are words", "no image of a known format"),
  }


def make_flat(directory, numbers):
  for i in numbers:
    save(directory / f"{i:03d}.png", numbered(i))


def make_splits(directory, **train):
  """Write the training images `train`, by name, and one held-out image."""
  for name, image in train.items():
    save(directory / "train" / f"{name}.png", image)
  save(directory / "eval" / "other.png", pixels(0))


def make_damaged(directory):
  directory.mkdir(parents=True, exist_ok=True)
  for name, (content, _) in damaged_files().items():
    (directory / name).write_bytes(content)
