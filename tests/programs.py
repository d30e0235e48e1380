"""Compiled programs with the shapes of their arguments."""

import jax
import jax.numpy as jnp

from lrdit.experiment import Experiment
from lrdit.train.loss import select_ranks
from tests.trained import fresh_state


def structs(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def training(config, devices):
  """The pmapped training step, its arguments, and its groups."""
  objective = Experiment(config).objective(devices)
  n, local = len(devices), config.training.batch_size // len(devices)
  state = jax.eval_shape(lambda: fresh_state(config))
  state = jax.tree.map(lambda x: jax.ShapeDtypeStruct((n, *x.shape), x.dtype), state)
  s = objective.model.shape
  size = (s.image_size, s.image_size, s.channels)
  batch = {
    "image": jax.ShapeDtypeStruct((n, local, *size), jnp.float32),
    "label": jax.ShapeDtypeStruct((n, local), jnp.int32),
  }
  key = structs(jax.random.key(0))
  groups = select_ranks(objective, jnp.zeros(local, jnp.int32)).groups
  return Experiment(config).train_step(devices, stage=0), (state, batch, key), groups
