r"""CIFAR-10: 32x32 pixels, 10 classes; the dissertation's DiT-S/2, or a small DiT for a CPU.

python main.py --config=configs/cifar10.py:method=adaptive --workdir=runs/cifar10_adaptive
python main.py --config=configs/cifar10.py:method=adaptive,variant=XS/4 --workdir=runs/small
bash launch/cifar10.sh   # the four arms, one after another

Arguments: method=full|narrow|static|adaptive, variant=S/2 (or another size and patch), and
recipe=dissertation|muon. The default recipe is muon for XS/4, which trains in half an hour
to an hour on one CPU core with AMX and --config.model.dtype=bfloat16, and the dissertation's for
all others.

tensorflow-datasets prepares the images (163 MB) in ~/tensorflow_datasets or --config.data.data_dir:
  python -c "import tensorflow_datasets as tfds; \
    tfds.builder('cifar10', file_format='array_record').download_and_prepare()"
Training uses the 50,000 training images. The 10,000 test images are held out.

docs/photographs.md has what was run.
"""

from ml_collections import ConfigDict

from lrdit.config import dissertation
from lrdit.config.schema import get_default_config, parse_arg

SMALL = "XS/4"


def get_config(arg: str = "") -> ConfigDict:
  """Return a recipe on pixels, with classes."""
  recipes = ("", "dissertation", "muon")
  args = parse_arg(arg, method="adaptive", variant="S/2", recipe=recipes)
  config = get_default_config(args["method"], args["variant"])
  config.data.name = "cifar10"
  config.data.image_size = 32
  config.data.num_classes = 10
  config.data.flip = True
  config.curriculum.check_every_steps = 200
  config.sampling.num_samples = 50_000
  config.sampling.guidance_scale = 2.0
  recipe = args["recipe"] or ("muon" if args["variant"] == SMALL else "dissertation")
  {"muon": set_muon, "dissertation": dissertation.set_training}[recipe](config)
  if args["variant"] == SMALL:
    if recipe == "muon" and args["method"] in ("static", "adaptive"):
      config.optimizer.learning_rate = 4e-3  # adaptive's best of three rates; narrow's is 8e-3
    config.training.batch_size = 64
    config.training.num_epochs = None
    config.training.num_steps = 5000
    config.training.eval_every_steps = 500
    config.training.sample_every_steps = 1000
    config.checkpoint.every_steps = 250
    config.evaluation.classifier_steps = 2000  # 20 epochs would take longer than the training
    config.sampling.num_samples = 5000
    config.sampling.batch_size = 50  # on a CPU twice as fast as 250
    config.sampling.solver = "dpm++"
    config.sampling.num_steps = 20
    config.optimizer.warmup_steps = 250
    if config.curriculum.enabled:  # its stages fit into 5,000 steps
      config.curriculum.check_every_steps = 40
  return config.lock()


def set_muon(config: ConfigDict) -> None:
  """Set the training of docs/photographs.md."""
  config.training.num_epochs = dissertation.EPOCHS
  config.training.num_steps = None
  config.diffusion.prediction = "v"
  config.optimizer.name = "muon"
  config.optimizer.learning_rate = 8e-3
  config.optimizer.decay = "cosine"
  config.optimizer.warmup_steps = 250
  config.optimizer.weight_decay = 0.01
  config.optimizer.grad_clip_norm = 1.0
  config.optimizer.ema_decay = 0.999
