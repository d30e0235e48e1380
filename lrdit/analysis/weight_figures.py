"""Figures of the weights' spectra and ranks, by depth, rank bucket and timestep group.

`weights` come from `weight_spectra.analyze_weights`; titles name the model and its step.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lrdit.analysis import plot_style
from lrdit.analysis.plot_style import COLORS, KIND_TITLES, MEASURE_TITLES

FEW_BLOCKS = 6  # a legend names each block of up to this many
FLOOR = 1e-6  # smallest singular value on the axis, as a share of the largest
GREY = "#808080"
ROLES = {  # color, line style and marker of a block's layers, by kind
  "attention": {"attn/qkv": (COLORS[0], "-", "o"), "attn/proj": (COLORS[1], "--", "s")},
  "mlp": {"mlp/fc1": (COLORS[0], "-", "^"), "mlp/fc2": (COLORS[1], "--", "v")},
  "adaln": {"adaln": (COLORS[2], "-.", "D")},
}


def _block_of(name: str) -> int:
  """Return the index of a layer's block, or -1 outside the blocks."""
  match = re.match(r"blocks_(\d+)/", name)
  return int(match[1]) if match else -1


def _has_buckets(weights: Mapping[str, Any]) -> bool:
  return len(next(iter(weights["kinds"].values()))["buckets"]) > 1


@plot_style.styled()
def spectra(weights: Mapping[str, Any], title: str) -> Any:
  """Draw every layer's singular values by kind, colored by rank bucket or, if dense, depth."""
  kinds, text = list(weights["kinds"]), f"Singular spectra of the weights: {title}"
  figure, axes = plot_style.panels(1, len(kinds), 3.1, 3.6, text, sharex=True, sharey=True)
  colors_of, handles = (_bucket_colors if _has_buckets(weights) else _depth_colors)(weights)
  for kind, panel in zip(kinds, axes[0], strict=True):
    for name, layer in weights["layers"].items():
      if layer["kind"] == kind:
        _add_spectra(panel, layer, colors_of(name))
    panel.set(title=KIND_TITLES[kind], xlabel="index / min(D_in, D_out)", yscale="log")
    plot_style.add_grid(panel)
  # The smallest values of a square layer would take many decades.
  values = [line.get_ydata() for panel in axes[0] for line in panel.lines]
  least = max(FLOOR, 0.5 * float(np.percentile(np.concatenate(values), 1))) if values else FLOOR
  axes[0, 0].set(ylabel="singular value / largest", xlim=(0, 1), ylim=(least, 1.3))
  if least > 0.01:
    plot_style.plain_ticks(axes[0, 0])
  plot_style.legend_below(figure, handles, columns=4)
  return figure


def _add_spectra(panel: Any, layer: Mapping[str, Any], colors: Sequence[Any]) -> None:
  """Add a layer's spectra, larger buckets first, so that the ends of smaller ones stay visible."""
  smallest_dim = min(layer["dim_in"], layer["dim_out"])
  for entry, color in reversed(list(zip(layer["buckets"], colors, strict=False))):
    sigma = np.array(entry["singular_values"])
    if len(sigma) and sigma[0] > 0:
      index = np.arange(1, len(sigma) + 1) / smallest_dim
      panel.plot(index, sigma / sigma[0], color=color, alpha=0.6, linewidth=0.9)
      if entry["active_rank"] is not None:
        panel.plot(index[-1], sigma[-1] / sigma[0], "o", color=color, alpha=0.8, markersize=2.2)


def _sequential(count: int) -> np.ndarray:
  """Return (count, 4) RGBA colors whose order survives in grayscale."""
  import matplotlib

  return matplotlib.colormaps["viridis"](np.linspace(0.0, 0.88, count))


def _bucket_colors(weights: Mapping[str, Any]) -> tuple[Callable[[str], Any], list[Any]]:
  """Return a function from a layer's name to its buckets' colors, and legend handles."""
  from matplotlib.lines import Line2D

  spans: dict[int, list[str]] = {}
  for segment in weights["segments"]:
    spans.setdefault(segment["bucket"], []).append(f"{segment['t_first']}-{segment['t_last']}")
  colors = _sequential(max(spans) + 1)
  handles = [
    Line2D([], [], color=colors[b], label=f"bucket {b}: t {', '.join(spans[b])}")
    for b in sorted(spans)
  ]
  dense = [name for name, layer in weights["layers"].items() if len(layer["buckets"]) == 1]
  if dense:
    handles.append(Line2D([], [], color=GREY, label="dense layers"))
  return lambda name: [GREY] if name in dense else colors, handles


