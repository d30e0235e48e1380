"""scikit-learn's handwritten digits: 8x8 gray, 10 classes, no download.

python main.py --config=configs/digits.py:method=adaptive --workdir=runs/digits
bash launch/digits.sh   # the four arms with three seeds; other studies: --help

Arguments: method=full|narrow|static|adaptive, variant=T/2, recipe=muon|dissertation (AdamW).
docs/results.md has the results.
"""

from ml_collections import ConfigDict

from lrdit.config.schema import get_default_config, parse_arg


def get_config(arg: str = "") -> ConfigDict:
  """Return the recipe of the quickstart, or with the dissertation's optimizer."""
  recipes = ("muon", "dissertation")
  args = parse_arg(arg, method="adaptive", variant="T/2", recipe=recipes)
  config = get_default_config(args["method"], args["variant"])
  config.data.name = "digits"
  config.data.image_size = 8
  config.data.num_channels = 1
  config.data.num_classes = 10
  config.rank.multiple_of = 4
  config.diffusion.prediction = "v"
  config.curriculum.check_every_steps = 20
  config.curriculum.patience = 2
  config.optimizer.learning_rate = 2e-3
  if args["recipe"] == "muon":
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 8e-3
  config.optimizer.decay = "cosine"
  config.optimizer.warmup_steps = 100
  config.optimizer.weight_decay = 0.01
  config.optimizer.grad_clip_norm = 1.0
  config.optimizer.ema_decay = 0.995
  config.training.batch_size = 128
  config.training.num_steps = 2000
  config.training.log_every_steps = 50
  config.training.eval_every_steps = 500
  config.training.sample_every_steps = 1000
  config.checkpoint.every_steps = 250
  return config.lock()
