"""The state that training carries from step to step, all of it in the checkpoints.

Axes: G timestep groups.
"""

from collections.abc import Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lrdit.train.curriculum import Curriculum

# In the order of their computation in a step.
NON_FINITE_QUANTITIES = ("batch", "loss", "gradient", "update")


@flax.struct.dataclass
class WindowMetrics:
  """Sums over the steps of one line of metrics; float32 and int32.

  The state holds them, so that a resumed run writes the same lines as an uninterrupted one.
  """

  loss: Float[Array, ""]
  grad_norm: Float[Array, ""]
  count: Int[Array, ""]  # steps
  learning_rate: Float[Array, ""]  # of the last step
  group_loss: Float[Array, " G"]  # over the examples of each timestep group
  group_count: Int[Array, " G"]  # examples of each group
  # Of the last step: 0, or 1 + the index of the first of `NON_FINITE_QUANTITIES` to be non-finite.
  non_finite: Int[Array, ""]
  extra: dict[str, Float[Array, ""]] = flax.struct.field(default_factory=dict)  # by name

  @classmethod
  def empty(cls, num_groups: int, extra: Sequence[str] = ()) -> "WindowMetrics":
    """Return the window before any step, with the names of the run's own sums."""
    return cls(
      loss=jnp.zeros((), jnp.float32),
      grad_norm=jnp.zeros((), jnp.float32),
      count=jnp.zeros((), jnp.int32),
      learning_rate=jnp.zeros((), jnp.float32),
      group_loss=jnp.zeros(num_groups, jnp.float32),
      group_count=jnp.zeros(num_groups, jnp.int32),
      non_finite=jnp.zeros((), jnp.int32),
      extra={name: jnp.zeros((), jnp.float32) for name in extra},
    )

  def add(
    self, new: "WindowMetrics", step: Int[Array, ""], log_every_steps: int
  ) -> "WindowMetrics":
    """Return the window with the metrics `new` of step number `step` (from 1) added.

    The first step after a multiple of `log_every_steps` starts new sums.
    """
    goes_on = (step - 1) % log_every_steps != 0
    summed = ("loss", "grad_norm", "count", "group_loss", "group_count", "extra")
    old, own = ({name: getattr(window, name) for name in summed} for window in (self, new))
    return new.replace(**jax.tree.map(lambda a, b: jnp.where(goes_on, a, 0) + b, old, own))


@flax.struct.dataclass
class StageProgress:
  """A run's position in its curriculum; float32 and int32."""

  number: Int[Array, ""]  # of the stage, from 0
  first_step: Int[Array, ""]  # updates applied before the stage began
  best_loss: Float[Array, ""]  # lowest mean loss of the stage's checks
  bad_checks: Int[Array, ""]  # checks since that one
  loss_sum: Float[Array, ""]  # over the current group's examples since the last check
  example_count: Int[Array, ""]  # of those examples

  @classmethod
  def begin(cls, number: Int[Array, ""] | int, first_step: Int[Array, ""] | int) -> "StageProgress":
    """Return stage `number` before its first step."""
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
    """Return the progress with the current group's examples of step `step` (from 1) added.

    Every `check_every_steps` the mean loss since the last check is compared with the best one.
    After `patience` checks without a better one the next stage begins.
    """
    sums = self.replace(
      loss_sum=self.loss_sum + loss_sum, example_count=self.example_count + example_count
    )
    mean = sums.loss_sum / sums.example_count
    bad_checks = jnp.where(mean < self.best_loss, 0, self.bad_checks + 1)
    ends = bad_checks >= curriculum.patience
    ends &= self.number < len(curriculum.stages) - 1
    checked = StageProgress.begin(self.number, self.first_step).replace(
      best_loss=jnp.minimum(mean, self.best_loss), bad_checks=bad_checks
    )
    after_check = optax.tree.where(ends, StageProgress.begin(self.number + 1, step), checked)
    return optax.tree.where(step % curriculum.check_every_steps == 0, after_check, sums)


@flax.struct.dataclass
class TrainState:
  """The state of a run after `step` updates."""

  step: Int[Array, ""]
  params: Any  # float32, raw
  ema_params: Any  # their exponential moving average
  opt_state: Any
  window: WindowMetrics
  stage: StageProgress


def create_train_state(
  params: Any,
  optimizer: optax.GradientTransformation,
  num_groups: int,
  extra: Sequence[str] = (),
) -> TrainState:
  """Return the state before the first update, for `num_groups` timestep groups.

  The moving average starts at `params`. `extra` are the names of further sums in the window.
  """
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    ema_params=jax.tree.map(jnp.copy, params),
    opt_state=optimizer.init(params),
    window=WindowMetrics.empty(num_groups, extra),
    stage=StageProgress.begin(number=0, first_step=0),
  )
