"""Figures of the gradients' ranks and overlaps by timestep group, beside those of the nulls.

Axes: G timestep groups.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lrdit.analysis.figures import (
  KIND_TITLES,
  MEASURE_TITLES,
  group_edges,
  label_row,
  legend_below,
  panels,
  styled,
)
from lrdit.analysis.plot_style import COLOURS, FONT_SIZE
from lrdit.analysis.weight_spectra import KINDS

LAYER_INCHES = 0.14  # height of a layer's row in a heat map
CONDITIONS = {  # title, line style
  "data": ("data", "-"),
  "shuffled": ("null: timesteps shuffled", (0, (4, 1.5))),
  "noise": ("null: noise-only targets", (0, (1, 1.2))),
  "residual": ("null: noise for residuals", (0, (4, 1.2, 1, 1.2))),
}


def _kinds(conditions: Mapping[str, Any]) -> list[str]:
  return [kind for kind in KINDS if kind in conditions["data"]["kinds"]]


def _colour(i: int) -> str:
  return COLOURS[i % len(COLOURS)]


@styled
def ranks(gradients: Mapping[str, Any], title: str) -> Any:
  """Draw normalised ranks of the gradients over timestep groups.

  Args:
    gradients: from `gradient_spectra.analyze_gradients`.
    title: names the model and its step.
  """
  conditions, kinds = gradients["conditions"], _kinds(gradients["conditions"])
  text = f"Ranks of the gradients by timestep group: {title}"
  figure, axes = panels(len(MEASURE_TITLES), len(kinds), 2.9, 1.9, text, sharex=True)
  for row, measure in zip(axes, MEASURE_TITLES, strict=True):
    for kind, panel in zip(kinds, row, strict=True):
      # Other layers, some of them a few values wide, would press all else to the ground.
      if kind != "other" and panel is not row[0]:
        panel.sharey(row[0])
      for condition in conditions:
        _add_lines(panel, gradients, conditions[condition]["kinds"][kind], measure, condition)
    label_row(row, measure)
  for kind, panel in zip(kinds, axes[0], strict=True):
    panel.set_title(KIND_TITLES[kind])
  for panel in axes[-1]:
    panel.set_xlabel("timestep t")
  _add_legend(figure, gradients["batch_sizes"], conditions)
  return figure


def _add_lines(
  panel: Any,
  gradients: Mapping[str, Any],
  cells: Sequence[Sequence[Mapping[str, float]]],
  measure: str,
  condition: str,
) -> None:
  """Add the data at every batch size, but a null at the largest alone, to stay readable."""
  edges = np.array(group_edges(gradients["groups"]))
  sizes = range(len(gradients["batch_sizes"]))
  width = 1.7 if condition == "data" else 1.2
  for i in sizes if condition == "data" else sizes[-1:]:
    values = [group[i][measure] for group in cells]
    style = dict(color=_colour(i), linestyle=CONDITIONS[condition][1], linewidth=width)
    panel.stairs(values, edges, baseline=None, **style)
    if condition == "data":
      panel.plot((edges[1:] + edges[:-1]) / 2, values, "o", color=_colour(i), markersize=2.6)


def _add_legend(figure: Any, batch_sizes: Sequence[int], conditions: Mapping[str, Any]) -> None:
  from matplotlib.lines import Line2D

  handles = [
    Line2D([], [], color=_colour(i), marker="o", markersize=2.6, label=f"data, batch size {size}")
    for i, size in enumerate(batch_sizes)
  ]
  for condition in [c for c in conditions if c != "data"]:
    name, style = CONDITIONS[condition]
    label = f"{name}, batch size {batch_sizes[-1]}"
    colour = _colour(len(batch_sizes) - 1)
    handles.append(Line2D([], [], color=colour, linestyle=style, label=label))
  legend_below(figure, handles, columns=3)


@styled
def layers(gradients: Mapping[str, Any], title: str) -> Any:
  """Draw the normalised entropy rank of every layer's gradient as heat maps.

  Args:
    gradients: from `gradient_spectra.analyze_gradients`; the largest batch size is drawn.
    title: names the model and its step.
  """
  conditions = gradients["conditions"]
  names = list(conditions["data"]["layers"])
  text = f"Entropy rank of the gradients, batch size {gradients['batch_sizes'][-1]}: {title}"
  height = 1.2 + LAYER_INCHES * len(names)
  figure, axes = panels(1, len(conditions), 3.2, height, text, sharex=True, sharey=True)
  maps = [
    np.array(
      [
        [group[-1]["normalised"]["entropy_rank"] for group in found["layers"][name]["measures"]]
        for name in names
      ]
    )
    for found in conditions.values()
  ]
  largest = max(values.max() for values in maps) or 1.0
  for condition, values, panel in zip(conditions, maps, axes[0], strict=True):
    image = _add_map(panel, gradients["groups"], values, largest)
    panel.set(title=CONDITIONS[condition][0], xlabel="first t of a timestep group")
  axes[0, 0].set_yticks(range(len(names)), names, fontsize=FONT_SIZE - 3)
  axes[0, 0].invert_yaxis()
  figure.colorbar(image, ax=axes, label="entropy rank / min(D_in, D_out)", aspect=40)
  return figure


@styled
def overlap(gradients: Mapping[str, Any], side: str, title: str) -> Any:
  """Draw the mean cos^2 of the principal angles between two groups' gradient subspaces.

  A row's subspace is of one half of the examples and a column's of the other half. So the diagonal
  shows how well the subspaces are known, and no pair shares an example.

  Args:
    gradients: from `gradient_spectra.analyze_gradients`.
    side: "left" (of R^D_in) or "right" (of R^D_out).
    title: names the model and its step.
  """
  found, kinds = gradients["overlap"], _kinds(gradients["overlap"])
  space = {"left": "left (D_in)", "right": "right (D_out)"}[side]
  text = f"Overlap of the leading {gradients['subspace_rank']} {space} gradient directions"
  text = f"{text}, between different examples:\n{title}"
  figure, axes = panels(len(kinds), len(found), 2.9, 2.7, text, sharex=True, sharey=True)
  tables = {
    (kind, condition): np.array(found[condition]["kinds"][kind]["cross_half"][side], np.float64)
    for kind in kinds
    for condition in found
  }  # None, of a gradient of zero, becomes NaN
  largest = max(np.nanmax(table, initial=0.0) for table in tables.values()) or 1.0
  for kind, row in zip(kinds, axes, strict=True):
    for condition, panel in zip(found, row, strict=True):
      image = _add_map(panel, gradients["groups"], tables[kind, condition], largest)
      panel.set_yticks(panel.get_xticks(), panel.get_xticklabels())
    expected = found["data"]["kinds"][kind][f"random_{side}"]
    row[0].set_ylabel(
      f"{KIND_TITLES[kind]}\n(random subspaces: {expected:.3f})\nfirst t of a timestep group"
    )
  for condition, panel in zip(found, axes[0], strict=True):
    panel.set_title(CONDITIONS[condition][0])
  for panel in axes[-1]:
    panel.set_xlabel("first t of a timestep group")
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
