"""The measured schedule: r(t) from a rank truncation, with an equal rise in loss at every timestep.

A rank truncation (`analysis/truncation.py`) measures how much the held-out loss of each timestep
group rises when every layer is cut to rank k. A contour gives every group the rank at which its
loss rises by the same amount. The schedule is the contour whose mean rank is the static rank.

Axes: K ranks, G timestep groups, T timesteps.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from lrdit.runtime.errors import UserError

BISECTIONS = 100
ROUNDING = 1e-9  # relative tolerance


def contour(
  ranks: Float[np.ndarray, " K"], rise: Float[np.ndarray, "K G"], level: float
) -> Float[np.ndarray, " G"]:
  """Return each group's least rank at which its loss rises by at most `level`.

  The contour is linear between the measured ranks and stays in their range. A rise also counts at
  every smaller rank, so that noise at a single rank cannot make a dip.

  Args:
    ranks: (K,) ascending.
    rise: (K, G), a group's loss at a rank minus its loss in the whole model.
  """
  falling = np.maximum.accumulate(rise[::-1])  # ascending, from the largest rank down
  return np.array([np.interp(level, column, ranks[::-1]) for column in falling.T])


def match_mean_rank(
  ranks: Sequence[int],
  rise: Sequence[Sequence[float]],
  largest_rank: int,
  boundaries: Sequence[int],
  mean_rank: float,
) -> Float[np.ndarray, " G"]:
  """Return the contour whose mean over timesteps is `mean_rank`, (G,) float64.

  If noise makes the contour jump across that mean, the result lies between its two sides.

  Args:
    ranks: (K,) ascending.
    rise: (K, G) as in `contour`.
    largest_rank: the rank at which the rise is 0 by definition.
    boundaries: (G + 1,) of the groups, from 0 to T.

  Raises:
    UserError: no contour has that mean.
  """
  all_ranks = np.array([*ranks, largest_rank], np.float64)
  rises = np.array([*rise, np.zeros(len(boundaries) - 1)], np.float64)
  weights = np.diff(boundaries) / boundaries[-1]
  low, high = 0.0, float(rises.max())
  means = [contour(all_ranks, rises, level) @ weights for level in (low, high)]
  slack = ROUNDING * largest_rank
  if not means[1] - slack <= mean_rank <= means[0] + slack:
    raise UserError(
      f"rank.schedule=measured cannot meet a mean rank of {mean_rank:.1f}: the analysis covers "
      f"mean ranks from {means[1]:.1f} to {means[0]:.1f}: change rank.ratio, or analyze with "
      "other config.analysis.ranks"
    )
  for _ in range(BISECTIONS):  # the mean falls with the level
    level = (low + high) / 2
    if contour(all_ranks, rises, level) @ weights > mean_rank:
      low = level
    else:
      high = level
  below, above = (contour(all_ranks, rises, level) for level in (low, high))
  jump = (below - above) @ weights
  share = (mean_rank - above @ weights) / jump if jump > slack else 0.0
  return above + (below - above) * share


def monotone(ranks: Float[np.ndarray, " G"], boundaries: Sequence[int]) -> Float[np.ndarray, " G"]:
  """Return the nearest ranks with the same mean that never rise with t (isotonic regression)."""
  from sklearn.isotonic import IsotonicRegression  # slow to import

  regression = IsotonicRegression(increasing=False)
  return regression.fit_transform(np.arange(len(ranks)), ranks, sample_weight=np.diff(boundaries))


def interpolate(
  values: Sequence[float] | Float[np.ndarray, " G"], boundaries: Sequence[int]
) -> Float[np.ndarray, " T"]:
  """Interpolate one value per group to every timestep.

  Values are linear between the groups' center and constant beyond the outermost ones.
  """
  edges = np.asarray(boundaries)
  return np.interp(np.arange(edges[-1]), (edges[:-1] + edges[1:] - 1) / 2, values)


def height(
  shares: Sequence[float], boundaries: Sequence[int]
) -> tuple[Float[np.ndarray, " T"], float]:
  """Return the `height` and `min_ratio` of the measured schedule, as `plan.make_plan` takes them.

  Args:
    shares: (G,) ranks as shares of the largest one, in (0, 1].
    boundaries: (G + 1,) of the groups, from 0 to T.
  """
  share = interpolate(shares, boundaries)
  share = share / share.max()
  least = float(share.min())
  if least > 1 - ROUNDING:
    return np.ones_like(share), 1.0
  return (share - least) / (1 - least), least
