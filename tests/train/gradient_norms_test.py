"""Gradient norms by timestep group."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from lrdit.experiment import Experiment
from lrdit.model import dit
from lrdit.runtime import parallel
from lrdit.train import loss, step
from tests.tiny import tiny_config


def test_gradient_norms_are_those_of_single_examples():
  """A stand-in model: its output is its one parameter, so that gradients are known."""
  config, devices = tiny_config("method=full"), jax.devices()[:1]
  objective, boundaries, weight = Experiment(config).objective(devices), (0, 400, 1000), 0.5
  model = mock.Mock(
    spec=dit.DiT,
    shape=objective.model.shape,
    plan=objective.model.plan,
    apply=lambda variables, x, *_: variables["params"]["w"] * jnp.ones_like(x),
  )
  objective = dataclasses.replace(objective, model=model)
  fixed = dict(objective=objective, boundaries=boundaries)
  measure = parallel.pmap(functools.partial(step.gradient_norms, **fixed), devices)
  rng, key = np.random.default_rng(0), jax.random.key(7)
  batch = {"image": rng.standard_normal((1, 16, 8, 8, 1), np.float32)}
  batch["label"] = np.zeros((1, 16), np.int32)
  params = parallel.replicate({"w": jnp.float32(weight)}, devices)
  total, squares, count = parallel.unreplicate(measure(params, batch, key))
  noise = loss.draw_step_noise(key, jnp.arange(16), (8, 8, 1), objective)
  alpha_bar = objective.alphas_cumprod[noise.t][:, None, None, None]
  target = np.sqrt(alpha_bar) * noise.eps - np.sqrt(1 - alpha_bar) * batch["image"][0]
  norms = np.abs(2 * (weight - target).mean((1, 2, 3)))
  for g, own in enumerate((norms[noise.t < 400], norms[noise.t >= 400])):
    assert int(count[g]) == len(own) > 0
    np.testing.assert_allclose((total[g], squares[g]), (own.sum(), (own**2).sum()), rtol=1e-4)
