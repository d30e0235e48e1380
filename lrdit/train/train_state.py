"""What a training run carries from step to step, all of it checkpointed.

Axes: G timestep groups.
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from lrdit.train.curriculum import Curriculum

# In the order in which a step computes them.
NON_FINITE_QUANTITIES = ("batch", "loss", "gradient", "update")


def first_non_finite(*is_finite: Bool[Array, ""]) -> Int[Array, ""]:
  """int32: 0 if all are, or 1 + the index of the first that is not."""
  flags = jnp.stack(is_finite)
  return jnp.where(flags.all(), 0, 1 + flags.argmin()).astype(jnp.int32)


def where_tree(condition: Bool[Array, ""], chosen: Any, other: Any) -> Any:
  """One of two equal trees."""
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), chosen, other)


@flax.struct.dataclass
class WindowMetrics:
  """Sums over the steps of one line of metrics.

  They are part of the state, so that a resumed run writes the lines of an
  uninterrupted one.

  Attributes:
    loss, grad_norm: float32 sums over steps.
    count: int32 number of steps.
    learning_rate: float32, the one applied in the last step.
    group_loss: (G,) float32 sum over the examples of each timestep group.
    group_count: (G,) int32 number of examples of each.
    non_finite: int32, of the last step: 0, or 1 + the index of the first of
      `NON_FINITE_QUANTITIES` that was not finite.
  """

  loss: Float[Array, ""]
  grad_norm: Float[Array, ""]
  count: Int[Array, ""]
  learning_rate: Float[Array, ""]
  group_loss: Float[Array, " G"]
  group_count: Int[Array, " G"]
  non_finite: Int[Array, ""]

  @classmethod
  def empty(cls, num_groups: int) -> "WindowMetrics":
    """No steps yet."""
    zero = jnp.zeros((), jnp.float32)
    return cls(
      loss=zero,
      grad_norm=zero,
      count=jnp.zeros((), jnp.int32),
      learning_rate=zero,
      group_loss=jnp.zeros(num_groups, jnp.float32),
      group_count=jnp.zeros(num_groups, jnp.int32),
      non_finite=jnp.zeros((), jnp.int32),
    )

  def add(
    self,
    *,
    loss: Float[Array, ""],
    grad_norm: Float[Array, ""],
    learning_rate: Float[Array, ""],
    group_loss: Float[Array, " G"],
    group_count: Int[Array, " G"],
    non_finite: Int[Array, ""],
    step: Int[Array, ""],
    log_every_steps: int,
  ) -> "WindowMetrics":
    """With the numbers of step number `step` (from 1) added.

    The first step after a multiple of `log_every_steps` starts new sums.
    """
    going_on = (step - 1) % log_every_steps != 0
    return WindowMetrics(
      loss=jnp.where(going_on, self.loss, 0.0) + loss,
      grad_norm=jnp.where(going_on, self.grad_norm, 0.0) + grad_norm,
      count=jnp.where(going_on, self.count, 0) + 1,
      learning_rate=learning_rate,
      group_loss=jnp.where(going_on, self.group_loss, 0.0) + group_loss,
      group_count=jnp.where(going_on, self.group_count, 0) + group_count,
      non_finite=non_finite,
    )


@flax.struct.dataclass
class StageProgress:
  """Where a run stands in its curriculum.

  Attributes:
    number: int32 stage, from 0.
    first_step: int32 updates applied before the stage began.
    best_loss: float32, the lowest mean loss a check of the stage has seen.
    bad_checks: int32 checks since then.
    loss_sum: float32 sum over the current group's examples since the last check.
    example_count: int32 number of those examples.
  """

  number: Int[Array, ""]
  first_step: Int[Array, ""]
  best_loss: Float[Array, ""]
  bad_checks: Int[Array, ""]
  loss_sum: Float[Array, ""]
  example_count: Int[Array, ""]

  @classmethod
  def begin(cls, number: Int[Array, ""] | int, first_step: Int[Array, ""] | int) -> "StageProgress":
    """Stage `number`, before its first step."""
    return cls(
      number=jnp.asarray(number, jnp.int32),
      first_step=jnp.asarray(first_step, jnp.int32),
      best_loss=jnp.full((), jnp.inf, jnp.float32),
      bad_checks=jnp.zeros((), jnp.int32),
      loss_sum=jnp.zeros((), jnp.float32),
      example_count=jnp.zeros((), jnp.int32),
    )

  def add(
    self,
    loss_sum: Float[Array, ""],
    example_count: Int[Array, ""],
    step: Int[Array, ""],
    curriculum: Curriculum,
  ) -> "StageProgress":
    """With the current group's examples of step number `step` (from 1) added.

    Every `check_every_steps` the mean since the last check is compared with the
    best one; after `patience` checks without a better one the next stage begins.
    """
    loss_sum, example_count = self.loss_sum + loss_sum, self.example_count + example_count
    is_check = step % curriculum.check_every_steps == 0
    mean = loss_sum / example_count
    is_better = mean < self.best_loss
    bad_checks = jnp.where(is_better, 0, self.bad_checks + 1)
    ends = bad_checks >= curriculum.patience
    ends &= self.number < len(curriculum.stages) - 1
    sums_on = StageProgress(
      self.number, self.first_step, self.best_loss, self.bad_checks, loss_sum, example_count
    )
    checked = StageProgress.begin(self.number, self.first_step).replace(
      best_loss=jnp.minimum(mean, self.best_loss), bad_checks=bad_checks
    )
    after_check = where_tree(ends, StageProgress.begin(self.number + 1, step), checked)
    return where_tree(is_check, after_check, sums_on)


@flax.struct.dataclass
class TrainState:
  """The state of a run after `step` updates.

  Attributes:
    step: int32 updates applied.
    params: float32 parameters ("raw").
    ema_params: their exponential moving average.
    opt_state: optax state.
    window: sums for the next line of metrics.
    stage: where the run stands in its curriculum.
  """

  step: Int[Array, ""]
  params: Any
  ema_params: Any
  opt_state: Any
  window: WindowMetrics
  stage: StageProgress


def create_train_state(
  params: Any, optimizer: optax.GradientTransformation, num_groups: int
) -> TrainState:
  """The state before the first update; the average starts at `params`.

  Args:
    params: float32 parameters.
    optimizer: the optax chain.
    num_groups: timestep groups whose losses the metrics tell apart.
  """
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    ema_params=jax.tree.map(jnp.copy, params),
    opt_state=optimizer.init(params),
    window=WindowMetrics.empty(num_groups),
    stage=StageProgress.begin(number=0, first_step=0),
  )
