"""Feature extractors that are networks of torch."""

from typing import Any, ClassVar

import numpy as np
from jaxtyping import UInt8

from lrdit.evaluation.features import Extracted, digest_of
from lrdit.runtime.store import check_finite


class TorchExtractor:
  """A torch network's features; a subclass names the extractor and computes `_features`."""

  name: str
  batch_size = 64
  num_features: int
  held_out_accuracy = None
  preprocessing: ClassVar[dict[str, Any]]  # beside the weights, what the digest covers
  fix: str  # for weights that are not finite

  def __init__(self, network: Any):
    """Move the network to the device; refuse weights that are not finite."""
    import torch

    self._device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    check_finite(f"the extractor {self.name!r}", weights, self.fix)
    self.digest = digest_of({"extractor": self.name} | self.preprocessing, weights)
    self._network = network.to(self._device)

  def _features(self, batch: Any) -> Any:
    """Return the (B, D) float32 features of a (B, 3, H, W) uint8 tensor."""
    raise NotImplementedError

  def extract(self, images: UInt8[np.ndarray, "B H W 3"]) -> Extracted:
    """Return the features of images of any size, and no predictions."""
    import torch

    batch = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    # Benchmarks or TF32 would make metrics irreproducible.
    options = {"enabled": True, "benchmark": False, "deterministic": True, "allow_tf32": False}
    with torch.inference_mode(), torch.backends.cudnn.flags(**options):
      features = self._features(batch.to(self._device))
    return Extracted(features.cpu().numpy(), None)
