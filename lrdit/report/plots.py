"""Plots of a report as inline SVG.

Text stays text and takes the page's color, so it is visible on dark pages too. An arm keeps its
color and line style in every plot.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lrdit.analysis import plot_style
from lrdit.analysis.plot_style import LOSS_LABEL, T_LABEL, color_of, line_of
from lrdit.report.arms import Arm, Model, TimestepLoss
from lrdit.report.compare import Cell, Row
from lrdit.report.fields import differing_fields

INK = "#010203"  # placeholder for the page's text color
WIDTH, HEIGHT = 4.3, 3.1  # inches, about a phone's width, where text keeps its size
MAX_IN_COLUMN = 18  # characters of an arm's name in one of two columns of a legend
MARKERS = "osD^vP"
FEW_POINTS = 30  # a curve with fewer points marks each one
MAX_POINTS = 600  # a longer curve shows means of neighbors
SVG_SETTINGS = (
  {"svg.fonttype": "none", "svg.hashsalt": "lrdit"}
  | dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none")
  | dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK)
  | dict.fromkeys(("xtick.color", "ytick.color"), INK)
)


@plot_style.styled(SVG_SETTINGS)
def draw(name: str, paint: Callable[[Any], bool], **axes_settings: Any) -> str | None:
  """Return one plot as an <svg> element, or None if there is nothing to draw.

  Args:
    name: prefix of every id, so that several plots can share a page.
    paint: draws on matplotlib's axes and returns whether there was anything to draw.
    **axes_settings: labels and scales for `Axes.set`.
  """
  from matplotlib.backends.backend_svg import FigureCanvasSVG

  figure, ((axes,),) = plot_style.panels(1, 1, WIDTH, HEIGHT)
  if not paint(axes):
    return None
  axes.set(**axes_settings)
  if axes.get_yscale() == "log":
    plot_style.plain_ticks(axes)
  plot_style.add_grid(axes)
  handles, labels = axes.get_legend_handles_labels()
  if handles:
    columns = 2 if max(map(len, labels)) <= MAX_IN_COLUMN else 1
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=2.4)
  file = io.StringIO()
  FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
  svg = file.getvalue()
  svg = svg[svg.index("<svg") :].strip()
  svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
  svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
  svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
  return svg.replace(INK, "currentColor")


def quality_over(arms: Sequence[Arm], cost: Row, quality: Row) -> str | None:
  """Plot a point and one standard deviation for each arm, except incomparable values.

  A line joins the arms of a method that differ only in their ratio.
  """

  def paint(axes: Any) -> bool:
    from matplotlib.ticker import EngFormatter

    shown = False
    for place, (name, numbers) in enumerate(_lines_of_arms(arms)):
      points = [(_point(cost.cells[i]), _point(quality.cells[i])) for i in numbers]
      points = sorted(
        (x, y, x_std or 0, y_std or 0) for (x, x_std), (y, y_std) in points if None not in (x, y)
      )
      if points:
        x, y, x_std, y_std = zip(*points, strict=True)
        style = {"marker": MARKERS[place % len(MARKERS)], "color": color_of(numbers[0])}
        axes.errorbar(x, y, y_std, x_std, label=name, capsize=3, markersize=6, linewidth=1, **style)
        shown = True
    axes.margins(0.1, 0.15)
    axes.xaxis.set_major_formatter(EngFormatter())
    return shown

  unit = ", s" if cost.format == "seconds" else ""
  labels = {"xlabel": cost.label + unit, "ylabel": quality.label}
  return draw(f"{quality.key}-over-{cost.key}", paint, xlim=(0, None), **labels)


def _lines_of_arms(arms: Sequence[Arm]) -> list[tuple[str, list[int]]]:
  """Return the (name, numbers of the arms) of each method that differs only in its ratio."""
  lines = []
  for method in dict.fromkeys(arm.method for arm in arms):
    own = [number for number, arm in enumerate(arms) if arm.method == method]
    if differing_fields(*(arms[number].key for number in own)) == ["rank.ratio"]:
      lines.append((method, own))
    else:
      lines += [(arms[number].name, [number]) for number in own]
  return lines


def _point(cell: Cell) -> tuple[float | None, float | None]:
  """Return the mean and standard deviation of the values comparable with the row's first."""
  alike = [summary for summary in cell.summaries if not summary.differs]
  return (alike[0].mean, alike[0].std) if alike else (cell.exact, None)


