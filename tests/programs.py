"""Compiled programs with the shapes of their arguments, and the products in a program."""

import math

import jax
import jax.extend
import jax.numpy as jnp
from jax.interpreters import partial_eval

from lrdit.experiment import Experiment
from tests.trained import fresh_state


def structs(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def dot_macs(eqn):
  (contracted, _), _ = eqn.params["dimension_numbers"]
  lhs = eqn.invars[0].aval.shape
  return math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contracted)


def traced_macs(jaxpr):
  """Count the MACs of all products that a jaxpr's outputs need; a while loop counts once."""
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      total += dot_macs(eqn)
    assert eqn.primitive.name != "conv_general_dilated"
    times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    for inner in jax.tree.leaves(
      list(eqn.params.values()),
      is_leaf=lambda x: isinstance(x, (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr)),
    ):
      if isinstance(inner, jax.extend.core.ClosedJaxpr):
        total += times * traced_macs(inner.jaxpr)
      elif isinstance(inner, jax.extend.core.Jaxpr):
        total += times * traced_macs(inner)
  return total


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
  step = Experiment(config).train_step(devices, stage=0)
  return step, (state, batch, key), objective.rank_groups
