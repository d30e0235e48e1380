"""Figures of the rank truncation and of the loss by timestep group, or None if there is no data.

Titles name the model and its step.

Axes: K ranks that layers are cut to, T timesteps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lrdit.analysis import plot_style

NO_RISE = "#D9D9D9"
ROUNDING = 1e-6  # share of a loss that float32 may round away
LEAST_RISE = 1e-4  # smallest colored rise, as a share of the largest


@plot_style.styled()
def truncation(
  found: Mapping[str, Any], title: str, schedule: tuple[str, Sequence[float]] | None = None
) -> Any:
  """Draw the rise in held-out loss of each timestep group when layers are cut to rank k.

  `found` has the fields of truncation.json. `schedule` is the label and the (T,) values of an r(t)
  to overlay.
  """
  import matplotlib
  from matplotlib.colors import LogNorm

  order = np.argsort(found["ranks"])
  ranks = np.array(found["ranks"], np.float64)[order]
  rise = np.array(found["rise"], np.float64)[order]  # None becomes NaN
  largest = np.nanmax(rise, initial=0)
  if largest <= ROUNDING * np.nanmax(np.array(found["baseline"], float), initial=0):
    return None
  figure, ((panel,),) = plot_style.panels(1, 1, 7.2, 4.4, f"Rank truncation: {title}")
  least = LEAST_RISE * largest
  norm = LogNorm(rise[rise >= least].min(), largest)
  edges = _rank_edges(ranks)
  shown = np.where(rise < least, least / 10, rise)
  colors = matplotlib.colormaps["viridis"].with_extremes(under=NO_RISE, bad="white")
  boundaries = found["boundaries"]
  image = panel.pcolormesh(boundaries, edges, shown, norm=norm, cmap=colors, rasterized=True)
  _add_contours(panel, boundaries, ranks, shown, norm)
  if schedule is not None:
    name, r = schedule
    effects = _outline(4.5, "white")
    panel.step(np.arange(len(r)), r, color="black", linewidth=2, label=name, path_effects=effects)
    figure.legend(loc="outside lower center")
  panel.set(xlabel=plot_style.T_LABEL, ylabel="rank k that the factorized layers are cut to")
  panel.set(yscale="log", ylim=(edges[0], edges[-1]))
  panel.set_yticks(ranks, [f"{rank:g}" for rank in ranks])
  panel.set_yticks([], minor=True)
  label = "rise in held-out loss (gray: none, or below the scale)"
  figure.colorbar(image, ax=panel, label=label, extend="min")
  return figure


def _rank_edges(ranks: np.ndarray) -> np.ndarray:
  """Return the (K + 1,) row borders, halfway between ranks on a logarithmic axis."""
  if len(ranks) == 1:
    return ranks[0] * np.array([0.8, 1.25])
  inner = np.sqrt(ranks[1:] * ranks[:-1])
  return np.array([ranks[0] ** 2 / inner[0], *inner, ranks[-1] ** 2 / inner[-1]])


def _add_contours(
  panel: Any, boundaries: Sequence[int], ranks: np.ndarray, rise: np.ndarray, norm: Any
) -> None:
  """Add contours at powers of ten, and at three times these if there are few."""
  if min(rise.shape) < 2:
    return
  # A contour at either end of the scale would have nothing on one side.
  low, high = norm.vmin * (1 + ROUNDING), norm.vmax * (1 - ROUNDING)
  decades = 10.0 ** np.arange(np.floor(np.log10(norm.vmin)), np.ceil(np.log10(norm.vmax)) + 1)
  levels = decades[(decades > low) & (decades < high)]
  if len(levels) < 3:
    levels = np.sort(np.concatenate([decades, 3 * decades]))
    levels = levels[(levels > low) & (levels < high)]
  t = (np.array(boundaries[1:]) + np.array(boundaries[:-1])) / 2
  # Contours interpolate linearly, which suits the logarithms better than the rises.
  heights = np.log10(np.where(rise >= norm.vmin, rise, np.nan))
  style = dict(colors="white", linestyles="solid", linewidths=1.2)
  lines = panel.contour(t, ranks, np.ma.masked_invalid(heights), levels=np.log10(levels), **style)
  lines.set_path_effects(_outline(2.2, "black"))
  for text in panel.clabel(lines, fmt=lambda level: f"{10**level:g}"):
    box = dict(facecolor="white", edgecolor="none", alpha=0.8, pad=0.8)
    text.set(color="black", bbox=box, path_effects=[])


def _outline(width: float, color: str) -> list[Any]:
  """Return path effects that outline a line, so that it is visible on any background."""
  from matplotlib import patheffects

  return [patheffects.Stroke(linewidth=width, foreground=color), patheffects.Normal()]


@plot_style.styled()
def losses(
  boundaries: Sequence[int], by_name: Mapping[str, Sequence[float | None]], title: str
) -> Any:
  """Draw the held-out loss of each timestep group, a line per label; None marks a missing loss."""
  found = {name: np.array(loss, np.float64) for name, loss in by_name.items()}
  found = {name: loss for name, loss in found.items() if np.isfinite(loss).any()}
  if not found:
    return None
  title = f"Held-out loss by timestep group: {title}"
  figure, ((panel,),) = plot_style.panels(1, 1, 7.6, 4.0, title)
  for i, (name, loss) in enumerate(found.items()):
    style = plot_style.line_of(i) | {"label": name, "linewidth": 1.8}
    panel.stairs(loss, boundaries, baseline=None, **style)
  panel.set(xlabel=plot_style.T_LABEL, ylabel=plot_style.LOSS_LABEL, yscale="log")
  plot_style.plain_ticks(panel)
  plot_style.add_grid(panel)
  if len(found) > 1:
    figure.legend(loc="outside lower center", ncols=3)
  return figure


@plot_style.styled()
def loss_curves(curves: Mapping[str, Any], title: str) -> Any:
  """Draw the held-out losses of averaged weights against the step, by timestep group.

  `curves` has "steps", "groups" of (first, last) timesteps, and in "ema" the "loss" of each step
  and its "groups".
  """
  steps, ema = curves["steps"], curves["ema"]
  figure, ((panel,),) = plot_style.panels(1, 1, 7.2, 4.4, f"Held-out loss by step: {title}")
  by_group = np.array(ema["groups"], np.float64)  # None becomes NaN
  for i, (first, last) in enumerate(curves["groups"]):
    label, line = f"t {first} to {last}", plot_style.line_of(i)
    panel.plot(steps, by_group[:, i], label=label, marker=".", **line)
  panel.plot(steps, ema["loss"], label="all", color="black", marker=".", linewidth=2.5)
  panel.set(xlabel="step", ylabel=plot_style.LOSS_LABEL, yscale="log")
  figure.legend(loc="outside right upper")
  return figure


@plot_style.styled()
def rank_curves(curves: Mapping[str, Any], title: str) -> Any:
  """Draw entropy ranks by timestep group, and overlaps of gradients, against the step.

  `curves` are those of `over_steps.rank_curves`; columns are kinds of layers.
  """
  rows = [name for name in ("weights", "gradients", "overlap") if name in curves]
  kinds, steps = list(curves[rows[0]]), curves["steps"]
  text, size = f"Ranks by step: {title}", (len(rows), len(kinds))
  figure, axes = plot_style.panels(*size, 2.9, 2.5, text, sharex=True, sharey="row")
  for name, row in zip(rows, axes, strict=True):
    for kind, panel in zip(kinds, row, strict=True):
      found = curves[name][kind]
      is_overlap = name == "overlap"
      lines = _overlap_lines(found) if is_overlap else _rank_lines(found, curves["groups"])
      for values, style in lines:
        panel.plot(steps, np.array(values, np.float64), marker=".", **style)  # None becomes NaN
      plot_style.add_grid(panel)
    ranks = f"{name}\nentropy rank / min(D_in, D_out)"
    row[0].set_ylabel("cos² between gradients" if name == "overlap" else ranks)
    row[-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
  for kind, column in zip(kinds, axes.T, strict=True):
    column[0].set_title(plot_style.KIND_TITLES[kind])
    column[-1].set_xlabel("step")
    column[-1].xaxis.get_major_locator().set_params(integer=True)
  return figure


def _rank_lines(
  found: Mapping[str, Any], groups: Sequence[Sequence[int]]
) -> list[tuple[Sequence[float | None], dict[str, Any]]]:
  """Return the values and the style of each timestep group's line."""
  by_group = zip(*found["entropy_rank"], strict=True)
  return [
    (values, {"label": f"t {first} to {last}", **plot_style.line_of(i)})
    for i, (values, (first, last)) in enumerate(zip(by_group, groups, strict=True))
  ]


def _overlap_lines(
  found: Mapping[str, Any],
) -> list[tuple[Sequence[float | None], dict[str, Any]]]:
  """Return the values and the style of each side's lines, within and between groups."""
  return [
    (table[which], {"label": f"{side}, {which} groups", "color": color, "linestyle": line})
    for color, (side, table) in zip(plot_style.COLORS, found.items(), strict=False)
    for which, line in (("within", "--"), ("between", "-"))
  ]
