"""Multiply-accumulates (MACs) and parameters of a DiT, counted from its shapes alone.

Only matrix products count, attention included: at the published widths everything else is below 2 %
of XLA's count. One MAC is 2 FLOPs; the "Gflops" published for DiTs are MACs. Rematerialisation does
not count.

Axes: S solver steps.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from lrdit.model.dit import POSITION_PARTS, DiTShape, layer_shapes
from lrdit.rank.plan import RankPlan, dense_plan
from lrdit.runtime.errors import UserError

FLOPS_PER_MAC = 2

# No gradient flows into the input of these layers.
_FIRST_LAYERS = ("patch_embed", "t_embedder/fc1")


def _factor_macs(shape: DiTShape, plan: RankPlan, bucket: int) -> dict[str, list[int]]:
  """Return each layer's MACs per example, one number for each factor of its kernel."""
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


def forward_macs(shape: DiTShape, plan: RankPlan, bucket: int) -> int:
  """Return the MACs of one example's forward pass at a rank bucket."""
  attention = 2 * shape.depth * shape.num_tokens**2 * shape.hidden_size
  return attention + sum(map(sum, _factor_macs(shape, plan, bucket).values()))


def mean_forward_macs(shape: DiTShape, plan: RankPlan) -> float:
  """Return the MACs of one example's forward pass, averaged over all timesteps."""
  table = [forward_macs(shape, plan, bucket) for bucket in range(plan.num_buckets)]
  return float(np.asarray(table, np.float64)[plan.bucket_of_timestep].mean())


def narrow_shape(shape: DiTShape, plan: RankPlan) -> DiTShape:
  """Return the widest dense model whose MACs are at most those of `plan` at full width.

  Depth and heads stay. The width is a multiple of the heads, and of 4 for the position embedding.

  Raises:
    UserError: even the smallest width has more MACs.
  """
  limit, dense = mean_forward_macs(shape, plan), dense_plan(plan.num_train_timesteps)
  step = math.lcm(POSITION_PARTS, shape.num_heads)
  for width in range(shape.hidden_size, 0, -1):
    narrow = dataclasses.replace(shape, hidden_size=width)
    if width % step == 0 and forward_macs(narrow, dense, 0) <= limit:
      return narrow
  raise UserError(
    f"method=narrow: no multiple of {step} (4 and {shape.num_heads} heads) is a width with at most "
    f"the {limit:,.0f} MACs of the static arm: raise rank.ratio or lower model.num_heads"
  )


def training_macs(shape: DiTShape, plan: RankPlan, groups: Sequence[tuple[int, int]]) -> int:
  """Return the MACs of one training step's forward and backward pass on one device.

  The gradient of either operand costs as much as the product itself. `groups` come from
  `strata.rank_groups`.
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
  num_passes: Int[np.ndarray, " S"],
) -> int:
  """Return the MACs of sampling one image, with the model's passes at every solver step."""
  per_pass = [forward_macs(shape, plan, bucket) for bucket in range(plan.num_buckets)]
  buckets = plan.bucket_of_timestep[timesteps].tolist()
  return sum(n * per_pass[b] for n, b in zip(num_passes.tolist(), buckets, strict=True))


def num_parameters(shape: DiTShape, plan: RankPlan) -> int:
  """Return the number of parameters at the allocated ranks.

  With `plan.at_bucket(bucket)` as the plan, it is the number that the bucket uses.
  """
  count = (shape.num_classes + 1) * shape.hidden_size if shape.num_classes else 0
  for name, (dim_in, dim_out) in layer_shapes(shape).items():
    ranks = plan.by_name.get(name)
    kernel = dim_in * dim_out if ranks is None else ranks.max_rank * (dim_in + dim_out)
    count += kernel + dim_out
  return count


def describe_buckets(shape: DiTShape, plan: RankPlan) -> list[dict[str, int]]:
  """Return the number of "timesteps", "parameters" and "forward_macs" of each rank bucket."""
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
  shape: DiTShape,
  plan: RankPlan,
  timesteps: Int[np.ndarray, " S"],
  num_passes: Int[np.ndarray, " S"],
) -> dict[str, Any]:
  """Return the counts of one model as JSON; "sampling_macs" are those of one image."""
  return {
    "parameters": num_parameters(shape, plan),
    "buckets": describe_buckets(shape, plan),
    "mean_forward_macs": mean_forward_macs(shape, plan),
    "sampling_macs": sampling_macs(shape, plan, timesteps, num_passes),
  }
