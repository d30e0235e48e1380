import numpy as np
import pytest
from PIL import Image

from lrdit import images


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
  grey = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1)).astype(np.uint8)
  images.write_grid(tmp_path / "grid.png", grey, columns=3)
  got = np.asarray(Image.open(tmp_path / "grid.png"))
  assert got.shape == (48, 3 * 48 + 2 * images.GAP, 3)
  np.testing.assert_array_equal(got[::6, :48:6], images.to_rgb(grey)[0])
  assert [f.name for f in tmp_path.iterdir()] == ["grid.png"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
  target = tmp_path / "image.png"
  images.write_png(target, np.zeros((2, 2, 3), np.uint8))
  before = target.read_bytes()
  with pytest.raises((TypeError, ValueError)):
    images.write_png(target, np.zeros((2, 2, 7), np.uint8))
  assert target.read_bytes() == before
