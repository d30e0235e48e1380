"""Figures of an analysis: what they share, and those of the rank truncation.

Each function makes a matplotlib figure from a section's JSON, or returns None where there is
nothing to draw; `write_png` writes it.

Axes: G timestep groups, K ranks that layers are cut to.
"""

import functools
import io
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lrdit.analysis.plot_style import (
  COLOURS,
  LINE_STYLES,
  SETTINGS,
  T_LABEL,
  add_grid,
  plain_ticks,
)
from lrdit.analysis.spectra import ENERGIES, MEASURES
from lrdit.runtime.store import atomic_path

DOTS_PER_INCH = 150
KIND_TITLES = {"attention": "attention", "mlp": "MLP", "adaln": "adaLN", "other": "other layers"}
MEASURE_TITLES = dict(
  zip(
    MEASURES,
    ["stable rank", "entropy rank", *(f"{100 * e:.0f} % energy rank" for e in ENERGIES)],
    strict=True,
  )
)
NO_RISE = "#D9D9D9"
ROUNDING = 1e-6  # of a loss: less is the rounding of float32
LEAST_RISE = 1e-4  # share of the largest rise that the colours still show


def styled(make: Callable[..., Any]) -> Callable[..., Any]:
  """Wrap a function so that it draws with the settings of all these figures."""

  @functools.wraps(make)
  def wrapped(*args: Any, **kwargs: Any) -> Any:
    import matplotlib  # slow, and only needed here

    with matplotlib.rc_context(SETTINGS):
      return make(*args, **kwargs)

  return wrapped


def panels(
  rows: int, columns: int, width: float, height: float, title: str, **settings: Any
) -> tuple[Any, np.ndarray]:
  """Return a figure and its (rows, columns) axes, each of `width` x `height` inches."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
  figure.suptitle(title)
  return figure, figure.subplots(rows, columns, squeeze=False, **settings)


def legend_below(figure: Any, handles: Sequence[Any], columns: int | None = None) -> None:
  """Draw a figure's legend under its panels, in one row unless `columns` is given."""
  columns = columns or len(handles)
  figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=3)


def group_edges(groups: Sequence[Mapping[str, int]]) -> list[int]:
  """Return the (G + 1,) timesteps at which groups begin and end."""
  return [group["t_first"] for group in groups] + [groups[-1]["t_last"] + 1]


def label_row(row: Sequence[Any], measure: str) -> None:
  """Label a row of panels and start its axis at 0; call it after everything is drawn."""
  row[0].set_ylim(0, 1.06 * row[0].get_ylim()[1])  # values far above 0 leave a small margin
  if not row[0].get_shared_y_axes().joined(row[0], row[-1]):
    row[-1].set_ylim(0, 1.06 * row[-1].get_ylim()[1])
  row[0].set_ylabel(f"{MEASURE_TITLES[measure]}\n/ min(D_in, D_out)")
  for panel in row:
    add_grid(panel)


