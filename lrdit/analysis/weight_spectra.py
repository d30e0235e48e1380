"""Singular spectra of a model's weights by layer, rank bucket, kind of layer and timestep group.

Little memory is needed beside the parameters: only one layer at a time is in float64, and low-rank
kernels are never multiplied out.

Axes: D_in, D_out widths of a layer, R allocated rank, G timestep groups, K rank buckets.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from lrdit.analysis import spectra
from lrdit.analysis.unit_cache import UnitCache
from lrdit.model import dit
from lrdit.rank.plan import LayerRanks, RankPlan

KINDS = ("attention", "mlp", "adaln", "other")


def layer_kind(name: str) -> str:
  """Return the kind, one of `KINDS`, of a layer of `dit.layer_shapes`."""
  parts = name.split("/")
  if parts[-1] == "adaln":
    return "adaln"
  return {"attn": "attention", "mlp": "mlp"}.get(parts[-2] if len(parts) > 1 else "", "other")


def normalised(values: Mapping[str, float], dim_in: int, dim_out: int) -> dict[str, float]:
  """Return ranks as shares of the largest possible rank, min(D_in, D_out)."""
  return {name: value / min(dim_in, dim_out) for name, value in values.items()}


def mean_tables(tables: Sequence[Any]) -> Any:
  """Average equally nested lists and dicts of numbers, ignoring None unless all are."""
  if isinstance(tables[0], dict):
    return {key: mean_tables([table[key] for table in tables]) for key in tables[0]}
  if isinstance(tables[0], list):
    return [mean_tables(rows) for rows in zip(*tables, strict=True)]
  known = [value for value in tables if value is not None]
  return float(np.mean(known)) if known else None


def mean_by_kind(layers: Mapping[str, Any]) -> dict[str, Any]:
  """Return the mean of the layers' tables for each of `KINDS` that there is."""
  by_kind = {k: [own for name, own in layers.items() if layer_kind(name) == k] for k in KINDS}
  return {kind: mean_tables(tables) for kind, tables in by_kind.items() if tables}


def analyze_layer(
  layer_params: Mapping[str, np.ndarray], ranks: LayerRanks | None
) -> dict[str, Any]:
  """Return the singular spectrum and the measures of one layer's kernel as JSON.

  `layer_params` has a dense "kernel" (D_in, D_out), or "down" (D_in, R) and "up" (R, D_out). The
  result has "dim_in", "dim_out" and "buckets", an entry for each rank bucket or one for a dense
  layer: "active_rank" (None if dense), "singular_values" (descending), `spectra.MEASURES`, and
  "normalised", the measures as shares of min(D_in, D_out).
  """
  if ranks is None:
    kernel = layer_params["kernel"]
    dims, spectrums = kernel.shape, [(None, spectra.singular_values(kernel))]
  else:
    down, up = layer_params["down"], layer_params["up"]
    dims = (down.shape[0], up.shape[1])
    spectrums = [(r, spectra.product_singular_values(down[:, :r], up[:r])) for r in ranks.active]
  buckets = []
  for rank, sigma in spectrums:
    found = spectra.measures(sigma)
    entry = {"active_rank": rank, "singular_values": sigma.tolist(), **found}
    buckets.append(entry | {"normalised": normalised(found, *dims)})
  return {"dim_in": dims[0], "dim_out": dims[1], "buckets": buckets}


def bucket_shares(plan: RankPlan, boundaries: Sequence[int]) -> Float[np.ndarray, "G K"]:
  """Return the share of each group's timesteps in each rank bucket; rows sum to 1."""
  groups = np.split(plan.bucket_of_timestep, boundaries[1:-1])
  return np.stack([np.bincount(group, minlength=plan.num_buckets) / len(group) for group in groups])


def analyze_weights(
  params: Mapping[str, Any],
  plan: RankPlan,
  shape: dit.DiTShape,
  boundaries: Sequence[int],
  cache: UnitCache,
) -> dict[str, Any]:
  """Return the spectra of all layers as JSON, with a cached unit for each layer.

  Group i is [boundaries[i], boundaries[i + 1]), and the (G + 1,) boundaries reach from 0 to T.

  Returns:
    groups: [{t_first, t_last, bucket_shares (K,)}].
    segments: [{t_first, t_last, bucket}].
    layers: {name: `analyze_layer` with "kind", and "groups": normalised measures averaged over each
      group's timesteps}.
    kinds: {kind: {buckets, groups}}, normalised measures averaged over the layers.
  """

  def make(name: str) -> tuple[dict[str, Any]]:
    layer_params = functools.reduce(lambda tree, key: tree[key], name.split("/"), params)
    return (analyze_layer(layer_params, plan.by_name.get(name)),)

  names = list(dit.layer_shapes(shape))
  cache.fill(names, "layer", make)
  layers = {name: cache.load(name)[0] for name in names}
  shares, normalised_ranks = bucket_shares(plan, boundaries), {}
  for name, layer in layers.items():
    entries = [entry["normalised"] for entry in layer["buckets"]]
    # A dense layer repeats its one entry.
    by_bucket = entries if len(entries) == plan.num_buckets else entries * plan.num_buckets
    layer["kind"] = layer_kind(name)
    layer["groups"] = [
      {m: float(np.average([entry[m] for entry in by_bucket], weights=share)) for m in entries[0]}
      for share in shares
    ]
    normalised_ranks[name] = {"buckets": by_bucket, "groups": layer["groups"]}
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
    "kinds": mean_by_kind(normalised_ranks),
  }
