"""Figures of the gradients' ranks and overlaps by timestep group, beside those of the nulls.

`gradients` come from `gradient_spectra.analyze_gradients`; titles name the model and its step.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lrdit.analysis import plot_style
from lrdit.analysis.plot_style import FONT_SIZE, KIND_TITLES, MEASURE_TITLES, color_of

LAYER_INCHES = 0.14  # height of a layer's row in a heat map
CONDITIONS = {  # title, line style
  "data": ("data", "-"),
  "shuffled": ("null: timesteps shuffled", (0, (4, 1.5))),
  "noise": ("null: noise-only targets", (0, (1, 1.2))),
  "residual": ("null: noise for residuals", (0, (4, 1.2, 1, 1.2))),
}
GROUP_LABEL = "first t of a timestep group"


def _kinds(conditions: Mapping[str, Any]) -> list[str]:
  return [kind for kind in KIND_TITLES if kind in conditions["data"]["kinds"]]


@plot_style.styled()
def ranks(gradients: Mapping[str, Any], title: str) -> Any:
  """Draw normalised ranks of the gradients over timestep groups."""
  conditions, kinds = gradients["conditions"], _kinds(gradients["conditions"])
  text = f"Ranks of the gradients by timestep group: {title}"
  figure, axes = plot_style.panels(len(MEASURE_TITLES), len(kinds), 2.9, 1.9, text, sharex=True)
  for row, measure in zip(axes, MEASURE_TITLES, strict=True):
    for kind, panel in zip(kinds, row, strict=True):
      # Other layers, some only a few values wide, would flatten the rest on a shared axis.
      if kind != "other" and panel is not row[0]:
        panel.sharey(row[0])
      for condition in conditions:
        _add_lines(panel, gradients, conditions[condition]["kinds"][kind], measure, condition)
    plot_style.label_row(row, measure)
  for kind, column in zip(kinds, axes.T, strict=True):
    column[0].set_title(KIND_TITLES[kind])
    column[-1].set_xlabel("timestep t")
  plot_style.legend_below(figure, _legend_handles(gradients["batch_sizes"], conditions), columns=3)
  return figure


def _add_lines(
  panel: Any,
  gradients: Mapping[str, Any],
  cells: Sequence[Sequence[Mapping[str, float]]],
  measure: str,
  condition: str,
) -> None:
  """Add the data at every batch size, but a null only at the largest, to stay readable."""
  edges = np.array(plot_style.group_edges(gradients["groups"]))
  sizes = range(len(gradients["batch_sizes"]))
  width = 1.7 if condition == "data" else 1.2
  for i in sizes if condition == "data" else sizes[-1:]:
    values = [group[i][measure] for group in cells]
    style = dict(color=color_of(i), linestyle=CONDITIONS[condition][1], linewidth=width)
    panel.stairs(values, edges, baseline=None, **style)
    if condition == "data":
      panel.plot((edges[1:] + edges[:-1]) / 2, values, "o", color=color_of(i), markersize=2.6)


def _legend_handles(batch_sizes: Sequence[int], conditions: Mapping[str, Any]) -> list[Any]:
  from matplotlib.lines import Line2D

  handles = [
    Line2D([], [], color=color_of(i), marker="o", markersize=2.6, label=f"data, batch size {size}")
    for i, size in enumerate(batch_sizes)
  ]
  color = color_of(len(batch_sizes) - 1)
  for name, style in (CONDITIONS[condition] for condition in conditions if condition != "data"):
    label = f"{name}, batch size {batch_sizes[-1]}"
    handles.append(Line2D([], [], color=color, linestyle=style, label=label))
  return handles


@plot_style.styled()
def layers(gradients: Mapping[str, Any], title: str) -> Any:
  """Draw heat maps of the normalised entropy rank of every layer's gradient, largest batch size."""
  conditions = gradients["conditions"]
  names = list(conditions["data"]["layers"])
  text = f"Entropy rank of the gradients, batch size {gradients['batch_sizes'][-1]}: {title}"
  height = 1.2 + LAYER_INCHES * len(names)
  figure, axes = plot_style.panels(1, len(conditions), 3.2, height, text, sharex=True, sharey=True)

  def row_of(layer: Mapping[str, Any]) -> list[float]:
    return [group[-1]["normalised"]["entropy_rank"] for group in layer["measures"]]

  maps = [
    np.array([row_of(found["layers"][name]) for name in names]) for found in conditions.values()
  ]
  largest = max(values.max() for values in maps) or 1.0
  for condition, values, panel in zip(conditions, maps, axes[0], strict=True):
    image = _add_map(panel, gradients["groups"], values, largest)
    panel.set(title=CONDITIONS[condition][0], xlabel=GROUP_LABEL)
  axes[0, 0].set_yticks(range(len(names)), names, fontsize=FONT_SIZE - 3)
  axes[0, 0].invert_yaxis()
  figure.colorbar(image, ax=axes, label="entropy rank / min(D_in, D_out)", aspect=40)
  return figure


@plot_style.styled()
def overlap(gradients: Mapping[str, Any], side: str, title: str) -> Any:
  """Draw the mean cos^2 of the principal angles between two groups' gradient subspaces.

  Rows use one half of the examples and columns the other half, so no pair shares an example and
  the diagonal shows how well the subspaces are known. `side` is "left" (R^D_in) or "right"
  (R^D_out).
  """
  found, kinds = gradients["overlap"], _kinds(gradients["overlap"])
  space = {"left": "left (D_in)", "right": "right (D_out)"}[side]
  text = f"Overlap of the leading {gradients['subspace_rank']} {space} gradient directions"
  text = f"{text}, between different examples:\n{title}"
  figure, axes = plot_style.panels(len(kinds), len(found), 2.9, 2.7, text, sharex=True, sharey=True)
  tables = {
    (kind, condition): np.array(found[condition]["kinds"][kind]["cross_half"][side], np.float64)
    for kind in kinds
    for condition in found
  }  # None, for a zero gradient, becomes NaN
  largest = max(np.nanmax(table, initial=0.0) for table in tables.values()) or 1.0
  for kind, row in zip(kinds, axes, strict=True):
    for condition, panel in zip(found, row, strict=True):
      image = _add_map(panel, gradients["groups"], tables[kind, condition], largest)
      panel.set_yticks(panel.get_xticks(), panel.get_xticklabels())
    name, expected = KIND_TITLES[kind], found["data"]["kinds"][kind][f"random_{side}"]
    row[0].set_ylabel(f"{name}\n(random subspaces: {expected:.3f})\n{GROUP_LABEL}")
  for condition, column in zip(found, axes.T, strict=True):
    column[0].set_title(CONDITIONS[condition][0])
    column[-1].set_xlabel(GROUP_LABEL)
  label = "mean cos² of the principal angles"
  figure.colorbar(image, ax=axes, label=label, shrink=0.6, aspect=40)
  return figure


def _add_map(
  panel: Any, groups: Sequence[Mapping[str, int]], matrix: np.ndarray, largest: float
) -> Any:
  """Add a heat map from 0 to `largest` whose columns are the timestep groups."""
  image = panel.imshow(matrix, vmin=0, vmax=largest, cmap="cividis", origin="lower", aspect="auto")
  ticks = range(0, len(groups), -(-len(groups) // 5))
  panel.set_xticks(ticks, [groups[i]["t_first"] for i in ticks])
  return image
