"""The look that the plots of the analysis and of the report share."""

from typing import Any

# The colours of Okabe and Ito, which suit every kind of colour vision, without black and yellow.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
LINE_STYLES = ("-", "--", "-.", ":")
FONT_SIZE = 9.5
T_LABEL = "timestep t  (0: clean image)"
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


def add_grid(axes: Any) -> None:
  """Draw faint grid lines that show on a light and on a dark page."""
  axes.grid(color="#808080", alpha=0.25, linewidth=0.6)


def plain_ticks(axes: Any) -> None:
  """Label a logarithmic y axis with numbers such as 0.5, several of them within a decade."""
  from matplotlib import ticker

  low, high = axes.get_ylim()
  within = high < 10 * low
  axes.yaxis.set_major_locator(
    ticker.MaxNLocator(6) if within else ticker.LogLocator(subs=(1.0, 2.0, 5.0))
  )
  axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
  axes.yaxis.set_minor_formatter(ticker.NullFormatter())
  if within:
    axes.yaxis.set_minor_locator(ticker.NullLocator())
