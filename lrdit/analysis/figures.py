"""Plots of an analysis as PNG files: spectra, ranks by depth and timestep, the causal test, losses.

Each function makes a figure from a section's JSON, or None where it holds nothing to draw;
`write_png` writes it, and `png` gives its bytes to a page.

Axes: G timestep groups, K ranks of the causal test, m of a layer's D_in or D_out.
"""

import functools
import io
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lrdit.analysis.plot_style import COLOURS, FONT_SIZE, LINE_STYLES, plain_ticks
from lrdit.analysis.spectra import ENERGIES, MEASURES
from lrdit.analysis.weight_spectra import KINDS
from lrdit.runtime.store import atomic_path

DOTS_PER_INCH = 150
FEW_BLOCKS = 6  # that a legend names one by one
LAYER_INCHES = 0.14  # of a layer's row in a heat map
KIND_TITLES = {"attention": "attention", "mlp": "MLP", "adaln": "adaLN", "other": "other layers"}
MEASURE_TITLES = dict(
  zip(
    MEASURES,
    ["stable rank", "entropy rank", *(f"{100 * e:.0f} % energy rank" for e in ENERGIES)],
    strict=True,
  )
)
CONDITIONS = {  # of gradients: title, line style
  "data": ("data", "-"),
  "shuffled": ("null: timesteps shuffled", (0, (4, 1.5))),
  "noise": ("null: noise-only targets", (0, (1, 1.2))),
  "residual": ("null: noise for residuals", (0, (4, 1.2, 1, 1.2))),
}
T_LABEL = "timestep t  (0: clean image)"
NO_RISE = "#D9D9D9"
ROUNDING = 1e-6  # of a loss: less is the rounding of float32
LEAST_RISE = 1e-4  # of the largest one: what the colours still tell apart
FLOOR = 1e-6  # of the largest singular value: the least that is drawn
_SETTINGS = {
  "font.family": "sans-serif",
  "font.size": FONT_SIZE,
  "axes.titlesize": FONT_SIZE + 0.5,
  "figure.titlesize": FONT_SIZE + 2,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "lines.linewidth": 1.4,
  "legend.frameon": False,
  "legend.fontsize": FONT_SIZE - 0.5,
}


def _styled(make: Callable[..., Any]) -> Callable[..., Any]:
  """`make` under the settings of all these plots."""

  @functools.wraps(make)
  def styled(*args: Any, **kwargs: Any) -> Any:
    import matplotlib  # slow, and of use here alone

    with matplotlib.rc_context(_SETTINGS):
      return make(*args, **kwargs)

  return styled


def _panels(
  rows: int, columns: int, width: float, height: float, title: str, **settings: Any
) -> tuple[Any, np.ndarray]:
  """A figure and its (rows, columns) axes; width and height in inches of one of them."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
  figure.suptitle(title)
  return figure, figure.subplots(rows, columns, squeeze=False, **settings)


def _grid(axes: Any) -> None:
  axes.grid(color="#808080", alpha=0.25, linewidth=0.6)


def png(figure: Any) -> bytes:
  """A figure as a PNG file, the same for the same figure."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg

  file = io.BytesIO()
  FigureCanvasAgg(figure)
  figure.savefig(file, format="png", dpi=DOTS_PER_INCH, facecolor="white")
  return file.getvalue()


def write_png(path: pathlib.Path, figure: Any) -> bool:
  """Writes a figure, whole or not at all; returns whether there was one to write."""
  if figure is not None:
    with atomic_path(path) as temporary:
      temporary.write_bytes(png(figure))
  return figure is not None


def _edges(groups: Sequence[Mapping[str, int]]) -> list[int]:
  """(G + 1,) timesteps."""
  return [group["t_first"] for group in groups] + [groups[-1]["t_last"] + 1]


def _values(entries: Sequence[Mapping[str, float] | None], measure: str) -> np.ndarray:
  """float64, NaN for what is missing."""
  return np.array([np.nan if e is None else e[measure] for e in entries], np.float64)