def _depth_colors(weights: Mapping[str, Any]) -> tuple[Callable[[str], Any], list[Any]]:
  """Return a function from a layer's name to its depth's color, and legend handles."""
  from matplotlib.lines import Line2D

  depth = 1 + max(_block_of(name) for name in weights["layers"])
  colors = [*_sequential(depth), GREY]  # block -1 is the last
  shown = range(depth) if depth <= FEW_BLOCKS else sorted({0, depth // 2, depth - 1})
  handles = [Line2D([], [], color=colors[i], label=f"block {i}") for i in shown]
  handles.append(Line2D([], [], color=GREY, label="outside the blocks"))
  return lambda name: [colors[_block_of(name)]], handles


@plot_style.styled()
def ranks(weights: Mapping[str, Any], title: str) -> Any:
  """Draw every layer's normalised ranks by depth: means over timesteps, bands over rank buckets."""
  text = f"Ranks of the weights by depth: {title}"
  if _has_buckets(weights):
    text += "\n(mean over timesteps; bands and bars: least to largest rank bucket)"
  rows, columns = len(MEASURE_TITLES), len(ROLES) + 1
  figure, axes = plot_style.panels(rows, columns, 2.9, 1.9, text, sharex="col", sharey="row")
  outside = [name for name in weights["layers"] if _block_of(name) < 0]
  for measure, row in zip(MEASURE_TITLES, axes, strict=True):
    for roles, panel in zip(ROLES.values(), row[:-1], strict=True):
      for role, style in roles.items():
        _add_role(panel, weights, role, measure, style)
    mean, low, high = np.array([_mean_and_range(weights, name, measure) for name in outside]).T
    errors, style = [mean - low, high - mean], dict(fmt="o", color="#404040", markersize=4)
    row[-1].errorbar(np.arange(len(mean)), mean, errors, **style)
    row[-1].set_xlim(-0.6, len(mean) - 0.4)
    plot_style.label_row(row, measure)
  for kind, column in zip(ROLES, axes.T, strict=False):
    column[0].set_title(KIND_TITLES[kind])
    column[-1].set_xlabel("block")
    column[-1].xaxis.get_major_locator().set_params(integer=True)
  axes[0, -1].set_title("outside the blocks")
  axes[-1, -1].set_xticks(range(len(outside)), outside, rotation=40, ha="right")
  lines = [line for panel in axes[0, :-1] for line in panel.get_legend_handles_labels()[0]]
  plot_style.legend_below(figure, lines)
  return figure


def _mean_and_range(
  weights: Mapping[str, Any], name: str, measure: str
) -> tuple[float, float, float]:
  """Return a normalised measure's mean over timesteps, and its minimum and maximum over buckets."""
  layer = weights["layers"][name]
  lengths = np.diff(plot_style.group_edges(weights["groups"]))
  mean = float(np.average([group[measure] for group in layer["groups"]], weights=lengths))
  values = [entry["normalised"][measure] for entry in layer["buckets"]]
  low, high = min(values), max(values)
  return min(max(mean, low), high), low, high  # rounding can move a mean of equal numbers


def _add_role(
  panel: Any, weights: Mapping[str, Any], role: str, measure: str, style: tuple[str, str, str]
) -> None:
  names = {_block_of(n): n for n in weights["layers"] if re.fullmatch(rf"blocks_\d+/{role}", n)}
  blocks = sorted(names)
  mean, low, high = np.array([_mean_and_range(weights, names[i], measure) for i in blocks]).T
  color, line, marker = style
  common = dict(marker=marker, markersize=3.5, label=role)
  panel.plot(blocks, mean, color=color, linestyle=line, **common)
  if any(len(weights["layers"][name]["buckets"]) > 1 for name in names.values()):
    panel.fill_between(blocks, low, high, color=color, alpha=0.13, linewidth=0)


@plot_style.styled()
def groups(weights: Mapping[str, Any], title: str) -> Any:
  """Draw normalised ranks of the active weights over timestep groups, a line for each kind.

  Return None for a model whose rank is the same at every timestep.
  """
  if not _has_buckets(weights):
    return None
  text = f"Ranks of the active weights by timestep group: {title}"
  figure, axes = plot_style.panels(1, len(MEASURE_TITLES), 2.9, 3.0, text, sharex=True)
  edges = plot_style.group_edges(weights["groups"])
  for (measure, measure_title), panel in zip(MEASURE_TITLES.items(), axes[0], strict=True):
    for i, (kind, found) in enumerate(weights["kinds"].items()):
      style = plot_style.line_of(i) | {"label": KIND_TITLES[kind], "linewidth": 1.6}
      panel.stairs([group[measure] for group in found["groups"]], edges, baseline=None, **style)
    panel.set(title=measure_title, xlabel="timestep t", ylim=(0, None))
    plot_style.add_grid(panel)
  axes[0, 0].set_ylabel("rank / min(D_in, D_out)")
  plot_style.legend_below(figure, axes[0, 0].get_legend_handles_labels()[0])
  return figure
