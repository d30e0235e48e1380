"""Ranks of each timestep group's gradient, beside three nulls, and the overlap between groups.

The gradient is that of training's weighted squared error with respect to a layer's effective
kernel. For a low-rank layer this is down[:, :r] @ up[:r] at each example's own bucket, so dense and
low-rank models are comparable. Label dropout, flips and the variance term of learn_sigma are left
out. `gradient_batches` defines the conditions.

`analyze_gradients` returns the fields of `analysis/gradients.json`:
  groups: [{t_first, t_last}], both inclusive.
  conditions: {condition: {layers: {layer: {dim_in, dim_out, kind, measures: [group][batch size]
    {measure, normalised: {measure / min(dim_in, dim_out)}}}}, kinds: {kind: [group][batch size]
    {measure: mean of the normalised}}}}.
  overlap: {condition: {layers: {layer: tables}, kinds: {kind: mean of the tables}}}, with None
    for a zero gradient. The tables are:
    left, right: (G, G) mean squared cosines of the principal angles of two groups' subspaces of
      R^dim_in or R^dim_out. Groups share examples and noise.
    left_degrees, right_degrees: (G, G) largest principal angle.
    random_left, random_right: expectation of left and right for random subspaces.
    cross_half: {left, right: (G, G)} between the first half of the examples in group i and the
      second half in group j, so groups share no example.
    split_half: (G,) mean of both diagonals of cross_half, an upper bound for subspaces that are
      estimated from N / 2 examples.
  batch_sizes, subspace_rank, seed: as given.
  examples: N.

Axes: N examples, b batch, H W image, C channels, G timestep groups, m = D_in rows and n = D_out
columns of a kernel, q dimensions of a subspace.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lrdit.analysis import gradient_batches, spectra
from lrdit.analysis.gradient_batches import CONDITIONS
from lrdit.analysis.unit_cache import UnitCache
from lrdit.analysis.weight_spectra import layer_kind, mean_by_kind, mean_tables, normalised
from lrdit.data.source import Source
from lrdit.model.dit import DiT, layer_shapes
from lrdit.model.low_rank import RankSelection
from lrdit.rank.plan import RankPlan, dense_plan
from lrdit.train.loss import Objective

SIDES = ("left", "right")  # the subspaces of R^D_in and of R^D_out


def dense_params(params: Mapping[str, Any], plan: RankPlan, bucket: int) -> dict[str, Any]:
  """Return the parameters of the dense model that is equivalent to one bucket of `plan`."""
  flat = flax.traverse_util.flatten_dict(dict(params), sep="/")
  for name, ranks in plan.layers:
    rank = ranks.active[bucket]
    down, up = flat.pop(f"{name}/down"), flat.pop(f"{name}/up")
    flat[f"{name}/kernel"] = jnp.matmul(down[:, :rank], up[:rank], precision="highest")
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def _make_step(model: DiT) -> Callable:
  """Return a compiled step that adds a batch's gradient to sums, both flat dicts by layer."""

  def loss(kernels: dict[str, Array], others: dict[str, Array], batch: dict[str, Array]) -> Array:
    flat = others | {f"{name}/kernel": kernel for name, kernel in kernels.items()}
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    selection = RankSelection()
    inputs = (batch["x_t"], batch["t"], batch.get("y"), selection)
    prediction = model.apply({"params": params}, *inputs)[..., : model.shape.channels]
    target = batch["target"]
    if "residual_noise" in batch:
      # This target leaves noise of the residual's root mean square in place of each residual.
      output = jax.lax.stop_gradient(prediction)
      mean_square = jnp.square(output - target).mean(axis=(1, 2, 3), keepdims=True)
      target = output - jnp.sqrt(mean_square) * batch["residual_noise"]
    return jnp.dot(batch["weight"], jnp.square(prediction - target).mean(axis=(1, 2, 3)))

  def step(sums, kernels, others, batch):
    # An accelerator's default precision would fill the spectra's tails with rounding errors.
    with jax.default_matmul_precision("highest"):
      return jax.tree.map(jnp.add, sums, jax.grad(loss)(kernels, others, batch))

  return jax.jit(step, donate_argnums=0)