# Weights ------------------------------------------------------------------------------------------


@_styled
def weight_spectra(weights: Mapping[str, Any], title: str) -> Any:
  """Singular values of every layer by kind, a colour for each rank bucket or, if dense, depth.

  Args:
    weights: of `weight_spectra.analyse_weights`.
    title: names the model and its step.
  """
  kinds = [kind for kind in KINDS if kind in weights["kinds"]]
  figure, axes = _panels(
    1, len(kinds), 3.1, 3.6, f"Singular spectra of the weights: {title}", sharex=True, sharey=True
  )
  several = len(weights["kinds"][kinds[0]]["buckets"]) > 1
  colours = _bucket_colours(weights) if several else _depth_colours(weights)
  for kind, panel in zip(kinds, axes[0], strict=True):
    for name, layer in weights["layers"].items():
      if layer["kind"] == kind:
        _layer_spectrum(panel, layer, colours[0](name))
    panel.set(title=KIND_TITLES[kind], xlabel="index / min(D_in, D_out)", yscale="log")
    _grid(panel)
  least = _least(axes[0])
  axes[0, 0].set(ylabel="singular value / largest", xlim=(0, 1), ylim=(least, 1.3))
  if least > 0.01:
    plain_ticks(axes[0, 0])
  figure.legend(handles=colours[1], loc="outside lower center", ncols=4)
  return figure


def _least(panels: Sequence[Any]) -> float:
  """Where the lines' axis ends: the last few values of a square layer would need many decades."""
  drawn = [line.get_ydata() for panel in panels for line in panel.lines]
  return max(FLOOR, 0.5 * float(np.percentile(np.concatenate(drawn), 1))) if drawn else FLOOR


def _layer_spectrum(panel: Any, layer: Mapping[str, Any], colours: Sequence[Any]) -> None:
  """Larger buckets first, so that the ends of smaller ones are seen on them."""
  smallest_dim = min(layer["dim_in"], layer["dim_out"])
  for entry, colour in reversed(list(zip(layer["buckets"], colours, strict=False))):
    sigma = np.array(entry["singular_values"])
    if len(sigma) and sigma[0] > 0:
      index = np.arange(1, len(sigma) + 1) / smallest_dim
      panel.plot(index, sigma / sigma[0], color=colour, alpha=0.6, linewidth=0.9)
      if entry["active_rank"] is not None:
        panel.plot(index[-1], sigma[-1] / sigma[0], "o", color=colour, alpha=0.8, markersize=2.2)


def _sequential(count: int) -> np.ndarray:
  """(count, 4) colours in an order that greyscale keeps; none so light that print loses it."""
  import matplotlib

  return matplotlib.colormaps["viridis"](np.linspace(0.0, 0.88, count))


def _bucket_colours(weights: Mapping[str, Any]) -> tuple[Callable[[str], Any], list[Any]]:
  """(colours of a layer's buckets by its name, what the legend shows)."""
  from matplotlib.lines import Line2D

  spans: dict[int, list[str]] = {}
  for segment in weights["segments"]:
    spans.setdefault(segment["bucket"], []).append(f"{segment['t_first']}-{segment['t_last']}")
  colours = _sequential(max(spans) + 1)
  handles = [
    Line2D([], [], color=colours[b], label=f"bucket {b}: t {', '.join(spans[b])}")
    for b in sorted(spans)
  ]
  dense = [name for name, layer in weights["layers"].items() if len(layer["buckets"]) == 1]
  if dense:
    handles.append(Line2D([], [], color="#808080", label="dense layers"))
  return lambda name: ["#808080"] if name in dense else colours, handles


