"""Rank schedules: the share of the rank range that each timestep uses, before quantization.

A schedule maps u = t / T in [0, 1) to a height in [0, 1]: 0 is the least rank, 1 the full rank.
To add a schedule, add its function to `SCHEDULES`; its name becomes a value of `rank.schedule`.

Axes: T timesteps.
"""

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

Heights = Float[np.ndarray, " T"]
Ramp = Callable[[Heights], Heights]


def logistic_ramp(x: Heights, steepness: float, midpoint: float) -> Heights:
  """Return 1 / (1 + exp(-steepness (x - midpoint))), rescaled to run from 0 at 0 to 1 at 1."""

  def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-steepness * (x - midpoint)))

  low, high = sigmoid(0.0), sigmoid(1.0)
  return (sigmoid(x) - low) / (high - low)


def _after_hold(u: Heights) -> Heights:
  """Return progress along a ramp that starts after the first 5 % of timesteps."""
  return np.maximum(20 * u - 1, 0) / 19


# Each function takes u and the configured logistic ramp.
SCHEDULES: dict[str, Callable[[Heights, Ramp], Heights]] = {
  "constant": lambda u, _: np.ones_like(u),
  "decreasing": lambda u, _: 1 - _after_hold(u),
  "increasing": lambda u, _: u,
  "midpeak": lambda u, _: np.where(u <= 0.5, 2 * u, 2 - 2 * u),
  "logistic_decreasing": lambda u, ramp: 1 - ramp(_after_hold(u)),
  "logistic_increasing": lambda u, ramp: ramp(u),
}


def schedule_height(
  schedule: str,
  num_train_timesteps: int,
  *,
  logistic_steepness: float = 8.0,
  logistic_midpoint: float = 0.6,
) -> Heights:
  """Return the height of a schedule at every timestep, (T,) float64 in [0, 1].

  The logistic schedules are steepest at the share `logistic_midpoint` of their ramp.
  """
  ramp = functools.partial(logistic_ramp, steepness=logistic_steepness, midpoint=logistic_midpoint)
  return SCHEDULES[schedule](np.arange(num_train_timesteps) / num_train_timesteps, ramp)
