"""The extractor "inception": FID's network, by torch-fidelity.

Axes: B images, H W image.
"""

import os
import pickle
from typing import Any

import numpy as np
from jaxtyping import UInt8

from lrdit.evaluation.features import Extracted, digest_of
from lrdit.runtime.errors import UserError
from lrdit.runtime.store import DAMAGE, check_finite

# What torch raises for a file that is damaged, no pickle of tensors, or of another network.
UNREADABLE_WEIGHTS = (pickle.UnpicklingError, *DAMAGE)


class InceptionExtractor:
  """Gives the 2,048 pooled features of FID's Inception-v3 (Heusel et al. 2017).

  The network, its resizing to 299x299 and its weights (converted from the TensorFlow file of
  2015-12-05) are torch-fidelity's; covariance and distance are `metrics.py`'s. The tests compare
  features with torch-fidelity's for random weights. They test neither the published weights nor
  any published FID.
  """

  name = "inception"
  batch_size = 64
  num_features = 2048
  held_out_accuracy = None

  def __init__(self, network: Any):
    """Move the network, which `open_inception` reads, to the device.

    Args:
      network: a FeatureExtractorInceptionV3 with "2048" as its only feature.

    Raises:
      UserError: weights are not finite.
    """
    import torch

    self._device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    fix = "download them again, to config.evaluation.inception_weights"
    check_finite(f"the extractor {self.name!r}", weights, fix)
    self.digest = digest_of({"extractor": self.name, "resize": "tensorflow 1 to 299"}, weights)
    self._network = network.to(self._device)

  def extract(self, images: UInt8[np.ndarray, "B H W 3"]) -> Extracted:
    """Return the (B, 2048) features of (B, H, W, 3) uint8 images of any size."""
    import torch

    batch = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    # Neither a choice of algorithm by speed nor TF32, so that metrics can be reproduced.
    exact = torch.backends.cudnn.flags(
      enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    with torch.inference_mode(), exact:
      (features,) = self._network(batch.to(self._device))
    return Extracted(features.cpu().numpy(), None)


def _import_torch_fidelity() -> tuple[Any, Any]:
  """Return torch and torch-fidelity's module of the Inception network."""
  try:
    import torch
    from torch_fidelity import feature_extractor_inceptionv3
  except (ImportError, RuntimeError) as error:  # torchvision of another build: RuntimeError
    raise UserError(
      f"the extractor 'inception' needs torch-fidelity, and importing it fails ({error}): "
      "from a checkout, pip install '.[fid]'"
    ) from error
  return torch, feature_extractor_inceptionv3


def open_inception(weights_path: str) -> InceptionExtractor:
  """Return Inception with the weights at a path, or with those torch-fidelity downloads.

  Args:
    weights_path: the file weights-inception-2015-12-05-6726825d.pth that torch-fidelity publishes
      under https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/; "" lets it download
      the file, once, to torch's cache directory.

  Raises:
    UserError: torch-fidelity is missing, or the weights are.
  """
  torch, module = _import_torch_fidelity()
  path = os.path.expanduser(weights_path)
  if path and not os.path.isfile(path):
    raise UserError(
      f"no file {path} with Inception's weights: download {module.URL_INCEPTION_V3} to it"
    )
  try:
    if path:
      # torch-fidelity's own reading would run code that a pickle holds.
      torch.load(path, map_location="cpu", weights_only=True)
    return InceptionExtractor(
      module.FeatureExtractorInceptionV3("inception", ["2048"], path or None)
    )
  except OSError as error:
    raise UserError(
      f"Inception's weights cannot be read ({error}): download {module.URL_INCEPTION_V3} where "
      "there is a network, and give its path"
    ) from error
  except UNREADABLE_WEIGHTS as error:
    raise UserError(
      f"{path or module.URL_INCEPTION_V3} does not hold Inception's weights "
      f"({str(error).splitlines()[0]}): download {module.URL_INCEPTION_V3} again"
    ) from error