def _depth_colours(weights: Mapping[str, Any]) -> tuple[Callable[[str], Any], list[Any]]:
  from matplotlib.lines import Line2D

  depth = 1 + max(_block_of(name) for name in weights["layers"])
  colours = _sequential(depth)
  shown = range(depth) if depth <= FEW_BLOCKS else sorted({0, depth // 2, depth - 1})
  handles = [Line2D([], [], color=colours[i], label=f"block {i}") for i in shown]
  handles.append(Line2D([], [], color="#808080", label="outside the blocks"))

  def of_layer(name: str) -> Any:
    block = _block_of(name)
    return [colours[block] if block >= 0 else "#808080"]

  return of_layer, handles


def _block_of(name: str) -> int:
  """Number of a layer's block, -1 if it is in none."""
  match = re.match(r"blocks_(\d+)/", name)
  return int(match[1]) if match else -1


ROLES = {  # of a block's layers by kind: colour, line style and marker of each
  "attention": {"attn/qkv": (COLOURS[0], "-", "o"), "attn/proj": (COLOURS[1], "--", "s")},
  "mlp": {"mlp/fc1": (COLOURS[0], "-", "^"), "mlp/fc2": (COLOURS[1], "--", "v")},
  "adaln": {"adaln": (COLOURS[2], "-.", "D")},
}


@_styled
def weight_ranks(weights: Mapping[str, Any], title: str) -> Any:
  """Normalised ranks of every layer by depth: means over timesteps, bands over rank buckets.

  Args:
    weights: of `weight_spectra.analyse_weights`.
    title: names the model and its step.
  """
  text = f"Ranks of the weights by depth: {title}"
  if len(next(iter(weights["kinds"].values()))["buckets"]) > 1:
    text += "\n(mean over timesteps; bands and bars: least to largest rank bucket)"
  count = len(ROLES) + 1
  figure, axes = _panels(len(MEASURES), count, 2.9, 1.9, text, sharex="col", sharey="row")
  outside = [name for name in weights["layers"] if _block_of(name) < 0]
  for measure, row in zip(MEASURES, axes, strict=True):
    for roles, panel in zip(ROLES.values(), row[:-1], strict=True):
      for role, style in roles.items():
        _role_by_depth(panel, weights, role, measure, style)
    _points(row[-1], [_at_mean(weights, name, measure) for name in outside])
    _label_row(row, measure)
  for kind, column in zip(ROLES, axes.T, strict=False):
    column[0].set_title(KIND_TITLES[kind])
    column[-1].set_xlabel("block")
    column[-1].xaxis.get_major_locator().set_params(integer=True)
  axes[0, -1].set_title("outside the blocks")
  axes[-1, -1].set_xticks(range(len(outside)), outside, rotation=40, ha="right")
  handles = [line for panel in axes[0, :-1] for line in panel.get_legend_handles_labels()[0]]
  figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handlelength=3)
  return figure


def _label_row(row: Sequence[Any], measure: str) -> None:
  """After everything is drawn, as the row shares its limits."""
  row[0].set_ylim(0, 1.06 * row[0].get_ylim()[1])  # the margin of what lies far above 0 is small
  if not row[0].get_shared_y_axes().joined(row[0], row[-1]):
    row[-1].set_ylim(0, 1.06 * row[-1].get_ylim()[1])
  row[0].set_ylabel(f"{MEASURE_TITLES[measure]}\n/ min(D_in, D_out)")
  for panel in row:
    _grid(panel)


def _at_mean(weights: Mapping[str, Any], name: str, measure: str) -> tuple[float, float, float]:
  """(mean over all timesteps, least, greatest over the buckets) of a normalised measure."""
  layer = weights["layers"][name]
  lengths = np.diff(_edges(weights["groups"]))
  mean = float(np.average(_values(layer["groups"], measure), weights=lengths))
  values = [entry["normalised"][measure] for entry in layer["buckets"]]
  low, high = min(values), max(values)
  return min(max(mean, low), high), low, high  # the mean of equal numbers differs by rounding


def _role_by_depth(
  panel: Any, weights: Mapping[str, Any], role: str, measure: str, style: tuple[str, str, str]
) -> None:
  names = {_block_of(n): n for n in weights["layers"] if re.fullmatch(rf"blocks_\d+/{role}", n)}
  blocks = sorted(names)
  mean, low, high = np.array([_at_mean(weights, names[i], measure) for i in blocks]).T
  colour, line, marker = style
  common = dict(marker=marker, markersize=3.5, label=role)
  panel.plot(blocks, mean, color=colour, linestyle=line, **common)
  if any(len(weights["layers"][name]["buckets"]) > 1 for name in names.values()):
    panel.fill_between(blocks, low, high, color=colour, alpha=0.13, linewidth=0)


def _points(panel: Any, values: Sequence[tuple[float, float, float]]) -> None:
  mean, low, high = np.array(values).T
  at = np.arange(len(mean))
  panel.errorbar(at, mean, [mean - low, high - mean], fmt="o", color="#404040", markersize=4)
  panel.set_xlim(-0.6, len(mean) - 0.4)


@_styled
def weight_groups(weights: Mapping[str, Any], title: str) -> Any:
  """Normalised ranks of the active weights over timestep groups, a line for each kind of layer.

  Args:
    weights: of `weight_spectra.analyse_weights`.
    title: names the model and its step.

  Returns:
    a figure, or None of a model that has the same rank at every timestep.
  """
  if len(next(iter(weights["kinds"].values()))["buckets"]) == 1:
    return None
  kinds = [kind for kind in KINDS if kind in weights["kinds"]]
  text = f"Ranks of the active weights by timestep group: {title}"
  figure, axes = _panels(1, len(MEASURES), 2.9, 3.0, text, sharex=True)
  edges = _edges(weights["groups"])
  for measure, panel in zip(MEASURES, axes[0], strict=True):
    for i, kind in enumerate(kinds):
      style = dict(color=COLOURS[i], linestyle=LINE_STYLES[i], label=KIND_TITLES[kind])
      values = _values(weights["kinds"][kind]["groups"], measure)
      panel.stairs(values, edges, baseline=None, linewidth=1.6, **style)
    panel.set(title=MEASURE_TITLES[measure], xlabel="timestep t", ylim=(0, None))
    _grid(panel)
  axes[0, 0].set_ylabel("rank / min(D_in, D_out)")
  handles = axes[0, 0].get_legend_handles_labels()[0]
  figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handlelength=3)
  return figure


