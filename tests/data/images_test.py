"""Decoding, cropping and resizing images; grids and PNGs."""

import errno
import struct
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from lrdit.data import images
from tests.image_files import encoded, pixels, tiff

pytestmark = pytest.mark.floats


def test_rounding_is_half_up_and_clipped():
  values = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
  assert images.to_uint8(values).tolist() == [0, 0, 128, 255, 255]
  assert images.to_uint8(np.array([np.nan, -np.inf, np.inf])).tolist() == [0, 0, 255]
  levels = np.arange(256)
  assert (images.to_uint8((levels / 127.5 - 1).astype(np.float32)) == levels).all()


def test_grid_places_tiles_row_by_row():
  tiles = np.stack([np.full((4, 4, 3), 10 * i, np.uint8) for i in range(5)])
  grid = images.make_grid(tiles, columns=2)
  pitch = 4 + images.GAP
  assert grid.shape == (3 * pitch - images.GAP, 2 * pitch - images.GAP, 3)
  for i in range(5):
    row, column = divmod(i, 2)
    assert (
      grid[row * pitch : row * pitch + 4, column * pitch : column * pitch + 4] == 10 * i
    ).all()
  assert (grid[-4:, -4:] == 255).all()
  assert (grid[4 : 4 + images.GAP] == 255).all()


def test_a_written_grid_can_be_read_and_leaves_nothing_else(tmp_path):
  gray = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1)).astype(np.uint8)
  images.write_grid(tmp_path / "grid.png", gray, columns=3)
  got = np.asarray(Image.open(tmp_path / "grid.png"))
  assert got.shape == (48, 3 * 48 + 2 * images.GAP, 3)
  np.testing.assert_array_equal(got[::6, :48:6], images.to_rgb(gray)[0])
  assert [f.name for f in tmp_path.iterdir()] == ["grid.png"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
  target = tmp_path / "image.png"
  images.write_png(target, np.zeros((2, 2, 3), np.uint8))
  before = target.read_bytes()
  with pytest.raises((TypeError, ValueError)):
    images.write_png(target, np.zeros((2, 2, 7), np.uint8))
  assert target.read_bytes() == before


def test_a_color_key_is_laid_over_white():
  array = pixels(0)
  array[2:4, 1:5] = key = (10, 20, 30)
  file = encoded(Image.fromarray(array), "PNG", transparency=key)
  got = images.fit(images.decode(file), 0, 8, 3)
  array[2:4, 1:5] = 255
  np.testing.assert_array_equal(got, array)


def test_16_bit_grey_is_read_by_its_upper_byte():
  values = np.arange(0, 2**16, 1024, np.uint16).reshape(8, 8) + 77
  image = Image.fromarray(values)
  assert image.mode == "I;16"
  got = images.fit(images.decode(encoded(image, "PNG")), 0, 8, 1)
  np.testing.assert_array_equal(got[..., 0], values >> 8)
  # The key is one of 65,536 values: its neighbors of the same upper byte stay.
  values[0, :2] = 40_000, 40_001
  file = encoded(Image.fromarray(values), "PNG", transparency=40_000)
  expected = values >> 8
  expected[0, 0] = 255
  got = images.fit(images.decode(file), 0, 8, 3)
  np.testing.assert_array_equal(got, np.repeat(expected[..., None], 3, axis=-1))


@pytest.mark.parametrize(
  ("extreme", "message"), [(2**16, "not 16-bit"), (-1, "not 16-bit"), (0.5, "floats")]
)
def test_pixels_of_unknown_range_are_refused(extreme, message):
  values = np.full((4, 4), 100, np.float32 if isinstance(extreme, float) else np.int32)
  values[1, 2] = extreme
  with pytest.raises(images.UnreadableImage, match=message):
    images.decode(encoded(Image.fromarray(values), "TIFF"))
  with pytest.raises(images.UnreadableImage, match="CIELAB"):
    images.decode(encoded(Image.new("LAB", (4, 4)), "TIFF"))


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_tiffs_of_either_byte_order_are_read(order):
  values = np.arange(30).reshape(5, 6) * 2000 + 17
  image = images.decode(tiff(values, order))
  np.testing.assert_array_equal(images.fit(image, 0, 5, 1)[..., 0], (values >> 8)[:, :5])
  turned = images.decode(tiff(values, order, {274: 3}.items()))  # by 180 degrees, as held
  np.testing.assert_array_equal(
    images.fit(turned, 6, 5, 1)[..., 0], (values >> 8)[::-1, ::-1][:, :5]
  )


# PIL documents none of what its readers raise, of which these are some.
@pytest.mark.parametrize(
  "error",
  [
    SyntaxError("broken PNG file"),
    struct.error("unpack requires a buffer of 4 bytes"),
    KeyError(65535),
    TypeError("'IFDRational' object cannot be interpreted as an integer"),
    EOFError(),
    AssertionError(),
    RecursionError("maximum recursion depth exceeded"),
    RuntimeError("codec"),
    Image.DecompressionBombError("Image size (9e99 pixels) exceeds limit"),
  ],
  ids=lambda error: type(error).__name__,
)
def test_any_error_of_a_reader_is_an_unreadable_image(monkeypatch, error):
  monkeypatch.setattr(Image, "open", mock.Mock(side_effect=error))
  with pytest.raises(images.UnreadableImage) as raised:
    images.decode(b"any")
  assert str(raised.value)


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError()])
def test_limits_of_the_system_are_not_unreadable_images(monkeypatch, error):
  """Otherwise data.skip_unreadable would leave the image out."""
  monkeypatch.setattr(Image, "open", mock.Mock(side_effect=error))
  with pytest.raises(type(error)):
    images.decode(b"any")


def test_32_bit_grey_of_16_bit_values_is_read():
  values = np.array([[0, 255], [256, 2**16 - 1]], np.int32)
  got = images.fit(images.decode(encoded(Image.fromarray(values), "TIFF")), 0, 2, 1)
  assert got[..., 0].tolist() == [[0, 0], [1, 255]]


@pytest.mark.parametrize(("height", "width"), [(20, 31), (31, 20), (9, 8)])
def test_a_crop_of_the_final_size_is_the_exact_centre(height, width):
  array = pixels(1, height, width)
  top, left = (height - 8) // 2, (width - 8) // 2
  got = images.fit(Image.fromarray(array), 8, 8, 3)
  np.testing.assert_array_equal(got, array[top : top + 8, left : left + 8])
  assert got.dtype == np.uint8


def test_pixels_outside_the_crop_do_not_show_at_its_border():
  array = np.zeros((40, 30, 3), np.uint8)
  array[5:35] = 255
  for size in (7, 16, 45):
    assert (images.fit(Image.fromarray(array), 0, size, 3) == 255).all()


def test_a_crop_larger_than_the_image_takes_the_short_side():
  array = pixels(2, 12, 10)
  got = images.fit(Image.fromarray(array), 178, 6, 3)
  np.testing.assert_array_equal(got, images.fit(Image.fromarray(array), 0, 6, 3))


def test_the_crop_is_named_for_the_records():
  assert images.crop_name(178, 128).startswith("centre crop of the 178 pixels, bicubic")
  assert images.crop_name(0, 64) == (
    "centre crop of the short side, bicubic antialiased resize to 64"
  )


def test_bytes_that_are_no_whole_image_are_refused():
  file = encoded(Image.fromarray(pixels(3, 32, 32)), "PNG")
  for damaged in (file[: len(file) // 2], b"", b"not an image"):
    with pytest.raises(images.UnreadableImage):
      images.decode(damaged)
