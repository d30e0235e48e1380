"""The extractor "inception": FID's network, by torch-fidelity."""

import os
import pickle
from typing import Any, ClassVar

from lrdit.evaluation.torch_network import TorchExtractor
from lrdit.runtime.errors import UserError
from lrdit.runtime.store import DAMAGE

# torch raises these for a damaged file, other pickles than of tensors, and another network.
UNREADABLE_WEIGHTS = (pickle.UnpicklingError, *DAMAGE)


class InceptionExtractor(TorchExtractor):
  """The 2,048 pooled features of FID's Inception-v3 (Heusel et al. 2017).

  The network, its resizing to 299x299 and its weights (converted from the TensorFlow file of
  2015-12-05) are torch-fidelity's; covariance and distance are `metrics.py`'s. The tests compare
  features with torch-fidelity's for random weights, but neither the published weights nor any
  published FID.
  """

  name = "inception"
  num_features = 2048
  preprocessing: ClassVar = {"resize": "tensorflow 1 to 299"}
  fix = "download them again, to config.evaluation.inception_weights"

  def _features(self, batch: Any) -> Any:
    (features,) = self._network(batch)
    return features


def open_inception(weights_path: str) -> InceptionExtractor:
  """Return Inception with the weights at a path, or with those that torch-fidelity downloads.

  `weights_path` is the file weights-inception-2015-12-05-6726825d.pth, published under
  https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/. For "", torch-fidelity
  downloads it once to torch's cache directory.
  """
  try:
    import torch
    from torch_fidelity import feature_extractor_inceptionv3 as module
  except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision is of another build.
    raise UserError(
      f"the extractor 'inception' needs torch-fidelity, and importing it fails ({error}): "
      "from a checkout, pip install '.[fid]'"
    ) from error
  path, url = os.path.expanduser(weights_path), module.URL_INCEPTION_V3
  if path and not os.path.isfile(path):
    raise UserError(f"no file {path} with Inception's weights: download {url} to it")
  try:
    if path:
      # torch-fidelity would run code that a pickle holds: this raises an error for such a file.
      torch.load(path, map_location="cpu", weights_only=True)
    network = module.FeatureExtractorInceptionV3("inception", ["2048"], path or None)
    return InceptionExtractor(network)
  except OSError as error:
    raise UserError(
      f"Inception's weights cannot be read ({error}): download {url} where there is a network, and "
      "give its path"
    ) from error
  except UNREADABLE_WEIGHTS as error:
    reason = str(error).splitlines()[0]
    raise UserError(
      f"{path or url} does not hold Inception's weights ({reason}): download {url} again"
    ) from error