# Gradients ----------------------------------------------------------------------------------------


@_styled
def gradient_ranks(gradients: Mapping[str, Any], title: str) -> Any:
  """Normalised ranks of the gradients over timestep groups, beside those of the nulls.

  Args:
    gradients: "groups", "batch_sizes" and "conditions", each with "kinds".
    title: names the model and its step.
  """
  conditions = [c for c in CONDITIONS if c in gradients["conditions"]]
  of_kinds = {c: gradients["conditions"][c]["kinds"] for c in conditions}
  kinds = [kind for kind in KINDS if any(kind in of_kinds[c] for c in conditions)]
  if not kinds:
    return None
  figure, axes = _panels(
    len(MEASURES),
    len(kinds),
    2.9,
    1.9,
    f"Ranks of the gradients by timestep group: {title}",
    sharex=True,
  )
  for row, measure in zip(axes, MEASURES, strict=True):
    for kind, panel in zip(kinds, row, strict=True):
      # Other layers, some of them a few values wide, would press all else to the ground.
      if kind != "other" and panel is not row[0]:
        panel.sharey(row[0])
      for condition in conditions:
        if kind in of_kinds[condition]:
          _gradient_lines(panel, gradients, of_kinds[condition][kind], measure, condition)
    _label_row(row, measure)
  for kind, panel in zip(kinds, axes[0], strict=True):
    panel.set_title(KIND_TITLES[kind])
  for panel in axes[-1]:
    panel.set_xlabel("timestep t")
  _gradient_legend(figure, gradients["batch_sizes"], conditions)
  return figure


