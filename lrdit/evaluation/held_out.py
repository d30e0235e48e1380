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

# Seed of noise, timesteps and slots. It is no run's own, so that runs can be compared; it changes
# with every change of what is sampled, as losses of different seeds are not compared.
SEED = 1
EVAL_STREAM = 2**31 - 1  # keeps the noise apart from that of training steps


@dataclasses.dataclass(frozen=True)
class HeldOutLosses:
  """Sums over held-out examples and draws.

  Attributes:
    loss_sum: (G,) float64, sum of the losses of each timestep group.
    count: (G,) number of losses in each.
  """

  loss_sum: Float[np.ndarray, " G"]
  count: Int[np.ndarray, " G"]

  @property
  def mean(self) -> float:
    """Mean over all examples and passes."""
    return float(self.loss_sum.sum() / self.count.sum())

  @property
  def group_means(self) -> list[float | None]:
    """Mean of each group; None where none of its timesteps was sampled."""
    return [float(s / n) if n else None for s, n in zip(self.loss_sum, self.count, strict=True)]


def held_out_losses(
  eval_step: Callable,
  params: Any,
  source: Source,
  slots: Int[np.ndarray, "n b"],
  batch_size: int,
  draws: int,
) -> HeldOutLosses:
  """Sum losses over passes through the held-out split, each with other noise and timesteps.

  A slot of the batch is a stratum of timesteps. `pipeline.eval_batches` samples an example's slot
  from its index, and each pass shifts the examples over the slots, so that an example meets
  another stratum each time.

  Args:
    eval_step: pmapped `step.eval_step`.
    params: replicated parameters.
    source: the held-out split.
    slots: of the global batch, from `parallel.batch_slots`.
    batch_size: global.
    draws: passes; at least 1.
  """
  loss_sum: Any = 0.0
  count: Any = 0
  for draw in range(draws):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), EVAL_STREAM), draw)
    batches = pipeline.eval_batches(source, slots, batch_size, draw / draws)
    for number, batch in enumerate(batches):
      sums = eval_step(params, batch, jax.random.fold_in(key, number))
      group_loss, group_count = parallel.read(sums)
      loss_sum = loss_sum + np.asarray(group_loss, np.float64)
      count = count + np.asarray(group_count, np.int64)
  return HeldOutLosses(loss_sum, count)
