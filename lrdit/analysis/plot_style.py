"""The style and the output of plots, shared by the analysis and the report."""

import contextlib
import io
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lrdit.analysis.spectra import ENERGIES, MEASURES
from lrdit.runtime.store import atomic_path

# The palette of Okabe and Ito for every kind of color vision, without black and yellow.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
LINE_STYLES = ("-", "--", "-.", ":")
DOTS_PER_INCH = 150
FONT_SIZE = 9.5
LOSS_LABEL = "mean loss (per value)"
T_LABEL = "timestep t  (0: clean image)"
KIND_TITLES = {"attention": "attention", "mlp": "MLP", "adaln": "adaLN", "other": "other layers"}
_TITLES = ("stable rank", "entropy rank", *(f"{100 * e:.0f} % energy rank" for e in ENERGIES))
MEASURE_TITLES = dict(zip(MEASURES, _TITLES, strict=True))
SETTINGS = {  # for matplotlib.rc_context
  "font.family": "sans-serif",
  "font.size": FONT_SIZE,
  "axes.titlesize": FONT_SIZE + 0.5,
  "figure.titlesize": FONT_SIZE + 2,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "lines.linewidth": 1.5,
  "legend.frameon": False,
  "legend.fontsize": FONT_SIZE - 0.5,
}


@contextlib.contextmanager
def styled(settings: Mapping[str, Any] | None = None) -> Iterator[None]:
  """Apply the shared style, and further matplotlib settings, to a block or a function."""
  import matplotlib  # slow, and needed only for plots

  with matplotlib.rc_context(SETTINGS | dict(settings or {})):
    yield


def color_of(i: int) -> str:
  """Return the i-th color as a hex code; the colors repeat."""
  return COLORS[i % len(COLORS)]


def line_of(i: int) -> dict[str, Any]:
  """Return the color and the dashes of the i-th line."""
  return {"color": color_of(i), "linestyle": LINE_STYLES[i % len(LINE_STYLES)]}


def panels(
  rows: int, columns: int, width: float, height: float, title: str = "", **settings: Any
) -> tuple[Any, np.ndarray]:
  """Return a figure and its (rows, columns) axes, each of `width` x `height` inches."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
  if title:
    figure.suptitle(title)
  return figure, figure.subplots(rows, columns, squeeze=False, **settings)


def add_grid(axes: Any) -> None:
  """Draw faint grid lines that are visible on light and dark pages."""
  axes.grid(color="#808080", alpha=0.25, linewidth=0.6)


def plain_ticks(axes: Any) -> None:
  """Label a logarithmic y axis with plain numbers, several of them within a decade."""
  from matplotlib import ticker

  low, high = axes.get_ylim()
  within = high < 10 * low
  locator = ticker.MaxNLocator(6) if within else ticker.LogLocator(subs=(1.0, 2.0, 5.0))
  axes.yaxis.set_major_locator(locator)
  axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
  axes.yaxis.set_minor_formatter(ticker.NullFormatter())
  if within:
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def legend_below(figure: Any, handles: Sequence[Any], columns: int | None = None) -> None:
  """Draw a figure's legend below its panels, in one row unless `columns` is given."""
  columns = columns or len(handles)
  figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=3)


def label_row(row: Sequence[Any], measure: str) -> None:
  """Label a row of finished panels, add grids, and start the y axes at 0."""
  row[0].set_ylim(0, 1.06 * row[0].get_ylim()[1])  # values far above 0 leave a small margin
  if not row[0].get_shared_y_axes().joined(row[0], row[-1]):
    row[-1].set_ylim(0, 1.06 * row[-1].get_ylim()[1])
  row[0].set_ylabel(f"{MEASURE_TITLES[measure]}\n/ min(D_in, D_out)")
  for panel in row:
    add_grid(panel)


def group_edges(groups: Sequence[Mapping[str, int]]) -> list[int]:
  """Return the (G + 1,) timesteps at which groups begin and end."""
  return [group["t_first"] for group in groups] + [groups[-1]["t_last"] + 1]


def png(figure: Any) -> bytes:
  """Return a figure as PNG bytes, which depend on the figure alone."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg

  file = io.BytesIO()
  FigureCanvasAgg(figure)
  figure.savefig(file, format="png", dpi=DOTS_PER_INCH, facecolor="white")
  return file.getvalue()


def write_png(path: pathlib.Path, figure: Any) -> None:
  """Write a figure atomically, or nothing if it is None."""
  if figure is not None:
    with atomic_path(path) as temporary:
      temporary.write_bytes(png(figure))
