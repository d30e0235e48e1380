"""r(t) from the causal test: the iso-loss contour that meets a mean rank.

Axes: K ranks, G timestep groups, T timesteps.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from lrdit.runtime.errors import UserError

BISECTIONS = 100
ROUNDING = 1e-9  # relative: numbers that are no further apart are taken as equal


def contour(
  ranks: Float[np.ndarray, " K"], rise: Float[np.ndarray, "K G"], level: float
) -> Float[np.ndarray, " G"]:
  """The least rank of each group whose rise in loss is at most `level`.

  Linear between the measured ranks. A rise counts at every smaller rank as well, so that
  the noise of a single one cannot make a dip.

  Args:
    ranks: (K,) rising; beyond the last one, or below the first one, nothing is assumed.
    rise: (K, G), loss of a group at a rank minus that of the whole model.
    level: of the contour.
  """
  falling = np.maximum.accumulate(rise[::-1])  # from the largest rank down: rising
  return np.array([np.interp(level, column, ranks[::-1]) for column in falling.T])


def iso_loss_ranks(
  ranks: Sequence[int],
  rise: Sequence[Sequence[float]],
  largest_rank: int,
  boundaries: Sequence[int],
  mean_rank: float,
) -> Float[np.ndarray, " G"]:
  """The contour whose mean over timesteps is `mean_rank`.

  Args:
    ranks: (K,) rising.
    rise: (K, G) as in `contour`.
    largest_rank: at which the rise is 0 by definition.
    boundaries: (G + 1,) of the groups.
    mean_rank: to meet.

  Returns:
    (G,) float64. Where noise has made the contour jump at the level that is sought, a point
    between its two sides.

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
      f"rank.schedule=measured cannot meet a mean rank of {mean_rank:.1f}: the analysis is of "
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
  share = (mean_rank - above @ weights) / jump if jump > ROUNDING * largest_rank else 0.0
  return above + (below - above) * share


def monotone(ranks: Float[np.ndarray, " G"], boundaries: Sequence[int]) -> Float[np.ndarray, " G"]:
  """The nearest ranks that nowhere rise with t, of the same mean (isotonic regression)."""
  from sklearn.isotonic import IsotonicRegression  # slow to import, and only needed here

  regression = IsotonicRegression(increasing=False)
  return regression.fit_transform(np.arange(len(ranks)), ranks, sample_weight=np.diff(boundaries))


def interpolate(values: Sequence[float], boundaries: Sequence[int]) -> Float[np.ndarray, " T"]:
  """Of every timestep: linear between the groups' middles, constant beyond the outermost.

  Args:
    values: (G,) of the groups.
    boundaries: (G + 1,) of the groups, from 0 to T.
  """
  edges = np.asarray(boundaries)
  return np.interp(np.arange(edges[-1]), (edges[:-1] + edges[1:] - 1) / 2, values)


def height(
  shares: Sequence[float], boundaries: Sequence[int]
) -> tuple[Float[np.ndarray, " T"], float]:
  """r(t) at every timestep, for `rank_schedule.make_plan`.

  Args:
    shares: (G,) of the largest rank, in (0, 1].
    boundaries: as in `interpolate`.

  Returns:
    ((T,) float64, 0 where the rank is least and 1 where it is largest; least share of the largest).
  """
  share = interpolate(shares, boundaries)
  share = share / share.max()
  least = float(share.min())
  if least > 1 - ROUNDING:
    return np.ones_like(share), 1.0
  return (share - least) / (1 - least), least
