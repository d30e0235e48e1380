"""The timestep curriculum: groups of timesteps that training enters one by one.

Group i is [boundaries[i], boundaries[i + 1]). In a stage most slots of a batch
train the current group, and some replay the finished range: the groups of the
earlier stages, which are always one run next to the current group. The last
stage is ordinary training over all timesteps; a run without a curriculum has
that stage alone.

Axes: B global batch, G groups.
"""

import dataclasses
import itertools

from lrdit.rank.strata import Strata, uniform_strata

STARTS = ("high", "low", "middle")


@dataclasses.dataclass(frozen=True)
class Stage:
  """What is trained until the stage ends; hashable.

  Attributes:
    groups: (first, past the last) group whose loss decides when the stage ends.
    strata: how the batch is spread over timesteps.
  """

  groups: tuple[int, int]
  strata: Strata


@dataclasses.dataclass(frozen=True)
class Curriculum:
  """The stages of a run and what ends them; hashable.

  Attributes:
    boundaries: (G + 1,) rising timesteps from 0 to T.
    stages: in the order in which they are entered; the last one never ends.
    patience: checks without a better loss that end a stage.
    check_every_steps: steps whose mean loss one check looks at.
    restart_optimizer: begin each stage with fresh moments and a new warm-up.
  """

  boundaries: tuple[int, ...]
  stages: tuple[Stage, ...]
  patience: int
  check_every_steps: int
  restart_optimizer: bool

  @property
  def num_groups(self) -> int:
    """The number of timestep groups, G."""
    return len(self.boundaries) - 1

  def timesteps_of(self, stage: int) -> tuple[int, int]:
    """Return [low, high) of the stage's own groups."""
    first, end = self.stages[stage].groups
    return self.boundaries[first], self.boundaries[end]


def stage_order(start: str, num_groups: int) -> tuple[int, ...]:
  """Return the groups in the order they are entered, each next to those before it.

  The order leads outward from the first group, to lower and higher neighbours in turn,
  and on with the one side where the other is exhausted.

  Args:
    start: one of `STARTS`; the lower of two middle groups counts as the middle.
    num_groups: G >= 1.
  """
  first = {"high": num_groups - 1, "low": 0, "middle": (num_groups - 1) // 2}[start]
  lower, higher = range(first - 1, -1, -1), range(first + 1, num_groups)
  pairs = itertools.zip_longest(lower, higher)
  return (first, *(group for pair in pairs for group in pair if group is not None))


def stage_strata(
  current: tuple[int, int], finished: tuple[int, int], batch_size: int, total: int
) -> Strata:
  """Return the batch of a stage: the current range, and a replay of the finished one.

  The finished range gets its share of all timesteps in slots, rounded, but
  leaves the current one at least one slot; without a slot it is left out.

  Args:
    current: [low, high).
    finished: [low, high), disjoint from `current`; may be empty.
    batch_size: B.
    total: T.
  """
  width = finished[1] - finished[0]
  replay = min((2 * batch_size * width + total) // (2 * total), batch_size - 1)
  ranges = ((*finished, replay), (*current, batch_size - replay))
  return Strata(tuple(sorted(r for r in ranges if r[2] > 0)))


def make_stages(
  boundaries: tuple[int, ...], order: tuple[int, ...], batch_size: int
) -> tuple[Stage, ...]:
  """Return a stage for each group of `order`, then ordinary training.

  Args:
    boundaries: (G + 1,) rising timesteps from 0 to T.
    order: from `stage_order`; empty without a curriculum.
    batch_size: B.
  """
  total, stages, low, high = boundaries[-1], [], 0, 0
  for group in order:
    current = boundaries[group], boundaries[group + 1]
    strata = stage_strata(current, (low, high), batch_size, total)
    stages.append(Stage((group, group + 1), strata))
    low, high = (min(low, current[0]), max(high, current[1])) if low < high else current
  everything = Stage((0, len(boundaries) - 1), uniform_strata(batch_size, total))
  return (*stages, everything)


def scale_boundaries(boundaries: tuple[int, ...], total: int) -> tuple[int, ...]:
  """Return the same groups for T = `total`, without those that would hold no timestep."""
  return tuple(sorted({b * total // boundaries[-1] for b in boundaries}))
