r"""The dissertation's CIFAR-10: 32x32 pixels, 10 classes, DiT-S/2.

python main.py --config=configs/cifar10.py:method=adaptive --workdir=runs/cifar10_adaptive
bash launch/cifar10.sh   # the four arms, one after another

Arguments: method=full|narrow|static|adaptive, variant=S/2 (or another size and patch).

tensorflow-datasets prepares the images (163 MB) in ~/tensorflow_datasets or --config.data.data_dir:
  python -c "import tensorflow_datasets as tfds; \
    tfds.builder('cifar10', file_format='array_record').download_and_prepare()"
Training uses the 50,000 training images. The 10,000 test images are held out.

Run so far: a few steps of every arm, with resuming and sampling, on real CIFAR-10
photographs; no whole training, so there is no result yet.
"""

from ml_collections import ConfigDict

from lrdit.config.schema import get_default_config, parse_arg

EPOCHS = 200
TRAIN_IMAGES = 50_000


def get_config(arg: str = "") -> ConfigDict:
  """Return the dissertation's recipe on pixels, with classes."""
  args = parse_arg(arg, method="adaptive", variant="S/2")
  config = get_default_config(args["method"], args["variant"])
  config.data.name = "cifar10"
  config.data.image_size = 32
  config.data.num_classes = 10
  config.data.flip = True
  config.curriculum.check_every_steps = 200
  config.training.num_steps = EPOCHS * TRAIN_IMAGES // config.training.batch_size
  config.sampling.num_samples = 50_000
  config.sampling.guidance_scale = 2.0
  return config.lock()
