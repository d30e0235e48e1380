"""Singular spectra of a model's weights: layer by layer, per rank bucket, kind and timestep group.

One layer is in float64 at a time, and a low-rank kernel is never multiplied out, so that
beside the parameters little memory is taken.

Axes: D_in / D_out width of a layer, R allocated rank, G timestep groups, K rank buckets.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from lrdit.analysis import spectra
from lrdit.analysis.unit_cache import UnitCache
from lrdit.model import dit
from lrdit.rank.plan import LayerRanks, RankPlan

KINDS = ("attention", "mlp", "adaln", "other")


def layer_kind(name: str) -> str:
  """Which of `KINDS` a layer is.

  Args:
    name: of `dit.layer_shapes`.
  """
  parts = name.split("/")
  if parts[-1] == "adaln":
    return "adaln"
  return {"attn": "attention", "mlp": "mlp"}.get(parts[-2] if len(parts) > 1 else "", "other")


def normalised(values: Mapping[str, float], dim_in: int, dim_out: int) -> dict[str, float]:
  """Ranks as shares of the largest possible one, min(D_in, D_out)."""
  return {name: value / min(dim_in, dim_out) for name, value in values.items()}


def mean_of(entries: Sequence[Mapping[str, float]], weights: Any = None) -> dict[str, float]:
  """Mean of each measure over entries that have the same ones; `weights` as in `np.average`."""
  return {
    name: float(np.average([e[name] for e in entries], weights=weights)) for name in entries[0]
  }


def analyse_layer(
  kernel_params: Mapping[str, np.ndarray], ranks: LayerRanks | None
) -> dict[str, Any]:
  """The singular spectrum of one layer's kernel, and what is read off it.

  Args:
    kernel_params: "kernel" (D_in, D_out) of a dense layer; "down" (D_in, R) and "up" (R, D_out)
      of a low-rank one. Others are not looked at.
    ranks: of a low-rank layer; None of a dense one.

  Returns:
    "dim_in", "dim_out", and "buckets": for each rank bucket, or once for a dense layer,
    "active_rank" (None if dense), "singular_values" (descending), `spectra.MEASURES`, and under
    "normalised" those as shares of min(D_in, D_out). As JSON.
  """
  if ranks is None:
    kernel = kernel_params["kernel"]
    dims = kernel.shape
    spectrums = {None: spectra.singular_values(kernel)}
  else:
    down, up = kernel_params["down"], kernel_params["up"]
    dims = (down.shape[0], up.shape[1])
    spectrums = {r: spectra.product_singular_values(down[:, :r], up[:r]) for r in ranks.active}
  buckets = ranks.active if ranks is not None else (None,)
  return {
    "dim_in": dims[0],
    "dim_out": dims[1],
    "buckets": [_entry(rank, spectrums[rank], dims) for rank in buckets],
  }


def _entry(
  active_rank: int | None, sigma: Float[np.ndarray, " r"], dims: tuple[int, int]
) -> dict[str, Any]:
  found = spectra.measures(sigma)
  return {
    "active_rank": active_rank,
    "singular_values": sigma.tolist(),
    **found,
    "normalised": normalised(found, *dims),
  }


def bucket_shares(plan: RankPlan, boundaries: Sequence[int]) -> Float[np.ndarray, "G K"]:
  """Share of each group's timesteps that each rank bucket has; rows sum to 1.

  Args:
    plan: the rank plan.
    boundaries: (G + 1,) ascending; group i is [boundaries[i], boundaries[i + 1]).
  """
  groups = np.split(plan.bucket_of_timestep, boundaries[1:-1])
  return np.stack([np.bincount(group, minlength=plan.num_buckets) / len(group) for group in groups])


def analyse_weights(
  params: Mapping[str, Any],
  plan: RankPlan,
  shape: dit.DiTShape,
  boundaries: Sequence[int],
  parts: UnitCache,
  bar_factory: Callable[[int, int, str], Any],
) -> dict[str, Any]:
  """Spectra of all layers; layers that `parts` holds are not analysed again.

  Args:
    params: host arrays.
    plan: of the model.
    shape: of the model.
    boundaries: (G + 1,) of the timestep groups, from 0 to T.
    parts: of this section; its key names the parameters and the plan.
    bar_factory: as `progress.make_bar`.

  Returns:
    As JSON: "groups" ("t_first", "t_last" and "bucket_shares", (K,) of its timesteps),
    "segments" ("t_first", "t_last", "bucket"), "layers" (by name as `analyse_layer`, with "kind"
    and "groups", the normalised measures' mean over each group's timesteps), and "kinds" (by name
    "buckets" and "groups", the means of the layers' normalised measures).
  """
  shares = bucket_shares(plan, boundaries)
  names = list(dit.layer_shapes(shape))
  layers = _finished_layers(params, plan, names, parts, bar_factory)
  for name, layer in layers.items():
    of_bucket = [entry["normalised"] for entry in _every_bucket(layer, plan)]
    layer["kind"] = layer_kind(name)
    layer["groups"] = [mean_of(of_bucket, share) for share in shares]
  kinds = {kind: [x for x in layers.values() if x["kind"] == kind] for kind in KINDS}
  starts = [start for start, _ in plan.segments] + [plan.num_train_timesteps]
  return {
    "groups": [
      {"t_first": int(first), "t_last": int(end) - 1, "bucket_shares": share.tolist()}
      for first, end, share in zip(boundaries, boundaries[1:], shares, strict=False)
    ],
    "segments": [
      {"t_first": start, "t_last": end - 1, "bucket": bucket}
      for (start, bucket), end in zip(plan.segments, starts[1:], strict=True)
    ],
    "layers": layers,
    "kinds": {kind: _mean_layer(of_kind, plan) for kind, of_kind in kinds.items() if of_kind},
  }


def _finished_layers(
  params: Mapping[str, Any],
  plan: RankPlan,
  names: Sequence[str],
  parts: UnitCache,
  bar_factory: Callable[[int, int, str], Any],
) -> dict[str, Any]:
  kept = {name: part[0] for name in names if (part := parts.load(name)) is not None}
  layers = {}
  with bar_factory(len(names), len(kept), "layer") as bar:
    for name in names:
      layers[name] = kept.get(name)
      if layers[name] is None:
        kernel_params = functools.reduce(lambda tree, key: tree[key], name.split("/"), params)
        layers[name] = analyse_layer(kernel_params, plan.by_name.get(name))
        parts.save(name, layers[name])
        bar.update()
  return layers


def _every_bucket(layer: Mapping[str, Any], plan: RankPlan) -> list[dict[str, Any]]:
  """A layer's entry at each bucket of the plan: a dense layer's one at all of them."""
  entries = layer["buckets"]
  return entries if len(entries) == plan.num_buckets else entries * plan.num_buckets


def _mean_layer(layers: Sequence[dict[str, Any]], plan: RankPlan) -> dict[str, Any]:
  of_layers = [[e["normalised"] for e in _every_bucket(layer, plan)] for layer in layers]
  return {
    "buckets": [mean_of(entries) for entries in zip(*of_layers, strict=True)],
    "groups": [mean_of(g) for g in zip(*(layer["groups"] for layer in layers), strict=True)],
  }