class KernelGradients:
  """Sums of examples' gradients with respect to the effective kernels.

  Sums are float32 too: N additions round about as much as one example's backward pass.
  """

  def __init__(self, model: DiT, params: Any, microbatch: int):
    """Put the parameters on the device, for passes over `microbatch` examples at once."""
    self.shapes = layer_shapes(model.shape)
    self._plan, self._microbatch = model.plan, microbatch
    self._params = jax.device_put(params)
    # A scan would copy parameters and gradients into stacks of blocks.
    dense = model.clone(
      plan=dense_plan(model.plan.num_train_timesteps), dtype=jnp.float32, scan_blocks=False
    )
    self._step = _make_step(dense)

  def zeros(self) -> dict[str, Float[Array, "_ _"]]:
    """Return sums of zero for each layer."""
    return {name: jnp.zeros(dims, jnp.float32) for name, dims in self.shapes.items()}

  def add(
    self,
    sums: dict[str, Float[Array, "_ _"]],
    batch: dict[str, np.ndarray],
    rows: Int[np.ndarray, " b"],
  ) -> dict[str, Float[Array, "_ _"]]:
    """Add the summed losses' gradient for some rows of a `condition_batch`; `sums` is donated."""
    buckets = self._plan.bucket_of_timestep[batch["t"][rows]]
    for bucket in np.unique(buckets):
      sums = self._add_bucket(sums, batch, rows[buckets == bucket], int(bucket))
    return sums

  def _add_bucket(self, sums, batch, rows, bucket):
    """Add rows of one bucket, whose kernels are freed on return."""
    params = dense_params(self._params, self._plan, bucket)
    others = flax.traverse_util.flatten_dict(params, sep="/")
    kernels = {name: others.pop(f"{name}/kernel") for name in self.shapes}
    for start in range(0, len(rows), self._microbatch):
      own = rows[start : start + self._microbatch]
      # Pad with rows of weight 0, so that one program serves every size.
      padded = np.concatenate([own, np.repeat(own[:1], self._microbatch - len(own))])
      part = {name: values[padded] for name, values in batch.items()}
      part["weight"][len(own) :] = 0
      sums = self._step(sums, kernels, others, part)
    return jax.block_until_ready(sums)


def leading_subspaces(
  matrix: Float[np.ndarray, "m n"], rank: int
) -> tuple[Float[np.ndarray, "m q"], Float[np.ndarray, "n q"]]:
  """Return the leading left and right singular vectors as float64 columns, largest first.

  q is `rank`, or the matrix's rank in float32 if that is lower.
  """
  matrix = np.asarray(matrix, np.float64)
  if matrix.shape[0] > matrix.shape[1]:
    right, left = leading_subspaces(matrix.T, rank)
    return left, right
  sigma, vectors = spectra.left_singular_vectors(matrix)
  is_resolved = sigma > sigma[0] * max(matrix.shape) * np.finfo(np.float32).eps
  left = vectors[:, : min(rank, int(is_resolved.sum()))]
  # QR takes the columns in order, so it cleans small directions of larger ones.
  right, _ = np.linalg.qr(matrix.T @ left)
  return left, right


