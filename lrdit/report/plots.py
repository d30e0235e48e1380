"""Plots of a report as SVG that can stand in a page: text, ids of their own, no links.

Everything drawn in ink takes the colour of the page's text, so it is legible on
a dark page too; an arm keeps its colour and line style in every plot.
"""

import io
import re
from collections.abc import Callable, Sequence
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

INK = "#010203"  # stands for the page's colour of text
WIDTH, HEIGHT = 4.3, 3.1  # inches: about a phone's width, so text keeps its size there
FEW_POINTS = 30  # a curve of fewer shows each, as one alone makes no line
MAX_POINTS = 600  # of a curve; longer ones are averaged over equal runs of points


def colour_of(arm: int) -> str:
  """The colour of the arm of this number, as in CSS."""
  return COLOURS[arm % len(COLOURS)]


def _style_of(arm: int) -> dict[str, Any]:
  return {"color": colour_of(arm), "linestyle": LINE_STYLES[arm % len(LINE_STYLES)]}


def _settings() -> dict[str, Any]:
  ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
  grounds = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
  svg = {"svg.fonttype": "none", "svg.hashsalt": "lrdit"}
  return SETTINGS | svg | dict.fromkeys(ink, INK) | dict.fromkeys(grounds, "none")


def _embeddable(svg: str, name: str) -> str:
  """An SVG file as part of a page: its ids begin with `name`, no header, no metadata."""
  svg = svg[svg.index("<svg") :].strip()
  svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
  svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
  svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
  return svg.replace(INK, "currentColor")


def draw(name: str, paint: Callable[[Any], bool], **axes_settings: Any) -> str | None:
  """One plot as an <svg> element.

  Args:
    name: begins every id, so that several plots can share a page.
    paint: draws on matplotlib's axes; returns whether there was anything.
    **axes_settings: labels and scales, as `Axes.set` takes them.

  Returns:
    the same text for the same plot; None if nothing was drawn.
  """
  import matplotlib  # slow, and of use here alone
  from matplotlib.backends.backend_svg import FigureCanvasSVG
  from matplotlib.figure import Figure

  with matplotlib.rc_context(_settings()):
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    if not paint(axes):
      return None
    axes.set(**axes_settings)
    if axes.get_yscale() == "log":
      plain_ticks(axes)
    add_grid(axes)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
      figure.legend(handles, labels, loc="outside upper left", ncols=2, handlelength=2.4)
    file = io.StringIO()
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
  return _embeddable(file.getvalue(), name)


def rank_over_t(arms: Sequence[dict[str, Any]], layer: str) -> str | None:
  """Active rank of one layer at each timestep; of a dense layer, the most it can have."""

  def paint(axes: Any) -> bool:
    ranks = [arm["model"]["rank"]["active_rank"] if arm["model"] else {} for arm in arms]
    drawn = [number for number, of_arm in enumerate(ranks) if layer in of_arm]
    for number in drawn:
      _steps(axes, number, arms[number], ranks[number][layer])
    return bool(drawn)

  return draw("rank", paint, xlabel=T_LABEL, ylabel="active rank r(t)", ylim=(0, None))


def ratio_over_t(arms: Sequence[dict[str, Any]]) -> str | None:
  """Active parameters of the factorised layers over those of dense kernels, over t."""

  def paint(axes: Any) -> bool:
    drawn = [(i, arm) for i, arm in enumerate(arms) if arm["model"]]
    for number, arm in drawn:
      _steps(axes, number, arm, arm["model"]["rank"]["ratio"])
    return bool(drawn)

  return draw("ratio", paint, xlabel=T_LABEL, ylabel="active / dense parameters", ylim=(0, None))


def _steps(axes: Any, number: int, arm: dict[str, Any], by_bucket: Sequence[float]) -> None:
  """A quantity that each rank bucket has, over t."""
  rank = arm["model"]["rank"]
  edges = [start for start, _ in rank["segments"]] + [rank["num_train_timesteps"]]
  values = [by_bucket[bucket] for _, bucket in rank["segments"]]
  axes.stairs(values, edges, baseline=None, label=arm["name"], linewidth=1.8, **_style_of(number))


def loss_over_t(arms: Sequence[dict[str, Any]], kind: str) -> str | None:
  """Loss of each group of timesteps; bars are a standard deviation over the runs.

  Args:
    arms: with "loss_by_timestep".
    kind: "held_out" or "training".
  """

  def paint(axes: Any) -> bool:
    drawn = [(i, arm) for i, arm in enumerate(arms) if arm["loss_by_timestep"][kind]]
    for place, (number, arm) in enumerate(drawn):
      _loss_groups(axes, number, arm, arm["loss_by_timestep"][kind], (place + 1) / (len(drawn) + 1))
    return bool(drawn)

  return draw(f"loss-{kind}", paint, xlabel=T_LABEL, ylabel="mean loss (per value)", yscale="log")


def _loss_groups(
  axes: Any, number: int, arm: dict[str, Any], groups: Sequence[dict[str, Any]], place: float
) -> None:
  """Steps over t, with bars at a place in [0, 1] of each step, so that arms' bars stand apart."""
  style = _style_of(number)
  for i, group in enumerate(groups):
    span = [group["t_first"], group["t_last"] + 1]
    label = arm["name"] if i == 0 else None
    axes.plot(span, [group["mean"]] * 2, label=label, solid_capstyle="butt", **style)
    if group["std"] is not None:
      at = span[0] + place * (span[1] - span[0])
      axes.errorbar(at, group["mean"], group["std"], color=style["color"], capsize=2, linewidth=1.2)


def training_curves(arms: Sequence[dict[str, Any]], curve: str) -> str | None:
  """A loss over the steps, a line for each run.

  Args:
    arms: with "runs", each with "curves".
    curve: "train/loss" or "eval/loss".
  """

  def paint(axes: Any) -> bool:
    drawn = False
    for number, arm in enumerate(arms):
      for run in arm["runs"]:
        steps, losses = run["curves"][curve]
        if any(loss is not None for loss in losses):
          label = None if arm["name"] in axes.get_legend_handles_labels()[1] else arm["name"]
          points = shorten(steps, losses)
          few = np.isfinite(points[1]).sum() < FEW_POINTS
          style = _style_of(number) | {"marker": "o" if few else None, "markersize": 3}
          axes.plot(*points, label=label, alpha=0.8, linewidth=1.2, **style)
          drawn = True
    return drawn

  name = curve.replace("/", "-")
  return draw(name, paint, xlabel="training step", ylabel="mean loss (per value)", yscale="log")


def shorten(
  steps: Sequence[float], losses: Sequence[float | None]
) -> tuple[np.ndarray, np.ndarray]:
  """At most `MAX_POINTS` points, means of as many neighbours each; gaps stay gaps."""
  width = -(-len(steps) // MAX_POINTS)
  x, y = np.asarray(steps, np.float64), np.asarray(losses, np.float64)  # None becomes NaN
  starts = np.arange(0, len(x), width)
  lengths = np.diff([*starts, len(x)])
  return np.add.reduceat(x, starts) / lengths, np.add.reduceat(y, starts) / lengths