def _gradient_lines(
  panel: Any,
  gradients: Mapping[str, Any],
  values: Sequence[Sequence[Mapping[str, float] | None] | None],
  measure: str,
  condition: str,
) -> None:
  """The data at every batch size, a null at the largest alone: more lines could not be read."""
  edges, style = np.array(_edges(gradients["groups"])), CONDITIONS[condition][1]
  sizes = range(len(gradients["batch_sizes"]))
  for i in sizes if condition == "data" else sizes[-1:]:
    y = _values([None if group is None else group[i] for group in values], measure)
    colour, width = COLOURS[i % len(COLOURS)], 1.7 if condition == "data" else 1.2
    panel.stairs(y, edges, baseline=None, color=colour, linestyle=style, linewidth=width)
    if condition == "data":
      panel.plot((edges[1:] + edges[:-1]) / 2, y, "o", color=colour, markersize=2.6)


def _gradient_legend(figure: Any, batch_sizes: Sequence[int], conditions: Sequence[str]) -> None:
  from matplotlib.lines import Line2D

  colours = [COLOURS[i % len(COLOURS)] for i, _ in enumerate(batch_sizes)]
  handles = [
    Line2D([], [], color=colour, marker="o", markersize=2.6, label=f"data, batch size {size}")
    for colour, size in zip(colours, batch_sizes, strict=True)
  ]
  for condition in [c for c in conditions if c != "data"]:
    label, style = CONDITIONS[condition]
    label = f"{label}, batch size {batch_sizes[-1]}"
    handles.append(Line2D([], [], color=colours[-1], linestyle=style, label=label))
  figure.legend(handles=handles, loc="outside lower center", ncols=3, handlelength=3)


@_styled
def gradient_layers(gradients: Mapping[str, Any], title: str) -> Any:
  """Normalised entropy rank of every layer's gradient, a heat map beside those of the nulls.

  Args:
    gradients: "groups", "batch_sizes", of which the largest is drawn, and "conditions".
    title: names the model and its step.
  """
  of_layers = {c: gradients["conditions"].get(c, {}).get("layers", {}) for c in CONDITIONS}
  conditions = [c for c in CONDITIONS if of_layers[c]]
  if not conditions:
    return None
  names = list(of_layers[conditions[0]])
  text = f"Entropy rank of the gradients, batch size {gradients['batch_sizes'][-1]}: {title}"
  height = 1.2 + LAYER_INCHES * len(names)
  figure, axes = _panels(1, len(conditions), 3.2, height, text, sharex=True, sharey=True)
  maps = [_layer_map(of_layers[c], names) for c in conditions]
  largest = max(np.nanmax(values, initial=0.0) for values in maps) or 1.0
  for condition, values, panel in zip(conditions, maps, axes[0], strict=True):
    image = _group_map(panel, gradients["groups"], values, largest)
    panel.set(title=CONDITIONS[condition][0], xlabel="first t of a timestep group")
  axes[0, 0].set_yticks(range(len(names)), names, fontsize=FONT_SIZE - 3)
  axes[0, 0].invert_yaxis()
  figure.colorbar(image, ax=axes, label="entropy rank / min(D_in, D_out)", aspect=40)
  return figure


def _layer_map(layers: Mapping[str, Any], names: Sequence[str]) -> np.ndarray:
  """(layers, G) normalised entropy ranks at the largest batch size, NaN for what is missing."""
  return np.array(
    [
      [np.nan if g is None else g[-1]["normalised"]["entropy_rank"] for g in layers[n]["measures"]]
      for n in names
    ],
    np.float64,
  )


