"""The recipes of the dissertation: its learning rate by stage, and epochs as steps."""

import jax.numpy as jnp
import pytest

from configs import celeba, cifar10, imagenet128
from lrdit.config.flags import parse_flags
from lrdit.config.resolve import resolve
from lrdit.experiment import Experiment
from lrdit.runtime.errors import UserError
from tests import tiny


@pytest.mark.parametrize("recipe", [cifar10, celeba, imagenet128])
def test_every_recipe_has_the_dissertation_s_training(recipe):
  config = resolve(recipe.get_config("method=adaptive"))
  o, c = config.optimizer, config.curriculum
  assert (o.decay, o.ema_power, o.ema_decay) == ("cosine", 0.75, 0.9999)
  assert (config.sampling.solver, config.sampling.num_steps) == ("ddim", 100)
  assert (c.enabled, c.start, len(c.boundaries)) == (True, "high", 11)
  assert (c.restart_optimizer, c.restart_decay) == (True, True)
  for method in ("full", "static", "narrow"):
    other = resolve(recipe.get_config(f"method={method}"))
    assert not other.curriculum.enabled
    assert other.optimizer == config.optimizer


def test_a_stage_begins_with_half_the_warm_up_a_lower_peak_and_a_new_cosine():
  experiment = Experiment(resolve(cifar10.get_config())).for_examples(50_000)
  assert experiment.config.training.num_steps == 39_062
  first, third = experiment.learning_rate(0), experiment.learning_rate(2)
  assert float(first(1499, 0, 0)) == pytest.approx(0.5e-4)
  start = jnp.int32(12_000)
  assert float(third(start + 749, start, start)) == pytest.approx(0.5 * 0.96e-4)
  assert float(third(start + 1499, start, start)) == pytest.approx(0.96e-4)
  middle = start + 1500 + (39_062 - 13_500) // 2
  assert float(third(middle, start, start)) == pytest.approx(0.48e-4)
  assert float(third(39_062, start, start)) == pytest.approx(0, abs=1e-10)


def steps_of(num_examples, **fields):
  return Experiment(tiny.tiny_config(**fields)).for_examples(num_examples).config.training.num_steps


def test_epochs_follow_the_batch_size_and_the_data():
  fields = {"training__num_epochs": 3, "training__num_steps": None}
  assert steps_of(1000, **fields) == 187
  assert steps_of(1000, **fields, training__batch_size=32) == 93
  assert steps_of(500, **fields) == 93
  assert steps_of(1000, training__num_steps=500) == 500
  with pytest.raises(UserError, match=r"num_epochs=3 of 5 examples are 0 steps of 16, and must be"):
    steps_of(5, **fields)
  with pytest.raises(UserError, match=r"num_steps=8 beside config.training.num_epochs=3: set one"):
    steps_of(1000, training__num_epochs=3)


@pytest.mark.parametrize(
  ("recipe", "flags", "expected"),
  [
    ("cifar10", (), (None, 200)),
    ("cifar10", ("num_steps=50",), (50, None)),
    ("digits", ("num_epochs=3",), (None, 3)),
    ("digits", ("num_epochs=None",), (2000, None)),
    ("cifar10", ("num_steps=50", "num_epochs=3"), (50, 3)),
  ],
)
def test_on_the_command_line_steps_replace_epochs(recipe, flags, expected, monkeypatch):
  monkeypatch.chdir(tiny.ROOT)
  argv = ["main.py", f"--config=configs/{recipe}.py", "--workdir=w"]
  training = parse_flags([*argv, *(f"--config.training.{flag}" for flag in flags)]).config.training
  assert (training.num_steps, training.num_epochs) == expected
