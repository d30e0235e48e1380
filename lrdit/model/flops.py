"""How many multiply-accumulates a DiT takes, counted from its shapes alone.

Only matrix products are counted, attention's included: at the published widths
everything else is below 2 % of what XLA counts (`tests/flops_test.py` compares).
One MAC is a multiplication and an addition, so 2 FLOPs; the "Gflops" that DiTs
are published with are MACs. Rematerialisation would be executed on top and is
not counted: these are the products the mathematics needs.

Axes: B batch, N tokens, D width, R rank.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from lrdit.model.dit import DiTShape, layer_shapes
from lrdit.rank.plan import RankPlan

FLOPS_PER_MAC = 2

# Layers whose input does not depend on any parameter: no gradient flows into it.
_FIRST_LAYERS = ("patch_embed", "t_embedder/fc1")


def _rows(shape: DiTShape, name: str) -> int:
  """Vectors per example that the layer `name` is applied to: N, or 1 on conditioning."""
  on_conditioning = name.startswith("t_embedder/") or name.endswith("/adaln")
  return 1 if on_conditioning else shape.num_tokens


def _attention_macs(shape: DiTShape) -> dict[str, int]:
  """MACs per example of each block's two products of queries, keys and values."""
  product = shape.num_tokens**2 * shape.hidden_size
  return {
    f"blocks_{i}/attn/{name}": product for i in range(shape.depth) for name in ("scores", "values")
  }


def _factor_macs(shape: DiTShape, plan: RankPlan, bucket: int) -> dict[str, list[int]]:
  """MACs per example of each factor of each layer's kernel, in order of use.

  A dense kernel is one factor, a low-rank one two, cut to the bucket's rank.
  """
  macs = {}
  for name, (dim_in, dim_out) in layer_shapes(shape).items():
    rows, ranks = _rows(shape, name), plan.by_name.get(name)
    if ranks is None:
      macs[name] = [rows * dim_in * dim_out]
    else:
      rank = ranks.active[bucket]
      macs[name] = [rows * dim_in * rank, rows * rank * dim_out]
  return macs


def layer_forward_macs(shape: DiTShape, plan: RankPlan, bucket: int) -> dict[str, int]:
  """MACs of one example's forward pass, by layer.

  Args:
    shape: sizes of the model.
    plan: its rank plan.
    bucket: the rank bucket the example is computed at.

  Returns:
    MACs by the names of `dit.layer_shapes`, and of each block's attention
    products as "blocks_0/attn/scores" and "blocks_0/attn/values".
  """
  layers = {name: sum(macs) for name, macs in _factor_macs(shape, plan, bucket).items()}
  return layers | _attention_macs(shape)


def layer_training_macs(shape: DiTShape, plan: RankPlan, bucket: int) -> dict[str, int]:
  """MACs of one example's forward and backward pass, by layer.

  Each product costs its own size once more for the gradient of either operand;
  that of the model's inputs is not computed.

  Args, returns: as in `layer_forward_macs`.
  """
  layers = {}
  for name, macs in _factor_macs(shape, plan, bucket).items():
    layers[name] = 3 * sum(macs) - (macs[0] if name in _FIRST_LAYERS else 0)
  return layers | {name: 3 * macs for name, macs in _attention_macs(shape).items()}


def forward_macs(shape: DiTShape, plan: RankPlan, bucket: int) -> int:
  """MACs of one example's forward pass at a rank bucket."""
  return sum(layer_forward_macs(shape, plan, bucket).values())


def mean_forward_macs(shape: DiTShape, plan: RankPlan) -> float:
  """MACs of one example's forward pass, the mean over all timesteps."""
  table = [forward_macs(shape, plan, bucket) for bucket in range(plan.num_buckets)]
  return float(np.asarray(table, np.float64)[plan.bucket_of_timestep].mean())


def training_macs(shape: DiTShape, plan: RankPlan, groups: Sequence[tuple[int, int]]) -> int:
  """MACs of one training step's forward and backward pass.

  Args:
    shape: sizes of the model.
    plan: its rank plan.
    groups: (examples, rank bucket) as `timesteps.rank_groups` gives for one
      device; a masked batch is one group at the top bucket.

  Returns:
    MACs of that device's share of the batch.
  """
  return sum(
    size * sum(layer_training_macs(shape, plan, bucket).values()) for size, bucket in groups
  )


def sampling_macs(
  shape: DiTShape,
  plan: RankPlan,
  timesteps: Int[np.ndarray, " S"],
  batch_size: int,
  guidance_scale: float,
) -> int:
  """MACs of drawing one batch of samples.

  Args:
    shape: sizes of the model.
    plan: its rank plan.
    timesteps: (S,) the solver's timesteps.
    batch_size: images drawn, B.
    guidance_scale: at any but 1 a model with classes gives two outputs per image and step.
  """
  passes = 2 if guidance_scale != 1 and shape.num_classes else 1
  steps = np.bincount(plan.bucket_of_timestep[timesteps], minlength=plan.num_buckets)
  per_example = sum(
    int(count) * forward_macs(shape, plan, bucket) for bucket, count in enumerate(steps)
  )
  return batch_size * passes * per_example


def parameter_counts(shape: DiTShape, plan: RankPlan) -> Mapping[str, int]:
  """Parameters by layer, at the allocated ranks.

  `plan.at_bucket(bucket)` as the plan counts those that a bucket uses. The
  position embedding is fixed and none of them.

  Returns:
    counts by the names of `dit.layer_shapes`, biases included, and of the label
    table as "y_embedder" where there are classes.
  """
  counts = {}
  for name, (dim_in, dim_out) in layer_shapes(shape).items():
    ranks = plan.by_name.get(name)
    kernel = dim_in * dim_out if ranks is None else ranks.max_rank * (dim_in + dim_out)
    counts[name] = kernel + dim_out
  if shape.num_classes:
    counts["y_embedder"] = (shape.num_classes + 1) * shape.hidden_size
  return counts


def num_parameters(shape: DiTShape, plan: RankPlan) -> int:
  """All parameters, at the allocated ranks."""
  return sum(parameter_counts(shape, plan).values())


def describe_buckets(shape: DiTShape, plan: RankPlan) -> list[dict[str, int]]:
  """What each rank bucket takes, as JSON.

  Returns:
    of each bucket: the number of "timesteps" at it, the "parameters" it uses and the
    "forward_macs" of one example.
  """
  timesteps = np.bincount(plan.bucket_of_timestep, minlength=plan.num_buckets)
  return [
    {
      "timesteps": int(count),
      "parameters": num_parameters(shape, plan.at_bucket(bucket)),
      "forward_macs": forward_macs(shape, plan, bucket),
    }
    for bucket, count in enumerate(timesteps)
  ]
