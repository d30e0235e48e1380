"""Rank schedules: how much of the rank range each timestep uses, before it is quantised.

A schedule maps u = t / T in [0, 1) to a height in [0, 1]: 0 is the least rank, 1 the full one.
To add a schedule, add its function to `SCHEDULES`; its name is then a value of `rank.schedule`.

Axes: T timesteps.
"""

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from lrdit.runtime.errors import UserError

Heights = Float[np.ndarray, " T"]
Ramp = Callable[[Heights], Heights]

LOGISTIC_STEEPNESS = 8.0
LOGISTIC_MIDPOINT = 0.6


def logistic_ramp(x: Heights, steepness: float, midpoint: float) -> Heights:
  """Return 1 / (1 + exp(-steepness (x - midpoint))), rescaled to run from 0 at 0 to 1 at 1."""

  def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-steepness * (x - midpoint)))

  low, high = sigmoid(0.0), sigmoid(1.0)
  return (sigmoid(x) - low) / (high - low)


def _after_hold(u: Heights) -> Heights:
  """Return progress along a ramp that starts after the first 5 % of timesteps."""
  return np.maximum(20 * u - 1, 0) / 19


# Each function takes u, and the logistic ramp that the config sets.
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
  logistic_steepness: float = LOGISTIC_STEEPNESS,
  logistic_midpoint: float = LOGISTIC_MIDPOINT,
) -> Heights:
  """Return the height of a schedule at every timestep, (T,) float64 in [0, 1].

  Args:
    schedule: one of `SCHEDULES`.
    num_train_timesteps: T.
    logistic_steepness: of the logistic schedules, above 0.
    logistic_midpoint: share of the ramp at which the logistic schedules are steepest.

  Raises:
    UserError: the schedule is unknown.
  """
  if schedule not in SCHEDULES:
    raise UserError(f"rank.schedule={schedule!r} is unknown: use one of {', '.join(SCHEDULES)}")
  ramp = functools.partial(logistic_ramp, steepness=logistic_steepness, midpoint=logistic_midpoint)
  return SCHEDULES[schedule](np.arange(num_train_timesteps) / num_train_timesteps, ramp)
