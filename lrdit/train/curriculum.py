"""The timestep curriculum: groups of timesteps that training enters one by one.

Group i is [boundaries[i], boundaries[i + 1]). Most slots of a stage's batch train the current
group; the others replay the groups of earlier stages, a contiguous range next to it. The last
stage, and the only one without a curriculum, is ordinary training over all timesteps.

Axes: B global batch, G groups.
"""

import dataclasses
import itertools

from lrdit.rank.strata import Strata, uniform_strata

STARTS = ("high", "low", "middle")


@dataclasses.dataclass(frozen=True)
class Stage:
  """What one stage trains; hashable."""

  groups: tuple[int, int]  # (first, past the last) group whose loss ends the stage
  strata: Strata  # timesteps of the batch's slots


@dataclasses.dataclass(frozen=True)
class Curriculum:
  """The stages of a run and their ending rule; hashable."""

  boundaries: tuple[int, ...]  # (G + 1,) ascending timesteps from 0 to T
  stages: tuple[Stage, ...]  # in training order; the last one never ends
  patience: int  # number of checks without a better loss that end a stage
  check_every_steps: int  # number of steps whose mean loss one check compares
  restart_optimizer: bool  # begin each stage with fresh moments and a new warm-up
  restart_decay: bool  # begin each stage with a new decay of the learning rate
  warmup_ratio: float = 1.0  # new warm-up of stages after the first, over that of the first
  learning_rate_decay: float = 0.0  # what each stage takes off the peak, as a share of it

  def warmup_steps(self, stage: int, of_run: int) -> int:
    """Return the length of a stage's warm-up: of its own if it has one, else the run's `of_run`."""
    return int(self.warmup_ratio * of_run) if stage and self.restart_optimizer else of_run

  def peak(self, stage: int, of_run: float) -> float:
    """Return a stage's peak learning rate, where the run's is `of_run`."""
    return (1 - self.learning_rate_decay * stage) * of_run if stage else of_run

  @property
  def num_groups(self) -> int:
    """The number of timestep groups, G."""
    return len(self.boundaries) - 1

  def timesteps_of(self, stage: int) -> tuple[int, int]:
    """Return the timesteps [low, high) of the stage's own groups."""
    first, end = self.stages[stage].groups
    return self.boundaries[first], self.boundaries[end]


def stage_order(start: str, num_groups: int, middle: int | None = None) -> tuple[int, ...]:
  """Return the groups in the order in which training enters them.

  The order leads outward from the group at `start`, alternating between lower and higher
  neighbors until one side is exhausted. "middle" is the group `middle`, or the lower of two middle
  groups.
  """
  middle = (num_groups - 1) // 2 if middle is None else middle
  first = {"high": num_groups - 1, "low": 0, "middle": middle}[start]
  lower, higher = range(first - 1, -1, -1), range(first + 1, num_groups)
  pairs = itertools.zip_longest(lower, higher)
  return (first, *(group for pair in pairs for group in pair if group is not None))


def make_stages(
  boundaries: tuple[int, ...], order: tuple[int, ...], batch_size: int
) -> tuple[Stage, ...]:
  """Return a stage for each group of `order`, then ordinary training.

  The finished timesteps get slots in proportion to their share of [0, T), rounded, but leave at
  least one slot to the current group.
  """
  total, stages = boundaries[-1], []
  low = high = 0  # the finished timesteps [low, high)
  for group in order:
    first, end = boundaries[group : group + 2]
    replay = min((2 * batch_size * (high - low) + total) // (2 * total), batch_size - 1)
    ranges = ((low, high, replay), (first, end, batch_size - replay))
    strata = Strata(tuple(sorted(r for r in ranges if r[2] > 0)))
    stages.append(Stage((group, group + 1), strata))
    low, high = (min(low, first), max(high, end)) if low < high else (first, end)
  return (*stages, Stage((0, len(boundaries) - 1), uniform_strata(batch_size, total)))


def scale_boundaries(boundaries: tuple[int, ...], total: int) -> tuple[int, ...]:
  """Return the groups for T = `total`, without those that would be empty."""
  return tuple(sorted({b * total // boundaries[-1] for b in boundaries}))
