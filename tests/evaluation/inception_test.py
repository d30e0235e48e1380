"""Inception: torch-fidelity's features, and what is refused."""

import sys
import types

import numpy as np
import pytest

from lrdit.evaluation import inception
from lrdit.runtime.errors import UserError


def test_a_missing_torch_fidelity_is_told(monkeypatch):
  monkeypatch.setitem(sys.modules, "torch_fidelity", None)
  with pytest.raises(UserError, match=r"pip install '\.\[fid\]'"):
    inception.open_inception("")


def test_weights_that_are_not_finite_are_refused(monkeypatch):
  cuda = types.SimpleNamespace(is_available=lambda: False)
  monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
  values = {"fc.bias": np.array([1.0, np.nan]), "batches": np.array(3)}
  tensors = {k: types.SimpleNamespace(numpy=lambda array=v: array) for k, v in values.items()}
  network = types.SimpleNamespace(state_dict=lambda: tensors, to=lambda _: None)
  with pytest.raises(
    UserError, match=r"'inception' has weights .* \(1 of 2 arrays, such as fc\.bias"
  ):
    inception.InceptionExtractor(network)
  values["fc.bias"][1] = 2.0
  assert inception.InceptionExtractor(network).digest


@pytest.fixture(scope="module")
def random_network(tmp_path_factory):
  """(torch-fidelity's network with random weights, the file they are in)."""
  torch = pytest.importorskip("torch", reason="torch-fidelity needs torch")
  module = pytest.importorskip(
    "torch_fidelity.feature_extractor_inceptionv3", reason="torch-fidelity is not installed"
  )
  with pytest.MonkeyPatch.context() as patch:
    # Its constructor has no way to leave the weights random.
    patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    patch.setattr(torch, "load", lambda *_, **__: {})
    torch.manual_seed(0)
    network = module.FeatureExtractorInceptionV3("random", ["2048"], "none")
  for name, tensor in network.state_dict().items():
    if name.endswith("conv.weight"):
      tensor.mul_(6**0.5)  # He initialization: the features do not vanish
  path = tmp_path_factory.mktemp("inception") / "weights.pth"
  torch.save(network.state_dict(), path)
  return network, path


def test_inception_gives_torch_fidelity_s_features_in_any_batch(random_network):
  import torch

  network, path = random_network
  extractor = inception.open_inception(str(path))
  scans = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), np.uint8)
  features, predictions = extractor.extract(scans)
  assert predictions is None
  assert features.shape == (3, extractor.num_features)
  (expected,) = network(torch.from_numpy(scans.transpose(0, 3, 1, 2).copy()))
  scale = float(expected.abs().max())
  assert scale > 1e-3
  np.testing.assert_allclose(features, expected.numpy(), atol=1e-5 * scale)
  np.testing.assert_allclose(
    extractor.extract(scans[1:2]).features, features[1:2], atol=1e-5 * scale
  )
  assert np.abs(features[0] - features[1]).max() > 1e-2 * scale
  assert extractor.digest == inception.open_inception(str(path)).digest


def test_inception_refuses_other_files(random_network, tmp_path):
  import torch

  with pytest.raises(UserError, match=r"no file .*none.pth .*https://"):
    inception.open_inception(str(tmp_path / "none.pth"))
  path = tmp_path / "weights.pth"
  torch.save({"fc.bias": torch.zeros(3)}, path)
  with pytest.raises(UserError, match="does not hold Inception's weights"):
    inception.open_inception(str(path))
  torch.save({"code": UserError("a pickled object")}, path)
  with pytest.raises(UserError, match="does not hold Inception's weights"):
    inception.open_inception(str(path))
  path.write_bytes(b"damaged")
  with pytest.raises(UserError, match="does not hold Inception's weights"):
    inception.open_inception(str(path))