@_styled
def gradient_overlap(gradients: Mapping[str, Any], side: str, title: str) -> Any:
  """Mean cos^2 of the principal angles of two groups' gradient subspaces, beside the nulls'.

  Of one half of the examples in a row's group and of the other half in a column's, so that
  the diagonal shows how well the subspaces are known, and no pair shares an example.

  Args:
    gradients: "groups", "subspace_rank", "overlap" and "conditions".
    side: "left" (of D_in) or "right" (of D_out).
    title: names the model and its step.
  """
  overlap = gradients["overlap"]
  conditions = [c for c in CONDITIONS if c in overlap]
  kinds = [kind for kind in KINDS if any(kind in overlap[c]["kinds"] for c in conditions)]
  if not kinds:
    return None
  space = {"left": "left (D_in)", "right": "right (D_out)"}[side]
  count = gradients["subspace_rank"]
  text = f"Overlap of the leading {count} {space} gradient directions, between different examples"
  text = f"{text}:\n{title}"
  figure, axes = _panels(len(kinds), len(conditions), 2.9, 2.7, text, sharex=True, sharey=True)
  matrices = {
    # None becomes NaN.
    (kind, c): np.array(overlap[c]["kinds"][kind]["cross_half"][side], np.float64)
    for kind in kinds
    for c in conditions
    if kind in overlap[c]["kinds"]
  }
  largest = max(np.nanmax(m, initial=0.0) for m in matrices.values()) or 1.0
  for kind, row in zip(kinds, axes, strict=True):
    for condition, panel in zip(conditions, row, strict=True):
      if (kind, condition) in matrices:
        image = _group_map(panel, gradients["groups"], matrices[kind, condition], largest)
        panel.set_yticks(panel.get_xticks(), panel.get_xticklabels())
    expected = next(overlap[c]["kinds"][kind][f"random_{side}"] for c in conditions)
    row[0].set_ylabel(
      f"{KIND_TITLES[kind]}\n(random subspaces: {expected:.3f})\nfirst t of a timestep group"
    )
  for condition, panel in zip(conditions, axes[0], strict=True):
    panel.set_title(CONDITIONS[condition][0])
  for panel in axes[-1]:
    panel.set_xlabel("first t of a timestep group")
  label = "mean cos² of the principal angles"
  figure.colorbar(image, ax=axes, label=label, shrink=0.6, aspect=40)
  return figure


