"""Raw pixels as features."""

import numpy as np
import pytest

from lrdit.evaluation.features import PixelExtractor
from lrdit.runtime.errors import UserError


def test_pixels_are_the_images_in_minus_one_to_one():
  extractor = PixelExtractor(8, 1)
  scans = np.repeat(np.arange(128, dtype=np.uint8).reshape(2, 8, 8, 1), 3, axis=-1)
  features, predictions = extractor.extract(scans)
  assert predictions is None
  assert features.shape == (2, extractor.num_features) == (2, 64)
  np.testing.assert_array_equal(features.reshape(-1), np.arange(128, dtype=np.float32) / 127.5 - 1)
  assert PixelExtractor(8, 3).extract(scans).features.shape == (2, 192)
  digests = {PixelExtractor(*shape).digest for shape in ((8, 1), (8, 3), (16, 1))}
  assert len(digests) == 3
  assert all(len(digest) == 64 for digest in digests)


def test_pixels_refuse_large_images_and_say_why():
  assert PixelExtractor(64, 1).num_features == 4096
  with pytest.raises(UserError, match=r"at most 4096 values .* covariance .* 64x64x3 has 12288"):
    PixelExtractor(64, 3)


def test_images_of_another_size_are_refused():
  with pytest.raises(UserError, match=r"the images are 6x6 .* 'pixel' is for 8x8"):
    PixelExtractor(8, 3).extract(np.zeros((2, 6, 6, 3), np.uint8))
