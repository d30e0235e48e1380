"""Rank truncation: the rise in each timestep group's held-out loss when layers are cut to rank k.

All chosen layers are cut at once: dense kernels to their best rank-k approximation, low-rank
layers to their first k components. A timestep never uses more than its active rank.

Axes: D_in, D_out widths, K ranks, G timestep groups, R = min(D_in, D_out).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import numpy as np
from jaxtyping import Float

from lrdit.analysis import spectra
from lrdit.analysis.unit_cache import UnitCache
from lrdit.evaluation.held_out import HeldOutLosses

# Shares of the largest rank.
SHARES = (1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)


def default_ranks(largest: int) -> tuple[int, ...]:
  """Return ascending ranks below `largest`, denser among small ones."""
  return tuple(sorted({max(1, round(share * largest)) for share in SHARES} - {largest}))


def leading_directions(kernel: Float[np.ndarray, "D_in D_out"]) -> Float[np.ndarray, "R R"]:
  """Return the singular vectors of the kernel's shorter side as float32 columns, leading first."""
  wide = kernel if kernel.shape[0] <= kernel.shape[1] else kernel.T
  return spectra.left_singular_vectors(wide)[1].astype(np.float32)


def cut_kernel(
  kernel: Float[np.ndarray, "D_in D_out"], directions: Float[np.ndarray, "R R"], rank: int
) -> Float[np.ndarray, "D_in D_out"]:
  """Return the best approximation of a kernel at a given rank (Eckart and Young 1936), float32."""
  kept = directions[:, :rank]
  if kernel.shape[0] <= kernel.shape[1]:
    return kept @ (kept.T @ kernel)
  return (kernel @ kept) @ kept.T


class Truncator:
  """Cuts the named layers, dense or factorized, to any rank."""

  def __init__(self, params: Mapping[str, Any], names: Sequence[str]):
    """Keep the parameters, which are on the host."""
    self._flat = flax.traverse_util.flatten_dict(dict(params), sep="/")
    self._dense = [name for name in names if f"{name}/kernel" in self._flat]
    self._factorized = [name for name in names if f"{name}/kernel" not in self._flat]

  @functools.cached_property
  def _directions(self) -> dict[str, np.ndarray]:
    return {name: leading_directions(self._flat[f"{name}/kernel"]) for name in self._dense}

  @property
  def largest_rank(self) -> int:
    """The rank of the widest layer, at which nothing is cut."""
    dense = [min(self._flat[f"{name}/kernel"].shape) for name in self._dense]
    return max(dense + [self._flat[f"{name}/up"].shape[0] for name in self._factorized])

  def cut(self, rank: int, place: Callable[[np.ndarray], Any] = np.asarray) -> dict[str, Any]:
    """Return the parameters in their original shapes, with every named layer cut to `rank`.

    `place` moves each array to its device, so that the host holds one cut layer at a time.
    """
    flat = {}
    for path, values in self._flat.items():
      name, _, part = path.rpartition("/")
      if name in self._dense and part == "kernel" and rank < min(values.shape):
        values = cut_kernel(values, self._directions[name], rank)
      elif name in self._factorized and part == "up":
        # A component with a zero output row contributes exactly nothing.
        values = np.concatenate([values[:rank], np.zeros_like(values[rank:])])
      flat[path] = place(values)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def analyze_truncation(
  truncator: Truncator,
  ranks: Sequence[int],
  place: Callable[[np.ndarray], Any],
  losses_of: Callable[[Any], HeldOutLosses],
  cache: UnitCache,
) -> dict[str, Any]:
  """Return the held-out losses of the whole model and of the model cut to every rank.

  `losses_of` evaluates placed parameters with the same noise and timesteps each time. The cache has
  one unit for each rank. The JSON result has "ranks", "largest_rank" (where the rise is 0),
  "baseline" (G,), "loss" (K, G), and "rise" (K, G), loss minus baseline. Groups without a sampled
  timestep have None.
  """
  units = {"whole": truncator.largest_rank} | {f"rank_{rank}": rank for rank in ranks}

  def make(unit: str) -> tuple[dict[str, Any]]:
    # Never bound to a name, so that one model is freed before the next is made.
    return ({"loss": losses_of(truncator.cut(units[unit], place)).group_means},)

  cache.fill(list(units), "rank", make)
  baseline, *losses = (cache.load(unit)[0]["loss"] for unit in units)
  return {
    "ranks": list(ranks),
    "largest_rank": truncator.largest_rank,
    "baseline": baseline,
    "loss": losses,
    "rise": [
      [None if x is None else x - b for x, b in zip(loss, baseline, strict=True)] for loss in losses
    ],
  }
