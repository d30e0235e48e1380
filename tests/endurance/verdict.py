"""Whether something grows: a robust slope over the blocks of a series, and its picture.

The first fifth of the work is left out. In it programs are compiled, the memory allocator reaches
its working size, and each kind of work (a grid, an evaluation, a save) runs for the first time and
starts the threads that it keeps. The rest is cut into blocks of equal work, each of several rounds
of that work. A block's value is a median, or the time over the work, so that a single peak does not
count. The slope is the median of those between all pairs of blocks (Theil and Sen), whose
confidence interval needs no model of the noise.
"""

import dataclasses
import itertools
import pathlib

import numpy as np
from scipy import stats

WARM_UP = 0.2  # share of the work
BLOCKS = 20
CONFIDENCE = 0.95
FEWEST_BLOCKS = 5

# The growth over the measured work up to which a series counts as constant: absolute, and as a
# share of its median. Time of the clock is no criterion, as it measures the machine's other load.
TOLERANCES = {"rss": (4 << 20, 0.02), "files": (1, 0.0), "threads": (1, 0.0), "cpu": (0.0, 0.1)}


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Growth of one quantity over the measured work.

  Attributes:
    median: of the blocks.
    growth: the slope times the measured work.
    low: the lower end of its confidence interval.
    tolerance: the growth up to which it counts as constant.
    grows: whether the growth is significant and above the tolerance.
  """

  median: float
  growth: float
  low: float
  tolerance: float
  grows: bool


def _times_at(series: dict[str, list[float]], name: str, edges: np.ndarray) -> np.ndarray:
  """Return when each amount of work was done, by the clock `name`."""
  done, first = np.unique(series["done"], return_index=True)
  return np.interp(edges, done, np.asarray(series[name])[first])


def blocks_of(series: dict[str, list[float]]) -> dict[str, np.ndarray]:
  """Return each block's values by name, after the warm-up.

  "done" is the work at the middle of a block; "rss", "files" and "threads" are medians; "cpu" and
  "time" are seconds per unit of work.

  Raises:
    ValueError: too few blocks have samples.
  """
  done = np.asarray(series["done"])
  edges = np.linspace(WARM_UP * done.max(), done.max(), BLOCKS + 1)
  rows = [np.flatnonzero((done > low) & (done <= high)) for low, high in itertools.pairwise(edges)]
  full = [i for i, found in enumerate(rows) if len(found)]
  if len(full) < FEWEST_BLOCKS:
    raise ValueError(f"only {len(full)} of {BLOCKS} blocks have samples: sample more often")
  blocks = {"done": (edges[:-1] + edges[1:])[full] / 2}
  for name in ("rss", "files", "threads"):
    values = np.asarray(series[name])
    blocks[name] = np.array([np.median(values[rows[i]]) for i in full])
  for name in ("cpu", "time"):
    seconds = np.diff(_times_at(series, name, edges)) / np.diff(edges)
    blocks[name] = seconds[full]
  return blocks


def judge(series: dict[str, list[float]]) -> dict[str, Verdict]:
  """Return the verdict on every quantity of `TOLERANCES`."""
  blocks, found = blocks_of(series), {}
  work = max(series["done"]) * (1 - WARM_UP)
  for name, (absolute, share) in TOLERANCES.items():
    values = blocks[name]
    slope, _, low, _ = stats.theilslopes(values, blocks["done"], CONFIDENCE)
    median = float(np.median(values))
    tolerance = max(absolute, share * median)
    grows = bool(low > 0 and slope * work > tolerance)
    found[name] = Verdict(median, float(slope * work), float(low * work), tolerance, grows)
  return found


def draw(path: pathlib.Path, series: dict[str, list[float]], title: str, unit: str) -> None:
  """Write a PNG of memory, open files, threads, and the time of a unit of work."""
  import matplotlib

  matplotlib.use("agg")
  from matplotlib import pyplot

  blocks, done = blocks_of(series), series["done"]
  figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
  scales = {"rss": 2.0**-20, "files": 1.0, "threads": 1.0}
  labels = ("resident memory, MiB", "open files", "threads")
  for ax, (name, scale), label in zip(axes.flat, scales.items(), labels, strict=False):
    ax.plot(done, scale * np.asarray(series[name]), ".", markersize=2, color="0.7")
    ax.plot(blocks["done"], scale * blocks[name], "o-", markersize=3)
    ax.set_ylabel(label)
  last = axes.flat[3]
  for name, label in (("time", "clock"), ("cpu", "CPU")):
    last.plot(blocks["done"], 1e3 * blocks[name], "o-", markersize=3, label=label)
  last.set_ylabel(f"milliseconds per {unit}")
  last.legend()
  for ax in axes.flat:
    ax.set_ylim(bottom=0)
    ax.axvline(WARM_UP * max(done), color="0.5", linewidth=0.8, linestyle="--")
  for ax in axes[1]:
    ax.set_xlabel(f"{unit}s")
  figure.suptitle(title)
  figure.savefig(path, dpi=110)
  pyplot.close(figure)