def png(figure: Any) -> bytes:
  """Return a figure as a PNG file, which is the same for the same figure."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg

  file = io.BytesIO()
  FigureCanvasAgg(figure)
  figure.savefig(file, format="png", dpi=DOTS_PER_INCH, facecolor="white")
  return file.getvalue()


def write_png(path: pathlib.Path, figure: Any) -> None:
  """Write a figure, whole or not at all; write nothing if it is None."""
  if figure is not None:
    with atomic_path(path) as temporary:
      temporary.write_bytes(png(figure))


@styled
def truncation(
  found: Mapping[str, Any], title: str, schedule: tuple[str, Sequence[float]] | None = None
) -> Any:
  """Draw the rise in held-out loss of each timestep group when layers are cut to rank k.

  Args:
    found: "boundaries" (G + 1,), "baseline" (G,), "ranks" (K,), "rise" (K, G) with None for
      what is missing.
    title: names the model and its step.
    schedule: a name and (T,) r(t) to draw upon the map.
  """
  from matplotlib.colors import LogNorm

  order = np.argsort(found["ranks"])
  ranks = np.array(found["ranks"], np.float64)[order]
  rise = np.array(found["rise"], np.float64)[order]  # None becomes NaN
  largest = np.nanmax(rise, initial=0)
  if largest <= ROUNDING * np.nanmax(np.array(found["baseline"], float), initial=0):
    return None
  figure, ((panel,),) = panels(1, 1, 7.2, 4.4, f"Rank truncation: {title}")
  least = LEAST_RISE * largest
  norm = LogNorm(rise[rise >= least].min(), largest)
  edges = _rank_edges(ranks)
  shown = np.where(rise < least, least / 10, rise)
  image = panel.pcolormesh(
    found["boundaries"], edges, shown, norm=norm, cmap=_rise_colours(), rasterized=True
  )
  _add_contours(panel, found["boundaries"], ranks, shown, norm)
  if schedule is not None:
    name, r = schedule
    effects = _outline(4.5, "white")
    panel.step(np.arange(len(r)), r, color="black", linewidth=2, label=name, path_effects=effects)
    figure.legend(loc="outside lower center")
  panel.set(xlabel=T_LABEL, ylabel="rank k that the factorised layers are cut to", yscale="log")
  panel.set(ylim=(edges[0], edges[-1]))
  _label_ranks(panel, ranks)
  label = "rise in held-out loss (grey: none, or below the scale)"
  figure.colorbar(image, ax=panel, label=label, extend="min")
  return figure


def _rank_edges(ranks: np.ndarray) -> np.ndarray:
  """Return the (K + 1,) borders of rows, halfway between ranks on a logarithmic axis."""
  if len(ranks) == 1:
    return ranks[0] * np.array([0.8, 1.25])
  inner = np.sqrt(ranks[1:] * ranks[:-1])
  return np.array([ranks[0] ** 2 / inner[0], *inner, ranks[-1] ** 2 / inner[-1]])


def _label_ranks(panel: Any, ranks: np.ndarray) -> None:
  from matplotlib import ticker

  panel.yaxis.set_major_locator(ticker.FixedLocator(ranks))
  panel.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
  panel.yaxis.set_minor_locator(ticker.NullLocator())


def _rise_colours() -> Any:
  import matplotlib

  return matplotlib.colormaps["viridis"].with_extremes(under=NO_RISE, bad="white")


def _add_contours(
  panel: Any, boundaries: Sequence[int], ranks: np.ndarray, rise: np.ndarray, norm: Any
) -> None:
  """Add contours at powers of ten, and at three times these where there are few."""
  if min(rise.shape) < 2:
    return
  # Contours stay away from the ends of the scale, where there is nothing on one side of them.
  low, high = norm.vmin * (1 + ROUNDING), norm.vmax * (1 - ROUNDING)
  decades = 10.0 ** np.arange(np.floor(np.log10(norm.vmin)), np.ceil(np.log10(norm.vmax)) + 1)
  levels = decades[(decades > low) & (decades < high)]
  if len(levels) < 3:
    levels = np.sort(np.concatenate([decades, 3 * decades]))
    levels = levels[(levels > low) & (levels < high)]
  t = (np.array(boundaries[1:]) + np.array(boundaries[:-1])) / 2
  # Logarithms change evenly between the middles of cells, and the rises do not.
  heights = np.log10(np.where(rise >= norm.vmin, rise, np.nan))
  style = dict(colors="white", linestyles="solid", linewidths=1.2)
  lines = panel.contour(t, ranks, np.ma.masked_invalid(heights), levels=np.log10(levels), **style)
  lines.set_path_effects(_outline(2.2, "black"))
  for text in panel.clabel(lines, fmt=lambda level: f"{10**level:g}"):
    box = dict(facecolor="white", edgecolor="none", alpha=0.8, pad=0.8)
    text.set(color="black", bbox=box, path_effects=[])


def _outline(width: float, colour: str) -> list[Any]:
  """Return the effects that give a line a border, so that it shows on any background."""
  from matplotlib import patheffects

  return [patheffects.Stroke(linewidth=width, foreground=colour), patheffects.Normal()]


@styled
def losses(
  boundaries: Sequence[int], by_name: Mapping[str, Sequence[float | None]], title: str
) -> Any:
  """Draw the held-out loss of each timestep group.

  Args:
    boundaries: (G + 1,).
    by_name: (G,) losses for each name in the legend; None for what is missing.
    title: names the model and its step.
  """
  found = {name: np.array(loss, np.float64) for name, loss in by_name.items()}
  found = {name: loss for name, loss in found.items() if np.isfinite(loss).any()}
  if not found:
    return None
  figure, ((panel,),) = panels(1, 1, 7.6, 4.0, f"Held-out loss by timestep group: {title}")
  for i, (name, loss) in enumerate(found.items()):
    style = dict(color=COLOURS[i % len(COLOURS)], linestyle=LINE_STYLES[i % len(LINE_STYLES)])
    panel.stairs(loss, boundaries, baseline=None, label=name, linewidth=1.8, **style)
  panel.set(xlabel=T_LABEL, ylabel="mean loss (per value)", yscale="log")
  plain_ticks(panel)
  add_grid(panel)
  if len(found) > 1:
    figure.legend(loc="outside lower center", ncols=3)
  return figure
