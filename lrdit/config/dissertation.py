"""The training settings of the dissertation's code that its recipes in `configs/` share.

docs/dissertation.md has the differences that remain.
"""

from ml_collections import ConfigDict

EPOCHS = 200


def set_training(config: ConfigDict) -> None:
  """Set the dissertation's learning rate, average, curriculum, length and number of solver steps.

  The adaptive arm trains from the high timesteps down, with a fresh optimizer in each stage.
  """
  config.training.num_epochs = EPOCHS
  config.training.num_steps = None
  config.optimizer.decay = "cosine"
  config.optimizer.ema_power = 0.75
  config.sampling.num_steps = 100
  if config.method == "adaptive":
    config.curriculum.enabled = True
    config.curriculum.restart_optimizer = True
    config.curriculum.restart_decay = True
    config.curriculum.warmup_ratio = 0.5
    config.curriculum.learning_rate_decay = 0.02
