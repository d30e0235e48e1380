"""Parameters away from their initial zeros, and the checkpoints of tiny runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lrdit.config.run_config import store_config
from lrdit.experiment import Experiment
from lrdit.model import dit, layouts
from lrdit.modes import train
from lrdit.runtime import parallel
from lrdit.train.checkpoints import Checkpoints
from tests import tiny


def noisy_params(config):
  """Parameters whose model has no zero output, as it has at initialization."""
  return noisy_params_of(Experiment(config).model().clone(dtype=jnp.float32))


@functools.cache
def noisy_params_of(model):
  """As `noisy_params`; numpy's noise compiles nothing."""
  params, rng = dit.init_params(model, jax.random.key(0)), np.random.default_rng(1)

  def add_noise(p):
    return np.asarray(p) + np.float32(0.05) * rng.standard_normal(p.shape, np.float32)

  return jax.device_put(jax.tree.map(add_noise, params))


def fresh_state(config, params=None):
  """The state before the first step, from the initial parameters or the ones given."""
  experiment = Experiment(config)
  params = experiment.initial_params() if params is None else params
  return experiment.fresh_state(params)


def random_params(config):
  """Parameters by path, without compiling their initialization."""
  rng, template = np.random.default_rng(0), layouts.flat(Experiment(config).params_template)
  return {path: 0.1 * rng.standard_normal(x.shape, np.float32) for path, x in template.items()}


def save_checkpoint(workdir, config, step=8, scale=1.0, params=None, keep=1):
  """Write a checkpoint of noisy parameters, or the ones given."""
  params = jax.tree.map(lambda x: scale * x, noisy_params(config) if params is None else params)
  state = parallel.to_host(fresh_state(config, params))
  opened = Checkpoints(workdir, keep)
  opened.save(state.replace(step=np.asarray(step, np.int32)), config.to_dict())
  opened.wait()
  opened.close()


def make_noisy_run(path):
  """Make a tiny run's workdir with a checkpoint of noisy parameters; return its path."""
  config = tiny.tiny_config()
  store_config(path, config)
  save_checkpoint(path, config)
  return path


def final_state(workdir, arg="", **overrides):
  """The newest checkpoint of a tiny run."""
  config = tiny.tiny_config(arg, **overrides)
  return Checkpoints(workdir).restore_state(jax.eval_shape(lambda: fresh_state(config)))


def assert_same_run(workdir, reference, **overrides):
  """Equal metrics and, to the bit, equal final states."""
  got, expected = (
    [
      {name: value for name, value in line.items() if not name.endswith("_per_second")}
      for line in tiny.read_metrics(path)
    ]
    for path in (workdir, reference)
  )
  assert got == expected
  a, b = final_state(workdir, **overrides), final_state(reference, **overrides)
  assert a.step == expected[-1]["step"]
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


def train_one_device(workdir, arg="", **fields):
  """A run in this process, at a constant rate, so that a longer run is the same program."""
  config = tiny.tiny_config(arg, **{"optimizer__decay": "constant"} | fields)
  train.train(config, str(workdir), jax.devices()[:1])
