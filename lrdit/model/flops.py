"""Multiply-accumulates (MACs) and parameters of a DiT, counted from its shapes alone.

Only matrix products are counted, attention's included: at the published widths everything else is
below 2 % of what XLA counts. One MAC is a multiplication and an addition, so 2 FLOPs; the "Gflops"
that DiTs are published with are MACs. Rematerialisation is not counted, because these are the
products that the mathematics needs.

Axes: S solver steps.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from lrdit.model.dit import DiTShape, layer_shapes
from lrdit.rank.plan import RankPlan

FLOPS_PER_MAC = 2

# Layers whose input does not depend on any parameter: no gradient flows into it.
_FIRST_LAYERS = ("patch_embed", "t_embedder/fc1")


def _factor_macs(shape: DiTShape, plan: RankPlan, bucket: int) -> dict[str, list[int]]:
  """Return the MACs per example of each factor of each layer's kernel, in order of use.

  A dense kernel is one factor, a low-rank one two, cut to the bucket's rank.
  """
  macs = {}
  for name, (dim_in, dim_out) in layer_shapes(shape).items():
    on_conditioning = name.startswith("t_embedder/") or name.endswith("/adaln")
    rows, ranks = 1 if on_conditioning else shape.num_tokens, plan.by_name.get(name)
    if ranks is None:
      macs[name] = [rows * dim_in * dim_out]
    else:
      rank = ranks.active[bucket]
      macs[name] = [rows * dim_in * rank, rows * rank * dim_out]
  return macs


def _attention_macs(shape: DiTShape) -> int:
  """Return the MACs per example of all blocks' products of queries, keys and values."""
  return 2 * shape.depth * shape.num_tokens**2 * shape.hidden_size


def forward_macs(shape: DiTShape, plan: RankPlan, bucket: int) -> int:
  """Return the MACs of one example's forward pass at a rank bucket."""
  return _attention_macs(shape) + sum(map(sum, _factor_macs(shape, plan, bucket).values()))


def mean_forward_macs(shape: DiTShape, plan: RankPlan) -> float:
  """Return the MACs of one example's forward pass, averaged over all timesteps."""
  table = [forward_macs(shape, plan, bucket) for bucket in range(plan.num_buckets)]
  return float(np.asarray(table, np.float64)[plan.bucket_of_timestep].mean())


def training_macs(shape: DiTShape, plan: RankPlan, groups: Sequence[tuple[int, int]]) -> int:
  """Return the MACs of one training step's forward and backward pass on one device.

  Each product costs its own size once more for the gradient of either operand. The gradient of the
  model's inputs is not computed.

  Args:
    shape: sizes of the model.
    plan: its rank plan.
    groups: (examples, rank bucket) as `strata.rank_groups` returns them.
  """
  total = 0
  for size, bucket in groups:
    factors = _factor_macs(shape, plan, bucket)
    inputs = sum(factors[name][0] for name in _FIRST_LAYERS)
    total += size * (3 * forward_macs(shape, plan, bucket) - inputs)
  return total


def sampling_macs(
  shape: DiTShape,
  plan: RankPlan,
  timesteps: Int[np.ndarray, " S"],
  batch_size: int,
  guidance_scale: float,
) -> int:
  """Return the MACs of sampling one batch.

  Args:
    shape: sizes of the model.
    plan: its rank plan.
    timesteps: (S,) of the solver.
    batch_size: number of images.
    guidance_scale: at any value but 1, a model with classes runs twice per image and step.
  """
  passes = 2 if guidance_scale != 1 and shape.num_classes else 1
  steps = np.bincount(plan.bucket_of_timestep[timesteps], minlength=plan.num_buckets)
  per_example = sum(
    int(count) * forward_macs(shape, plan, bucket) for bucket, count in enumerate(steps)
  )
  return batch_size * passes * per_example


def num_parameters(shape: DiTShape, plan: RankPlan) -> int:
  """Return the number of parameters at the allocated ranks, biases and label table included.

  `plan.at_bucket(bucket)` as the plan counts the parameters that a bucket uses. The position
  embedding is fixed and is not a parameter.
  """
  count = (shape.num_classes + 1) * shape.hidden_size if shape.num_classes else 0
  for name, (dim_in, dim_out) in layer_shapes(shape).items():
    ranks = plan.by_name.get(name)
    kernel = dim_in * dim_out if ranks is None else ranks.max_rank * (dim_in + dim_out)
    count += kernel + dim_out
  return count


def describe_buckets(shape: DiTShape, plan: RankPlan) -> list[dict[str, int]]:
  """Return, for each rank bucket, its number of "timesteps", "parameters" and "forward_macs"."""
  timesteps = np.bincount(plan.bucket_of_timestep, minlength=plan.num_buckets)
  return [
    {
      "timesteps": int(count),
      "parameters": num_parameters(shape, plan.at_bucket(bucket)),
      "forward_macs": forward_macs(shape, plan, bucket),
    }
    for bucket, count in enumerate(timesteps)
  ]


def describe_arm(
  shape: DiTShape, plan: RankPlan, timesteps: Int[np.ndarray, " S"], guidance_scale: float
) -> dict[str, Any]:
  """Return the counts of one model, as JSON.

  Args:
    shape, plan, timesteps, guidance_scale: as in `sampling_macs`.

  Returns:
    "parameters" as allocated, "buckets" from `describe_buckets`, and the "mean_forward_macs" over
    timesteps and "sampling_macs" of one image.
  """
  return {
    "parameters": num_parameters(shape, plan),
    "buckets": describe_buckets(shape, plan),
    "mean_forward_macs": mean_forward_macs(shape, plan),
    "sampling_macs": sampling_macs(shape, plan, timesteps, 1, guidance_scale),
  }
