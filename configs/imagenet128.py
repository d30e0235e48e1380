r"""The dissertation's ImageNet: 128x128 pixels as 16x16x4 latents, 1,000 classes, DiT-B/2.

python main.py --config=configs/imagenet128.py --mode=encode --output=data/imagenet128_latents \
  --config.vae.path=VAE
python main.py --config=configs/imagenet128.py:method=adaptive,classes=400 \
  --workdir=runs/imagenet128_adaptive \
  --config.vae.path=VAE --config.vae.latents_dir=data/imagenet128_latents
bash launch/imagenet128.sh --config.vae.path=VAE   # both, for the four arms

Arguments: method=full|narrow|static|adaptive, variant=B/2 (or another size and patch), and
classes=1000, or fewer for the first ones, such as the dissertation's 400. Latents of all classes
serve any number.

VAE is stabilityai/sd-vae-ft-mse or another diffusers AutoencoderKL. tensorflow-datasets prepares
the images in ~/tensorflow_datasets or --config.data.data_dir. Put ILSVRC2012_img_train.tar and
ILSVRC2012_img_val.tar, both from image-net.org/download-images, into
~/tensorflow_datasets/downloads/manual, then:
  python -c "import tensorflow_datasets as tfds; \
    tfds.builder('imagenet2012', file_format='array_record').download_and_prepare()"
Training uses the 1,281,167 training images, cropped to the short side at the center. The 50,000
validation images are held out. The latents take 22 GB, half of it for the mirrored images
(--config.data.flip=False leaves them out).

Encoding, training, resuming and sampling were run on small directories of the same structure with
a tiny VAE. The published archives were not read.
"""

from ml_collections import ConfigDict

from lrdit.config import dissertation
from lrdit.config.schema import get_default_config, parse_arg
from lrdit.runtime.errors import UserError

CLASSES = 1000


def get_config(arg: str = "") -> ConfigDict:
  """Return the dissertation's recipe on latents, with classes."""
  args = parse_arg(arg, method="adaptive", variant="B/2", classes=str(CLASSES))
  if not args["classes"].isdecimal() or not 1 <= int(args["classes"]) <= CLASSES:
    raise UserError(f"classes={args['classes']} must be a number from 1 to {CLASSES}", 2)
  classes = int(args["classes"])
  config = get_default_config(args["method"], args["variant"])
  config.data.name = "imagenet2012"
  config.data.image_size = 128
  config.data.num_classes = classes
  config.data.flip = True
  # A classifier takes long to train. FID: --config.evaluation.extractors="('inception',)"
  config.evaluation.extractors = ()
  config.vae.downsample_factor = 8
  dissertation.set_training(config)
  config.sampling.num_samples = 50_000
  config.sampling.guidance_scale = 2.0
  config.sampling.clip_x_0 = False
  return config.lock()