def measure_unit(
  gradients: KernelGradients,
  batch: dict[str, np.ndarray],
  batch_sizes: Sequence[int],
  subspace_rank: int,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Measure the gradients of a group's first b examples, and the subspaces of all N.

  One pass over the batch measures the growing sums, which serve as means because no measure depends
  on the scale. The last of the `batch_sizes` is N >= 2.

  Returns:
    record: {layer: [`spectra.measures` at each batch size]}.
    arrays: float32 bases (m, q) and (n, q) by "PART/SIDE/LAYER". PART is "all" examples, or their
      "first" or "second" half; SIDE is one of `SIDES`.
  """
  half = batch_sizes[-1] // 2
  record: dict[str, Any] = {name: [] for name in gradients.shapes}
  first: Mapping[str, Any] = dict.fromkeys(gradients.shapes, 0)
  sums = gradients.zeros()
  for start, end in itertools.pairwise([0, *sorted({*batch_sizes, half})]):
    sums = gradients.add(sums, batch, np.arange(start, end))
    if end in batch_sizes:
      for name, measured in record.items():
        whole = np.asarray(sums[name], np.float64) + np.asarray(first[name])
        measured.append(spectra.measures(spectra.singular_values(whole)))
    if end == half:
      first, sums = sums, gradients.zeros()
  arrays = {}
  for name, values in sums.items():
    halves = np.asarray(first[name], np.float64), np.asarray(values, np.float64)
    parts = {"all": sum(halves), "first": halves[0], "second": halves[1]}
    for part, matrix in parts.items():
      for side, basis in zip(SIDES, leading_subspaces(matrix, subspace_rank), strict=True):
        arrays[f"{part}/{side}/{name}"] = basis.astype(np.float32)
  return record, arrays


def overlap(
  a: Float[np.ndarray, "m qa"], b: Float[np.ndarray, "m qb"]
) -> tuple[float | None, float | None]:
  """Return the mean squared cosine of the principal angles and the largest angle in degrees.

  Columns are orthonormal, leading ones first. The longer basis is cut to the shorter one's length,
  and both results are None if that is 0.
  """
  size = min(a.shape[1], b.shape[1])
  if size == 0:
    return None, None
  cosines = spectra.principal_angle_cosines(a[:, :size], b[:, :size])
  return float(np.square(cosines).mean()), float(np.degrees(np.arccos(cosines.min())))


def _layer_overlap(bases: Sequence[Mapping[str, np.ndarray]], name: str) -> dict[str, Any]:
  groups, tables, halves = range(len(bases)), {}, {}

  def compare(part_i: str, part_j: str, side: str) -> list[list[tuple]]:
    """Return overlaps between a part of group i's gradient and a part of group j's."""
    keys = [f"{part}/{side}/{name}" for part in (part_i, part_j)]
    return [[overlap(bases[i][keys[0]], bases[j][keys[1]]) for j in groups] for i in groups]

  for side in SIDES:
    pairs = compare("all", "all", side)
    tables[side] = [[share for share, _ in row] for row in pairs]
    tables[f"{side}_degrees"] = [[degrees for _, degrees in row] for row in pairs]
    halves[side] = [[share for share, _ in row] for row in compare("first", "second", side)]
  split_half = [mean_tables([halves[side][i][i] for side in SIDES]) for i in groups]
  return tables | {"split_half": split_half, "cross_half": halves}


def _summarize(
  shapes: Mapping[str, tuple[int, int]],
  records: Sequence[Mapping[str, Any]],
  bases: Sequence[Mapping[str, np.ndarray]],
  subspace_rank: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Return a condition's ranks and overlaps, both by layer and kind, from its groups' units."""
  ranks, shares, overlaps = {}, {}, {}
  for name, dims in shapes.items():
    shares[name] = [[normalised(m, *dims) for m in record[name]] for record in records]
    measured = [
      [m | {"normalised": share} for m, share in zip(record[name], row, strict=True)]
      for record, row in zip(records, shares[name], strict=True)
    ]
    kind = layer_kind(name)
    ranks[name] = {"dim_in": dims[0], "dim_out": dims[1], "kind": kind, "measures": measured}
    rank = min(subspace_rank, *dims)
    random = {f"random_{side}": rank / dim for side, dim in zip(SIDES, dims, strict=True)}
    overlaps[name] = _layer_overlap(bases, name) | random
  by_rank = {"layers": ranks, "kinds": mean_by_kind(shares)}
  return by_rank, {"kinds": mean_by_kind(overlaps), "layers": overlaps}


def analyze_gradients(
  objective: Objective,
  params: Any,
  source: Source,
  *,
  boundaries: Sequence[int],
  batch_sizes: Sequence[int],
  subspace_rank: int,
  microbatch: int,
  seed: int,
  cache: UnitCache,
) -> dict[str, Any]:
  """Return the ranks of every group's gradient and the overlaps of their subspaces.

  This runs on one device, which holds the parameters, one bucket's dense parameters, and the summed
  gradients of two halves. Measures are computed on the host in float64, layer by layer.

  Args:
    objective: only its model, diffusion and loss weighting are used.
    params, source: the model's parameters and the training split.
    boundaries: (G + 1,) ascending timesteps; group i is [boundaries[i], boundaries[i + 1]).
    batch_sizes: ascending; the last is N >= 2, and each b uses the first b examples.
    subspace_rank: number of leading singular vectors to compare.
    microbatch: examples in one pass.
    seed: of the examples, noise and timesteps.
    cache: holds a unit for each condition and group.

  Raises:
    UserError: the source has fewer than N examples.
  """
  num_examples, num_classes = batch_sizes[-1], objective.model.shape.num_classes
  examples = gradient_batches.sample_examples(source, num_examples, num_classes, seed)
  gradients = KernelGradients(objective.model, params, microbatch)
  sampled = gradient_batches.group_timesteps(boundaries, num_examples, seed)
  t = dict.fromkeys(CONDITIONS, sampled)
  t["shuffled"] = gradient_batches.shuffle_timesteps(sampled, seed)
  units = {c: [f"{c}/{group}" for group in range(len(sampled))] for c in CONDITIONS}

  def make(unit: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    condition, group = unit.split("/")
    of_group = t[condition][int(group)]
    batch = gradient_batches.condition_batch(condition, objective, examples, of_group)
    return measure_unit(gradients, batch, batch_sizes, subspace_rank)

  cache.fill(list(itertools.chain(*units.values())), "gradient", make)
  conditions, overlaps = {}, {}
  for condition, names in units.items():
    records, bases = zip(*map(cache.load, names), strict=True)
    found = _summarize(gradients.shapes, records, bases, subspace_rank)
    conditions[condition], overlaps[condition] = found
  return {
    "groups": [{"t_first": a, "t_last": b - 1} for a, b in itertools.pairwise(boundaries)],
    "batch_sizes": list(batch_sizes),
    "subspace_rank": subspace_rank,
    "examples": num_examples,
    "seed": seed,
    "conditions": conditions,
    "overlap": overlaps,
  }
