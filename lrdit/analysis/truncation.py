"""Rank truncation: how the held-out loss of each timestep group rises when every layer is cut.

All of the chosen layers are cut to rank k at once: dense kernels to their best approximation of
that rank, low-rank layers to their first k components, of which a timestep uses no more than its
active rank anyway.

Axes: D_in, D_out width, K ranks, G timestep groups, R = min(D_in, D_out).
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
from lrdit.runtime.progress import make_bar

# Shares of the largest rank, for `default_ranks`.
SHARES = (1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)


def default_ranks(largest: int) -> tuple[int, ...]:
  """Return ascending ranks below `largest`, closer together where they are small."""
  return tuple(sorted({max(1, round(share * largest)) for share in SHARES} - {largest}))


def leading_directions(kernel: Float[np.ndarray, "D_in D_out"]) -> Float[np.ndarray, "R R"]:
  """Return singular vectors of the kernel's shorter side as float32 columns, leading ones first.

  They are the left ones where D_in <= D_out, else the right ones. They take at most as much memory
  as the kernel, for most layers far less.
  """
  wide = kernel if kernel.shape[0] <= kernel.shape[1] else kernel.T
  return spectra.left_singular_vectors(wide)[1].astype(np.float32)


def cut_kernel(
  kernel: Float[np.ndarray, "D_in D_out"], directions: Float[np.ndarray, "R R"], rank: int
) -> Float[np.ndarray, "D_in D_out"]:
  """Return the kernel's best approximation of a rank (Eckart and Young 1936), float32.

  It is the kernel projected on its leading singular vectors of either side.

  Args:
    kernel: float32.
    directions: from `leading_directions`.
    rank: at most R.
  """
  kept = directions[:, :rank]
  if kernel.shape[0] <= kernel.shape[1]:
    return kept @ (kept.T @ kernel)
  return (kernel @ kept) @ kept.T


class Truncator:
  """Cuts some layers of a model to any rank."""

  def __init__(self, params: Mapping[str, Any], names: Sequence[str]):
    """Compute nothing yet.

    Args:
      params: on the host.
      names: of the layers, dense or factorised.
    """
    self._flat = flax.traverse_util.flatten_dict(dict(params), sep="/")
    self._dense = [name for name in names if f"{name}/kernel" in self._flat]
    self._factorised = [name for name in names if f"{name}/kernel" not in self._flat]

  @functools.cached_property
  def _directions(self) -> dict[str, np.ndarray]:
    """The directions of the dense kernels, which serve all ranks."""
    return {name: leading_directions(self._flat[f"{name}/kernel"]) for name in self._dense}

  @property
  def largest_rank(self) -> int:
    """The rank of the widest layer, at which nothing is cut."""
    dense = [min(self._flat[f"{name}/kernel"].shape) for name in self._dense]
    return max(dense + [self._flat[f"{name}/up"].shape[0] for name in self._factorised])

  def cut(self, rank: int, place: Callable[[np.ndarray], Any] = np.asarray) -> dict[str, Any]:
    """Return the parameters with every layer cut to `rank`, in their original shapes.

    Args:
      rank: number of components that are kept; from `largest_rank` on, all of them.
      place: puts an array where it is wanted; only one cut layer at a time is on the host.
    """
    flat = {}
    for path, values in self._flat.items():
      name, _, part = path.rpartition("/")
      if name in self._dense and part == "kernel" and rank < min(values.shape):
        values = cut_kernel(values, self._directions[name], rank)
      elif name in self._factorised and part == "up":
        # Components without an output row contribute exactly nothing.
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

  Args:
    truncator: of the parameters.
    ranks: (K,) to cut to.
    place: as in `Truncator.cut`.
    losses_of: measures placed parameters, under the same noise and timesteps every time.
    cache: one unit for each rank.

  Returns:
    As JSON "ranks", "largest_rank" (at which the rise is 0), "baseline" (G,), "loss" and "rise"
    (K, G), loss minus baseline; None for groups of which no timestep was sampled.
  """
  units = {"whole": truncator.largest_rank} | {f"rank_{rank}": rank for rank in ranks}
  missing = [unit for unit in units if cache.load(unit) is None]
  with make_bar(len(units), len(units) - len(missing), "rank") as bar:
    for unit in missing:
      # Never bound to a name, so that one model is gone when the next is made.
      losses = losses_of(truncator.cut(units[unit], place))
      cache.save(unit, {"loss": losses.group_means})
      bar.update()
  found = {unit: cache.load(unit)[0]["loss"] for unit in units}
  baseline = found.pop("whole")
  return {
    "ranks": list(ranks),
    "largest_rank": truncator.largest_rank,
    "baseline": baseline,
    "loss": list(found.values()),
    "rise": [
      [None if x is None else x - b for x, b in zip(loss, baseline, strict=True)]
      for loss in found.values()
    ],
  }
