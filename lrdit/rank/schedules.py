"""Schedules r(t): the share of the rank range that is active at each timestep."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from lrdit.runtime.errors import UserError

SCHEDULES = (
  "constant",
  "decreasing",
  "increasing",
  "midpeak",
  "logistic_decreasing",
  "logistic_increasing",
)

LOGISTIC = (8.0, 0.6)  # steepness and midpoint


def _logistic(u: np.ndarray, steepness: float, midpoint: float) -> np.ndarray:
  """The logistic curve on [0, 1], rescaled to start at 0 and end at 1."""

  def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-steepness * (x - midpoint)))

  low, high = sigmoid(0.0), sigmoid(1.0)
  return (sigmoid(u) - low) / (high - low)


def _progress(
  schedule: str,
  t: np.ndarray,
  num_train_timesteps: int,
  logistic: tuple[float, float] = LOGISTIC,
) -> tuple[np.ndarray, np.ndarray]:
  """How far each timestep is along its ramp, and which way the ramp goes.

  Args:
    schedule: one of `SCHEDULES`.
    t: integer timesteps, any shape.
    num_train_timesteps: T.
    logistic: steepness and midpoint of the logistic ramps.

  Returns:
    (numerator / denominator in [0, 1] as float64, direction): direction +1 on
    a rising ramp, -1 on a falling one, 0 where the full rank is held. Ratios of
    integers below 2**53 are correctly rounded, so a span times an exact ratio
    can be floored safely after `floor_exact`.
  """
  t = np.asarray(t, np.int64)
  steps = num_train_timesteps
  rising, held = np.ones_like(t), np.zeros_like(t)
  if schedule == "constant":
    return np.zeros(t.shape), held
  if schedule in ("increasing", "logistic_increasing"):
    u = t / steps
    return (_logistic(u, *logistic) if schedule.startswith("logistic") else u), rising
  if schedule == "midpeak":
    first = 2 * t <= steps
    return (
      np.where(first, 2 * t, 2 * t - steps) / steps,
      np.where(first, rising, -rising),
    )
  if schedule in ("decreasing", "logistic_decreasing"):
    # The first 5 % of timesteps hold the full rank.
    u = np.maximum(20 * t - steps, 0) / (19 * steps)
    u = _logistic(u, *logistic) if schedule.startswith("logistic") else u
    return u, np.where(20 * t < steps, held, -rising)
  raise UserError(f"rank.schedule={schedule!r} is unknown: use one of {', '.join(SCHEDULES)}")


def floor_exact(x: np.ndarray) -> np.ndarray:
  """Floor that does not fall below an integer by rounding error."""
  return np.floor(x + 1e-9 * np.maximum(np.abs(x), 1.0)).astype(np.int64)


def active_rank(
  schedule: str,
  t: np.ndarray | Sequence[int] | int,
  num_train_timesteps: int,
  max_rank: int,
  min_ratio: float,
) -> np.ndarray:
  """Unbucketed active rank r(t) of one layer.

  A component switches exactly at its boundary: on a rising ramp
  r = r_min + floor(span u), on a falling one r = R - 1 - floor(span u), with
  r_min = round(min_ratio R) and span = R - r_min. These are the values of the
  dissertation's code at every timestep.

  Args:
    schedule: one of `SCHEDULES`.
    t: integer timesteps in [0, num_train_timesteps), any shape.
    num_train_timesteps: T.
    max_rank: allocated rank R >= 1.
    min_ratio: floor of the schedule as a share of R, in (0, 1].

  Returns:
    int64 ranks in [max(1, r_min), R], of t's shape.
  """
  progress, direction = _progress(schedule, np.asarray(t), num_train_timesteps)
  min_rank = max(1, round(min_ratio * max_rank))
  moved = floor_exact((max_rank - min_rank) * progress)
  rank = np.where(direction > 0, min_rank + moved, max_rank - 1 - moved)
  rank = np.where(direction == 0, max_rank, rank)
  return np.clip(rank, min_rank, max_rank)


def schedule_height(
  schedule: str, num_train_timesteps: int, logistic: tuple[float, float] = LOGISTIC
) -> Float[np.ndarray, " T"]:
  """Where r(t) stands between its least rank (0) and the full one (1), (T,) float64.

  Args:
    schedule: one of `SCHEDULES`.
    num_train_timesteps: T.
    logistic: steepness and midpoint of the logistic schedules.
  """
  t = np.arange(num_train_timesteps)
  progress, direction = _progress(schedule, t, num_train_timesteps, logistic)
  height = np.where(direction > 0, progress, 1.0 - progress)
  return np.where(direction == 0, 1.0, height)