def over_t(
  name: str, arms: Sequence[Arm], values_of: Callable[[Model], Sequence[float] | None], label: str
) -> str | None:
  """Plot a quantity of each arm's model, which `values_of` returns by rank bucket, over t."""

  def paint(axes: Any) -> bool:
    for number, arm in enumerate(arms):
      if arm.model and (by_bucket := values_of(arm.model)):
        edges = [start for start, _ in arm.model.segments] + [arm.model.num_train_timesteps]
        values = [by_bucket[bucket] for _, bucket in arm.model.segments]
        style = line_of(number) | {"linewidth": 1.8}
        axes.stairs(values, edges, baseline=None, label=arm.name, **style)
    return bool(axes.patches)

  return draw(name, paint, xlabel=T_LABEL, ylabel=label, ylim=(0, None))


def loss_over_t(arms: Sequence[Arm], kind: str) -> str | None:
  """Plot the "held_out" or "training" loss of timestep groups, with one standard deviation."""

  def paint(axes: Any) -> bool:
    shown = [(i, arm) for i, arm in enumerate(arms) if getattr(arm, kind)]
    for place, (number, arm) in enumerate(shown):
      # Error bars of different arms stand side by side within a group.
      _loss_groups(axes, number, arm.name, getattr(arm, kind), (place + 1) / (len(shown) + 1))
    return bool(shown)

  return draw(f"loss-{kind}", paint, xlabel=T_LABEL, ylabel=LOSS_LABEL, yscale="log")


def _loss_groups(
  axes: Any, number: int, name: str, groups: Sequence[TimestepLoss], place: float
) -> None:
  style = line_of(number)
  for i, group in enumerate(groups):
    span = [group.t_first, group.t_last + 1]
    label = None if i else name
    axes.plot(span, [group.mean] * 2, label=label, solid_capstyle="butt", **style)
    if group.std is not None:
      at = span[0] + place * (span[1] - span[0])
      axes.errorbar(at, group.mean, group.std, color=style["color"], capsize=2, linewidth=1.2)


def training_curves(arms: Sequence[Arm], curve: str) -> str | None:
  """Plot a loss, "train/loss" or "eval/loss", over the steps, with a line for each run."""

  def paint(axes: Any) -> bool:
    for number, run, name in ((i, run, arm.name) for i, arm in enumerate(arms) for run in arm.runs):
      steps, losses = run.curves[curve]
      if any(loss is not None for loss in losses):
        label = None if name in axes.get_legend_handles_labels()[1] else name
        points = shorten(steps, losses)
        marker = "o" if np.isfinite(points[1]).sum() < FEW_POINTS else None
        style = line_of(number) | {"marker": marker, "markersize": 3, "linewidth": 1.2}
        axes.plot(*points, label=label, alpha=0.8, **style)
    return axes.has_data()

  name = curve.replace("/", "-")
  return draw(name, paint, xlabel="training step", ylabel=LOSS_LABEL, yscale="log")


def shorten(
  steps: Sequence[float], losses: Sequence[float | None]
) -> tuple[np.ndarray, np.ndarray]:
  """Average neighbors into at most `MAX_POINTS` points; gaps (None) become NaN."""
  width = -(-len(steps) // MAX_POINTS)
  x, y = np.asarray(steps, np.float64), np.asarray(losses, np.float64)  # None becomes NaN
  starts = np.arange(0, len(x), width)
  lengths = np.diff([*starts, len(x)])
  return np.add.reduceat(x, starts) / lengths, np.add.reduceat(y, starts) / lengths
