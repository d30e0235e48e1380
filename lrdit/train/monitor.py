"""Observing a run: its speed, a profile, its metrics, and advice on bad numbers."""

import itertools
import pathlib
import time
from typing import Any

import jax
import numpy as np

from lrdit.runtime import cluster
from lrdit.train.curriculum import Curriculum
from lrdit.train.state import WindowMetrics


class Stopwatch:
  """Measures the steps per second of training alone, without what `pause` excludes."""

  def __init__(self):
    self.steps, self.seconds, self._since = 0, 0.0, None

  def tick(self) -> None:
    """Count a dispatched step; the first one, which compiles, only starts the clock."""
    if self._since is None:
      self._since = time.perf_counter()
    else:
      self.steps += 1

  def pause(self) -> None:
    """Stop the clock, after the counted steps are done."""
    if self._since is not None:
      self.seconds += time.perf_counter() - self._since
      self._since = None

  def resume(self) -> None:
    """Start the clock."""
    self._since = time.perf_counter()

  def take_rate(self) -> float | None:
    """Return the steps per second since the last call, or None if none was timed."""
    self.pause()
    rate = self.steps / self.seconds if self.steps else None
    self.steps, self.seconds = 0, 0.0
    self.resume()
    return rate


class Profiler:
  """Writes a trace of some steps of the first process, for TensorBoard or Perfetto."""

  def __init__(self, steps: tuple[int, ...], directory: pathlib.Path):
    """Prepare a trace of the steps (first, last), from 1, below `directory`/plugins/profile."""
    self._steps = range(steps[0], steps[1] + 1) if steps and cluster.is_first() else range(0)
    self._directory, self._is_tracing = directory, False

  def before(self, step: int, state: Any, watch: Stopwatch) -> None:
    """Start the trace before the first of its steps that this process runs."""
    if step in self._steps and not self._is_tracing:
      jax.block_until_ready(state)
      watch.pause()
      jax.profiler.start_trace(self._directory)
      self._is_tracing = True

  def after(self, step: int, state: Any, watch: Stopwatch) -> None:
    """End the trace after its last step."""
    if self._is_tracing and step + 1 not in self._steps:
      jax.block_until_ready(state)
      watch.pause()
      self.close()

  def close(self) -> None:
    """End the trace if it is running."""
    if self._is_tracing:
      self._is_tracing = False
      jax.profiler.stop_trace()


def window_scalars(window: WindowMetrics, curriculum: Curriculum, stage: int) -> dict[str, float]:
  """Return the metrics of a host window by name."""
  count = int(window.count)
  scalars = {
    "train/loss": float(window.loss) / count,
    "train/grad_norm": float(window.grad_norm) / count,
    "train/learning_rate": float(window.learning_rate),
  }
  for name, value in window.extra.items():
    scalars[f"train/{name}"] = float(value) / count
  if len(curriculum.stages) > 1:
    scalars["train/stage"] = stage + 1
  groups = itertools.pairwise(curriculum.boundaries)
  for (low, high), total, n in zip(groups, window.group_loss, window.group_count, strict=True):
    if n:
      scalars[f"train/loss_t{low:04d}-{high - 1:04d}"] = float(total) / int(n)
  return scalars


def gradient_norm_scalars(
  sums: tuple[np.ndarray, np.ndarray, np.ndarray], boundaries: tuple[int, ...]
) -> dict[str, float]:
  """Return the mean and variance of the gradient norms of each timestep group, by name.

  `sums` are host arrays from `step.gradient_norms`; groups without an example are left out.
  """
  scalars = {}
  for (low, high), total, squares, n in zip(itertools.pairwise(boundaries), *sums, strict=True):
    if n:
      group, mean = f"t{low:04d}-{high - 1:04d}", float(total) / int(n)
      scalars[f"train/example_grad_norm_mean_{group}"] = mean
      variance = max(0.0, float(squares) / int(n) - mean**2)
      scalars[f"train/example_grad_norm_variance_{group}"] = variance
  return scalars


def advice_on_non_finite(
  quantity: str, step: int, newest: int, before: int, directory: pathlib.Path
) -> str:
  """Return advice on a non-finite quantity, one of `state.NON_FINITE_QUANTITIES`.

  `newest` and `before` are the steps of the last two checkpoints in `directory`, 0 for none.
  """
  lower = "ower config.optimizer.learning_rate or raise config.optimizer.warmup_steps"
  # The loss and gradient of the first step after a checkpoint depend on the checkpoint alone.
  if newest and step == newest + 1 and quantity in ("loss", "gradient"):
    goes_on = f"step {before}" if before else "the start"
    return (
      f"The parameters of the checkpoint of step {newest} are already spoiled: delete "
      f"{directory / str(newest)}, l{lower}, and run the command again, which goes on from "
      f"{goes_on}"
    )
  last_good = f"The last good checkpoint is step {newest}. " if newest else ""
  if quantity == "batch":
    return (
      f"{last_good}The data is damaged: if it is latents, run the command that made them, "
      "--mode=encode, again, which reports what has changed"
    )
  goes_on = f", which goes on from step {newest}" if newest else ""
  return f"{last_good}L{lower}, and run the command again{goes_on}"
