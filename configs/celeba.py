r"""The dissertation's CelebA: 128x128 pixels as 16x16x4 latents, no classes, DiT-S/2.

python main.py --config=configs/celeba.py --mode=encode --output=data/celeba_latents \
  --config.vae.path=VAE
python main.py --config=configs/celeba.py:method=adaptive --workdir=runs/celeba_adaptive \
  --config.vae.path=VAE --config.vae.latents_dir=data/celeba_latents
bash launch/celeba.sh --config.vae.path=VAE   # both, for the four arms

Arguments: method=full|narrow|static|adaptive, variant=S/2 (or another size and patch).

VAE is stabilityai/sd-vae-ft-mse or another diffusers AutoencoderKL. tensorflow-datasets prepares
the images in ~/tensorflow_datasets or --config.data.data_dir. Put img_align_celeba.zip,
list_eval_partition.txt, list_attr_celeba.txt, list_landmarks_align_celeba.txt and
identity_CelebA.txt into ~/tensorflow_datasets/downloads/manual, then:
  python -c "import tensorflow_datasets as tfds; \
    tfds.builder('celeb_a', file_format='array_record').download_and_prepare()"
Training uses the 162,770 training images, cropped to 178x178 at the center. The 19,867 validation
images are held out. The latents take 3 GB.

Encoding, training, resuming and sampling were run on small directories of the same structure with
a tiny VAE. The published archive was not read.
"""

from ml_collections import ConfigDict

from lrdit.config import dissertation
from lrdit.config.schema import get_default_config, parse_arg


def get_config(arg: str = "") -> ConfigDict:
  """Return the dissertation's recipe on latents, without classes."""
  args = parse_arg(arg, method="adaptive", variant="S/2")
  config = get_default_config(args["method"], args["variant"])
  config.data.name = "celeb_a"
  config.data.image_size = 128
  config.data.flip = True
  # There are no classes for a classifier. FID: --config.evaluation.extractors="('inception',)"
  config.evaluation.extractors = ()
  config.vae.downsample_factor = 8
  dissertation.set_training(config)
  config.sampling.num_samples = 50_000
  config.sampling.clip_x_0 = False
  return config.lock()