def _group_map(
  panel: Any, groups: Sequence[Mapping[str, int]], matrix: np.ndarray, largest: float
) -> Any:
  """A heat map from 0 to `largest` whose columns are the timestep groups."""
  image = panel.imshow(matrix, vmin=0, vmax=largest, cmap="cividis", origin="lower", aspect="auto")
  ticks = range(0, len(groups), -(-len(groups) // 5))
  panel.set_xticks(ticks, [groups[i]["t_first"] for i in ticks])
  return image


# The causal test and losses -----------------------------------------------------------------------


@_styled
def truncation(
  found: Mapping[str, Any], title: str, drawn: tuple[str, Sequence[float]] | None = None
) -> Any:
  """Rise in held-out loss of a timestep group when the factorised layers are cut to rank k.

  Args:
    found: "boundaries" (G + 1,), "baseline" (G,), "ranks" (K,), "rise" (K, G) with None for
      what is missing.
    title: names the model and its step.
    drawn: a name and (T,) r(t) to draw upon it.
  """
  from matplotlib.colors import LogNorm

  order = np.argsort(found["ranks"])
  ranks = np.array(found["ranks"], np.float64)[order]
  rise = np.array(found["rise"], np.float64)[order]  # None becomes NaN
  largest = np.nanmax(rise, initial=0)
  if largest <= ROUNDING * np.nanmax(np.array(found["baseline"], float), initial=0):
    return None
  figure, ((panel,),) = _panels(1, 1, 7.2, 4.4, f"Causal test: {title}")
  least = LEAST_RISE * largest
  norm = LogNorm(rise[rise >= least].min(), largest)
  edges = _rank_edges(ranks)
  shown = np.where(rise < least, least / 10, rise)
  image = panel.pcolormesh(
    found["boundaries"], edges, shown, norm=norm, cmap=_rise_colours(), rasterized=True
  )
  _iso_loss_lines(panel, found["boundaries"], ranks, shown, norm)
  if drawn is not None:
    name, r = drawn
    effects = _outline(4.5, "white")
    panel.step(np.arange(len(r)), r, color="black", linewidth=2, label=name, path_effects=effects)
    figure.legend(loc="outside lower center")
  panel.set(xlabel=T_LABEL, ylabel="rank k that the factorised layers are cut to", yscale="log")
  panel.set(ylim=(edges[0], edges[-1]))
  _rank_ticks(panel, ranks)
  label = "rise in held-out loss (grey: none, or below the scale)"
  figure.colorbar(image, ax=panel, label=label, extend="min")
  return figure


def _rank_edges(ranks: np.ndarray) -> np.ndarray:
  """(K + 1,) borders of rows, halfway between ranks on a logarithmic axis."""
  if len(ranks) == 1:
    return ranks[0] * np.array([0.8, 1.25])
  inner = np.sqrt(ranks[1:] * ranks[:-1])
  return np.array([ranks[0] ** 2 / inner[0], *inner, ranks[-1] ** 2 / inner[-1]])


def _rank_ticks(panel: Any, ranks: np.ndarray) -> None:
  from matplotlib import ticker

  panel.yaxis.set_major_locator(ticker.FixedLocator(ranks))
  panel.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
  panel.yaxis.set_minor_locator(ticker.NullLocator())


def _rise_colours() -> Any:
  import matplotlib

  return matplotlib.colormaps["viridis"].with_extremes(under=NO_RISE, bad="white")


def _iso_loss_lines(
  panel: Any, boundaries: Sequence[int], ranks: np.ndarray, rise: np.ndarray, norm: Any
) -> None:
  """Contours of powers of ten, and thrice these where there are few, through cells' middles."""
  if min(rise.shape) < 2:
    return
  # Within the scale by more than rounding: at its ends there is nothing to divide.
  low, high = norm.vmin * (1 + ROUNDING), norm.vmax * (1 - ROUNDING)
  decades = 10.0 ** np.arange(np.floor(np.log10(norm.vmin)), np.ceil(np.log10(norm.vmax)) + 1)
  levels = decades[(decades > low) & (decades < high)]
  if len(levels) < 3:
    levels = np.sort(np.concatenate([decades, 3 * decades]))
    levels = levels[(levels > low) & (levels < high)]
  t = (np.array(boundaries[1:]) + np.array(boundaries[:-1])) / 2
  # Logarithms change evenly between cells, the rises do not; of no rise there is none.
  heights = np.log10(np.where(rise >= norm.vmin, rise, np.nan))
  style = dict(colors="white", linestyles="solid", linewidths=1.2)
  lines = panel.contour(t, ranks, np.ma.masked_invalid(heights), levels=np.log10(levels), **style)
  lines.set_path_effects(_outline(2.2, "black"))
  for text in panel.clabel(lines, fmt=lambda level: f"{10**level:g}"):
    box = dict(facecolor="white", edgecolor="none", alpha=0.8, pad=0.8)
    text.set(color="black", bbox=box, path_effects=[])


def _outline(width: float, colour: str) -> list[Any]:
  """A line's border of another colour, so that it is seen on any ground."""
  from matplotlib import patheffects

  return [patheffects.Stroke(linewidth=width, foreground=colour), patheffects.Normal()]


@_styled
def losses(
  boundaries: Sequence[int], by_name: Mapping[str, Sequence[float | None]], title: str
) -> Any:
  """Held-out loss of each timestep group.

  Args:
    boundaries: (G + 1,).
    by_name: (G,) losses for each name in the legend; None for what is missing.
    title: names the model and its step.
  """
  drawn = {name: np.array(loss, np.float64) for name, loss in by_name.items()}
  drawn = {name: loss for name, loss in drawn.items() if np.isfinite(loss).any()}
  if not drawn:
    return None
  figure, ((panel,),) = _panels(1, 1, 7.6, 4.0, f"Held-out loss by timestep group: {title}")
  for i, (name, loss) in enumerate(drawn.items()):
    style = dict(color=COLOURS[i % len(COLOURS)], linestyle=LINE_STYLES[i % len(LINE_STYLES)])
    panel.stairs(loss, boundaries, baseline=None, label=name, linewidth=1.8, **style)
  panel.set(xlabel=T_LABEL, ylabel="mean loss (per value)", yscale="log")
  plain_ticks(panel)
  _grid(panel)
  if len(drawn) > 1:
    figure.legend(loc="outside lower center", ncols=3)
  return figure
