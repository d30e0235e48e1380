"""Loss on the held-out split, overall and by timestep group.

Noise and timesteps are functions of the pass, the batch number and the index in the batch alone:
they are the same for every arm, seed, run and number of devices.

Axes: n devices, b local batch, G timestep groups.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from lrdit.data import pipeline
from lrdit.data.source import Source
from lrdit.runtime import parallel

# The seed of noise and timesteps is not the run's, so that runs can be compared. Change it whenever
# sampling changes: losses of different seeds are not compared.
SEED = 1
EVAL_STREAM = 2**31 - 1  # keeps the noise apart from that of training steps


@dataclasses.dataclass(frozen=True)
class HeldOutLosses:
  """The sum (float64) and the number of the losses in each timestep group, over all passes."""

  loss_sum: Float[np.ndarray, " G"]
  count: Int[np.ndarray, " G"]

  @property
  def mean(self) -> float:
    """Return the mean over all examples and passes."""
    return float(self.loss_sum.sum() / self.count.sum())

  @property
  def group_means(self) -> list[float | None]:
    """Return the mean of each group, or None where none of its timesteps was sampled."""
    return [float(s / n) if n else None for s, n in zip(self.loss_sum, self.count, strict=True)]


def held_out_losses(
  eval_step: Callable,
  params: Any,
  source: Source,
  slots: Int[np.ndarray, "n b"],
  batch_size: int,
  draws: int,
) -> HeldOutLosses:
  """Sum losses over `draws` passes through the held-out split, with `step.eval_step` pmapped.

  Each pass has other noise and timesteps. A slot of the batch is a stratum of timesteps: each pass
  shifts the examples over the slots, so that an example meets another stratum each time (see
  `pipeline.eval_batches`).
  """
  loss_sum, count = 0.0, 0
  for draw in range(draws):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), EVAL_STREAM), draw)
    batches = pipeline.eval_batches(source, slots, batch_size, draw / draws)
    for number, batch in enumerate(batches):
      step_key = jax.random.fold_in(key, number)
      group_loss, group_count = parallel.read(eval_step(params, batch, step_key))
      loss_sum = loss_sum + np.asarray(group_loss, np.float64)
      count = count + np.asarray(group_count, np.int64)
  return HeldOutLosses(loss_sum, count)
