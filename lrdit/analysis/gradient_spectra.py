"""Ranks of the gradient of each timestep group, beside three nulls, and how groups overlap.

The gradient is of the training objective's weighted squared error with respect to a
layer's effective kernel: of a low-rank layer the product down[:, :r] @ up[:r] at each
example's own bucket, so that dense and low-rank models are measured by the same
thing. Left out are label dropout, flips and, with learn_sigma, the variance's bound.

All groups and conditions share N examples, their order and their noise eps; they
differ in the timesteps, and in the last two conditions in the target:

data: example j's timestep is drawn from one of N equal parts of the group.
shuffled: each example's G timesteps are dealt out to the groups anew, so a group's
  are spread over [0, T). What still differs between groups is sampling noise.
noise: as data, but the target is noise that is independent of the input. In a trained
  model the noise averages out over the batch, and what is left is mostly the gradient
  towards an output of zero: it still knows what the model has learned.
residual: as data, but each example's error, output minus target, is replaced by normal noise
  of its root mean square as standard deviation. What rank is left comes of the batch size,
  the activations and the architecture alone.

Axes: N examples, b batch, H W image, C channels, G timestep groups, m = D_in rows and
n = D_out columns of a kernel, q dimensions of a subspace.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lrdit.analysis import spectra
from lrdit.analysis.unit_cache import UnitCache
from lrdit.analysis.weight_spectra import layer_kind
from lrdit.data import pipeline
from lrdit.data.source import Source
from lrdit.diffusion import process
from lrdit.model.dit import DiT, layer_shapes
from lrdit.model.low_rank import uniform_selection
from lrdit.rank.plan import RankPlan, dense_plan
from lrdit.runtime import progress
from lrdit.runtime.errors import UserError
from lrdit.train.loss import Objective

CONDITIONS = ("data", "shuffled", "noise", "residual")
SIDES = ("left", "right")  # the subspaces of R^D_in and of R^D_out

# Keep the draws apart from each other.
_IMAGE_STREAM, _TIMESTEP_STREAM, _SHUFFLE_STREAM = range(3)


@dataclasses.dataclass(frozen=True)
class Examples:
  """What all groups and conditions share.

  Attributes:
    x_0: (N, H, W, C) float32; of latents, drawn from their distribution once.
    y: (N,) int32 labels, or None for an unconditional model.
    eps: (N, H, W, C) float32 standard normal.
    target_noise: (N, H, W, C) float32 standard normal, for "noise" and "residual".
  """

  x_0: Float[np.ndarray, "N H W C"]
  y: Int[np.ndarray, " N"] | None
  eps: Float[np.ndarray, "N H W C"]
  target_noise: Float[np.ndarray, "N H W C"]


def draw_examples(source: Source, num_examples: int, num_classes: int, seed: int) -> Examples:
  """The first examples of a shuffled order, with their noise.

  The first b are the same whatever `num_examples`.

  Args:
    source: the training split.
    num_examples: N.
    num_classes: of the model; 0 if it is unconditional.
    seed: of order and noise.

  Raises:
    UserError: the source has fewer examples.
  """
  if num_examples > len(source):
    raise UserError(
      f"gradients of batches of {num_examples} need as many examples, and the training split has "
      f"{len(source)}: use smaller batch sizes"
    )
  index = pipeline.example_index(seed, np.arange(num_examples), len(source))
  batch = source.gather(index, np.zeros(num_examples, bool))
  rng = np.random.default_rng([seed, _IMAGE_STREAM])
  shape = (num_examples, 3, *batch["image"].shape[1:])
  eps, target_noise, posterior_noise = np.moveaxis(rng.standard_normal(shape, np.float32), 1, 0)
  x_0 = batch["image"]
  if "std" in batch:
    x_0 = x_0 + batch["std"] * posterior_noise
  return Examples(x_0, batch["label"] if num_classes else None, eps, target_noise)


def spread_order(num_examples: int) -> Int[np.ndarray, " N"]:
  """A permutation of [0, N) of which every beginning is spread over [0, N).

  The ranks of van der Corput's sequence in base 2; bit reversal where N is a power of 2.
  """
  numbers, reversed_bits = np.arange(num_examples), np.zeros(num_examples)
  for place in range(num_examples.bit_length()):
    reversed_bits += (numbers >> place & 1) / 2 ** (place + 1)
  return np.argsort(np.argsort(reversed_bits))


def group_timesteps(
  boundaries: Sequence[int], num_examples: int, seed: int
) -> Int[np.ndarray, "G N"]:
  """Each example's timestep in each group, stratified as training's are.

  Args:
    boundaries: (G + 1,) rising; group i is [boundaries[i], boundaries[i + 1]).
    num_examples: N.
    seed: of the draws within the strata.

  Returns:
    (G, N) int64; the first b examples' are spread over the group for every b.
  """
  edges = np.asarray(boundaries, np.int64)[:, None]
  uniform = np.random.default_rng([seed, _TIMESTEP_STREAM]).random((len(edges) - 1, num_examples))
  share = (spread_order(num_examples) + uniform) / num_examples
  t = edges[:-1] + (share * np.diff(edges, axis=0)).astype(np.int64)
  return np.minimum(t, edges[1:] - 1)


def shuffle_timesteps(t: Int[np.ndarray, "G N"], seed: int) -> Int[np.ndarray, "G N"]:
  """The same pairs of example and timestep, dealt out to the groups at random.

  Each group gets every example once, so that groups differ in their timesteps alone.
  """
  return np.random.default_rng([seed, _SHUFFLE_STREAM]).permuted(t, axis=0)


def _at(values: Float[np.ndarray, " T"], t: Int[np.ndarray, " N"]) -> Float[np.ndarray, "N 1 1 1"]:
  return values.astype(np.float32)[t][:, None, None, None]


def regression(
  objective: Objective, examples: Examples, t: Int[np.ndarray, " N"]
) -> dict[str, np.ndarray]:
  """What the model is given and is to predict, as in `loss.example_losses`.

  Returns:
    "x_t" and "target" (N, H, W, C) float32, "t" (N,) int32, "weight" (N,) float32 of the
    squared errors and, of a conditional model, "y" (N,) int32.
  """
  alphas_cumprod = objective.alphas_cumprod
  signal, noise = _at(alphas_cumprod**0.5, t), _at((1 - alphas_cumprod) ** 0.5, t)
  target = process.training_target(objective.prediction, examples.x_0, examples.eps, signal, noise)
  weights = process.loss_weights(
    objective.loss_weighting, objective.prediction, alphas_cumprod, objective.min_snr_gamma
  )
  batch = {
    "x_t": process.q_sample(examples.x_0, examples.eps, signal, noise),
    "t": t.astype(np.int32),
    "target": target,
    "weight": weights.astype(np.float32)[t],
  }
  return batch if examples.y is None else batch | {"y": examples.y}


def noise_target(
  objective: Objective, examples: Examples, t: Int[np.ndarray, " N"]
) -> Float[np.ndarray, "N H W C"]:
  """Noise of the variance that the true target has at each timestep.

  An example's is the same in all groups, as its eps is.
  """
  alphas_cumprod = objective.alphas_cumprod
  signal, noise = _at(alphas_cumprod**0.5, t), _at((1 - alphas_cumprod) ** 0.5, t)
  spread, zero, one = np.float32(examples.x_0.std()), np.float32(0), np.float32(1)
  # The target is linear in x_0 and eps, which are independent: their variances add up.
  of_x_0, of_eps = (
    process.training_target(objective.prediction, x_0, eps, signal, noise)
    for x_0, eps in ((spread, zero), (zero, one))
  )
  return examples.target_noise * np.hypot(of_x_0, of_eps)


def condition_batch(
  condition: str, objective: Objective, examples: Examples, t: Int[np.ndarray, "G N"], group: int
) -> dict[str, np.ndarray]:
  """`regression` of a group under a condition; with "residual_noise" for the last one.

  Args:
    condition: one of `CONDITIONS`.
    objective, examples: as in `regression`.
    t: (G, N) from `group_timesteps`, or from `shuffle_timesteps` for "shuffled".
    group: in [0, G).
  """
  batch = regression(objective, examples, t[group])
  if condition == "noise":
    batch["target"] = noise_target(objective, examples, t[group])
  if condition == "residual":
    batch["residual_noise"] = examples.target_noise
  return batch


def dense_params(params: Mapping[str, Any], plan: RankPlan, bucket: int) -> dict[str, Any]:
  """The parameters of the dense model that computes what a bucket does.

  Args:
    params: parameters of a model built with `plan`.
    plan: the rank plan.
    bucket: rank bucket.

  Returns:
    A new tree whose kernels are down[:, :r] @ up[:r]; other arrays are shared.
  """
  flat = flax.traverse_util.flatten_dict(dict(params), sep="/")
  for name, ranks in plan.layers:
    rank = ranks.active[bucket]
    down, up = flat.pop(f"{name}/down"), flat.pop(f"{name}/up")
    flat[f"{name}/kernel"] = jnp.matmul(down[:, :rank], up[:rank], precision="highest")
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def _with_noise_for_residual(
  prediction: Float[Array, "b H W C"],
  target: Float[Array, "b H W C"],
  noise: Float[Array, "b H W C"],
) -> Float[Array, "b H W C"]:
  """The target that leaves noise, as large as expected, in place of each residual."""
  prediction = jax.lax.stop_gradient(prediction)
  mean_square = jnp.square(prediction - target).mean(axis=(1, 2, 3), keepdims=True)
  return prediction - jnp.sqrt(mean_square) * noise


def _make_step(model: DiT) -> Callable:
  """The compiled (sums, kernels, other parameters, batch) -> sums plus the batch's gradient.

  Kernels, sums and gradients are flat dicts by the layers' names.
  """

  def loss(kernels: dict[str, Array], others: dict[str, Array], batch: dict[str, Array]) -> Array:
    flat = others | {f"{name}/kernel": kernel for name, kernel in kernels.items()}
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    selection = uniform_selection(len(batch["t"]))
    output = model.apply({"params": params}, batch["x_t"], batch["t"], batch.get("y"), selection)
    prediction, target = output[..., : model.shape.channels], batch["target"]
    if "residual_noise" in batch:
      target = _with_noise_for_residual(prediction, target, batch["residual_noise"])
    return jnp.dot(batch["weight"], jnp.square(prediction - target).mean(axis=(1, 2, 3)))

  def step(sums, kernels, others, batch):
    # Products of lower precision, an accelerator's default, would fill up the spectra's tails.
    with jax.default_matmul_precision("highest"):
      return jax.tree.map(jnp.add, sums, jax.grad(loss)(kernels, others, batch))

  return jax.jit(step, donate_argnums=0)


class KernelGradients:
  """Sums of examples' gradients with respect to the effective kernels.

  In float32 throughout, sums as well: what N additions round is of the order of what
  one example's backward pass in float32 has rounded already.
  """

  def __init__(self, model: DiT, params: Any, microbatch: int):
    """Compiles nothing yet.

    Args:
      model: with its rank plan.
      params: its parameters, put on the device unless they are there.
      microbatch: examples in flight.
    """
    self.shapes = layer_shapes(model.shape)
    self._plan, self._microbatch = model.plan, microbatch
    self._params = jax.device_put(params)
    # Not scanned, as stacks of blocks would be copies of the parameters and gradients.
    dense = model.clone(
      plan=dense_plan(model.plan.num_train_timesteps), dtype=jnp.float32, scan_blocks=False
    )
    self._step = _make_step(dense)

  def zeros(self) -> dict[str, Float[Array, "_ _"]]:
    """Sums of no example."""
    return {name: jnp.zeros(dims, jnp.float32) for name, dims in self.shapes.items()}

  def add(
    self,
    sums: dict[str, Float[Array, "_ _"]],
    batch: dict[str, np.ndarray],
    rows: Int[np.ndarray, " b"],
  ) -> dict[str, Float[Array, "_ _"]]:
    """Adds the gradient of the summed, not averaged, losses of some rows of a batch.

    Args:
      sums: by layer; given up.
      batch: from `condition_batch`.
      rows: (b,) in [0, N).
    """
    buckets = self._plan.bucket_of_timestep[batch["t"][rows]]
    for bucket in np.unique(buckets):
      sums = self._add_bucket(sums, batch, rows[buckets == bucket], int(bucket))
    return sums

  def _add_bucket(self, sums, batch, rows, bucket):
    """Adds rows of one bucket; its kernels are gone when the next one's are made."""
    params = dense_params(self._params, self._plan, bucket)
    others = flax.traverse_util.flatten_dict(params, sep="/")
    kernels = {name: others.pop(f"{name}/kernel") for name in self.shapes}
    for start in range(0, len(rows), self._microbatch):
      own = rows[start : start + self._microbatch]
      # Padded with rows of weight 0, so that one program serves them all.
      padded = np.concatenate([own, np.repeat(own[:1], self._microbatch - len(own))])
      part = {name: values[padded] for name, values in batch.items()}
      part["weight"][len(own) :] = 0
      sums = self._step(sums, kernels, others, part)
    return jax.block_until_ready(sums)


def leading_subspaces(
  matrix: Float[np.ndarray, "m n"], rank: int
) -> tuple[Float[np.ndarray, "m q"], Float[np.ndarray, "n q"]]:
  """Leading left and right singular vectors, as far as float32 resolves them.

  Args:
    matrix: (m, n).
    rank: how many.

  Returns:
    Orthonormal columns in float64, in descending order of their singular values. q is
    `rank`, or fewer where the matrix has no more than that in float32.
  """
  matrix = np.asarray(matrix, np.float64)
  if matrix.shape[0] > matrix.shape[1]:
    right, left = leading_subspaces(matrix.T, rank)
    return left, right
  sigma, vectors = spectra.left_singular_vectors(matrix)
  is_resolved = sigma > sigma[0] * max(matrix.shape) * np.finfo(np.float32).eps
  left = vectors[:, : min(rank, int(is_resolved.sum()))]
  # Triangular in the order of the columns: a small direction loses what it has of larger ones.
  right, _ = np.linalg.qr(matrix.T @ left)
  return left, right


def measure_unit(
  gradients: KernelGradients,
  batch: dict[str, np.ndarray],
  batch_sizes: Sequence[int],
  subspace_rank: int,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Measures of the gradients of a group's first b examples, and the subspaces of all N.

  The batch is gone through once, and its gradient measured as it grows. A gradient of sums
  stands for one of means: no measure depends on the scale.

  Args:
    gradients: of the model.
    batch: from `condition_batch`.
    batch_sizes: rising; the last is N >= 2.
    subspace_rank: r.

  Returns:
    record: {layer: [of each batch size: `spectra.measures`]}.
    arrays: float32 by "all/left/LAYER": of "all", "first" and "second" half, the bases
      (m, q) "left" and (n, q) "right".
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
  """How far two subspaces are the same.

  Args:
    a, b: orthonormal columns, leading ones first; of the longer, as many as the shorter has.

  Returns:
    (mean squared cosine of the principal angles, largest of these in degrees); None each
    where one has no column.
  """
  size = min(a.shape[1], b.shape[1])
  if size == 0:
    return None, None
  cosines = spectra.principal_angle_cosines(a[:, :size], b[:, :size])
  return float(np.square(cosines).mean()), float(np.degrees(np.arccos(cosines.min())))


def _mean(values: Iterable[float | None]) -> float | None:
  known = [value for value in values if value is not None]
  return float(np.mean(known)) if known else None


def _mean_tables(tables: Sequence[Any]) -> Any:
  """Mean over equally nested lists and dicts of numbers, or None where there is no number."""
  if isinstance(tables[0], dict):
    return {key: _mean_tables([table[key] for table in tables]) for key in tables[0]}
  if isinstance(tables[0], list):
    return [_mean_tables(rows) for rows in zip(*tables, strict=True)]
  return _mean(tables)


def _layer_overlap(bases: Sequence[Mapping[str, np.ndarray]], name: str) -> dict[str, Any]:
  """The overlaps of a layer's subspaces, by side; see `analyse_gradients`."""
  groups, tables = range(len(bases)), {}

  def compare(part_i: str, part_j: str, side: str) -> list[list[tuple]]:
    """Of each pair of groups, the overlap of one part of i's gradient and one of j's."""
    keys = [f"{part}/{side}/{name}" for part in (part_i, part_j)]
    return [[overlap(bases[i][keys[0]], bases[j][keys[1]]) for j in groups] for i in groups]

  halves = {}
  for side in SIDES:
    pairs = compare("all", "all", side)
    tables[side] = [[share for share, _ in row] for row in pairs]
    tables[f"{side}_degrees"] = [[degrees for _, degrees in row] for row in pairs]
    halves[side] = [[share for share, _ in row] for row in compare("first", "second", side)]
  split_half = [_mean(halves[side][i][i] for side in SIDES) for i in groups]
  return tables | {"split_half": split_half, "cross_half": halves}


def _with_normalised(measured: dict[str, float], dims: tuple[int, int]) -> dict[str, Any]:
  return measured | {"normalised": {key: value / min(dims) for key, value in measured.items()}}


def _by_kind(layers: Mapping[str, Any]) -> dict[str, Any]:
  """Mean over the layers of each kind."""
  kinds = dict.fromkeys(layer_kind(name) for name in layers)
  return {
    kind: _mean_tables([table for name, table in layers.items() if layer_kind(name) == kind])
    for kind in kinds
  }


def _summarise_ranks(
  shapes: Mapping[str, tuple[int, int]], records: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
  """A condition's measures by layer and kind, from the records of its groups."""
  layers = {}
  for name, dims in shapes.items():
    measured = [[_with_normalised(m, dims) for m in record[name]] for record in records]
    kind = layer_kind(name)
    layers[name] = {"dim_in": dims[0], "dim_out": dims[1], "kind": kind, "measures": measured}
  normalised = {
    name: [[m["normalised"] for m in sizes] for sizes in layer["measures"]]
    for name, layer in layers.items()
  }
  return {"layers": layers, "kinds": _by_kind(normalised)}


def _summarise_overlap(
  shapes: Mapping[str, tuple[int, int]],
  bases: Sequence[Mapping[str, np.ndarray]],
  subspace_rank: int,
) -> dict[str, Any]:
  """A condition's overlaps by layer and kind, from the arrays of its groups."""
  layers = {}
  for name, dims in shapes.items():
    rank = min(subspace_rank, *dims)
    random = {f"random_{side}": rank / dim for side, dim in zip(SIDES, dims, strict=True)}
    layers[name] = _layer_overlap(bases, name) | random
  return {"kinds": _by_kind(layers), "layers": layers}


def _unit(condition: str, group: int) -> str:
  return f"{condition}/{group}"


def _measure_missing(
  objective: Objective,
  params: Any,
  examples: Examples,
  t: Mapping[str, Int[np.ndarray, "G N"]],
  batch_sizes: Sequence[int],
  subspace_rank: int,
  microbatch: int,
  parts: UnitCache,
) -> None:
  """Makes the units that are not there yet."""
  gradients = KernelGradients(objective.model, params, microbatch)
  units = [(condition, group) for condition in CONDITIONS for group in range(len(t[condition]))]
  missing = [unit for unit in units if parts.load(_unit(*unit)) is None]
  with progress.make_bar(len(units), len(units) - len(missing), "gradient") as bar:
    for condition, group in missing:
      batch = condition_batch(condition, objective, examples, t[condition], group)
      measured = measure_unit(gradients, batch, batch_sizes, subspace_rank)
      parts.save(_unit(condition, group), *measured)
      bar.update()


def analyse_gradients(
  objective: Objective,
  params: Any,
  source: Source,
  *,
  boundaries: Sequence[int],
  batch_sizes: Sequence[int],
  subspace_rank: int,
  microbatch: int,
  seed: int,
  parts: UnitCache,
) -> dict[str, Any]:
  """Ranks of every group's gradient and overlaps of their subspaces, in all conditions.

  On one device. Measures are on the host in float64, layer by layer. At one time there are
  the parameters, a bucket's dense ones, and the summed gradients of two halves.

  Args:
    objective: the model, its diffusion and the loss' weighting; nothing else of it is used.
    params: of the model; numpy arrays may be copied, jax's are not.
    source: the training split.
    boundaries: (G + 1,) rising timesteps; group i is [boundaries[i], boundaries[i + 1]).
    batch_sizes: rising, the last N at least 2: each b's gradient is of the first b examples.
    subspace_rank: r, leading singular vectors of the gradient of all N that are compared.
    microbatch: examples in flight.
    seed: of the examples, noise and timesteps.
    parts: one unit a condition and group.

  Returns:
    As JSON, where measures are as named by `spectra.MEASURES`:
    groups: [{t_first, t_last}], the last one included.
    conditions: {condition: {layers: {layer: {dim_in, dim_out, kind, measures: [group][batch
      size] {measure, normalised: {measure / min(dim_in, dim_out)}}}}, kinds: {kind: [group]
      [batch size] {measure: mean of the normalised}}}}.
    overlap: {condition: {layers: {layer: tables}, kinds: {kind: mean of the tables}}}, with
      left, right: (G, G) mean squared cosines of the principal angles of two groups'
        subspaces of R^dim_in or R^dim_out. Groups share examples and noise.
      left_degrees, right_degrees: (G, G), the largest principal angle.
      random_left, random_right: what left and right are of random subspaces.
      cross_half: {left, right: (G, G)} between group i's first half of the examples and
        group j's second: what overlap is left where groups share no example.
      split_half: (G,) mean of both diagonals of cross_half: the most that it can reach for
        subspaces that are known from N / 2 examples.
      None where a gradient is zero.
    batch_sizes, subspace_rank, seed: as given; examples: N.

  Raises:
    UserError: the source has fewer than N examples.
  """
  shape, num_examples = objective.model.shape, batch_sizes[-1]
  shapes, num_groups = layer_shapes(shape), len(boundaries) - 1
  examples = draw_examples(source, num_examples, shape.num_classes, seed)
  drawn = group_timesteps(boundaries, num_examples, seed)
  t = dict.fromkeys(CONDITIONS, drawn) | {"shuffled": shuffle_timesteps(drawn, seed)}
  _measure_missing(objective, params, examples, t, batch_sizes, subspace_rank, microbatch, parts)
  conditions, overlaps = {}, {}
  for condition in CONDITIONS:
    units = [parts.load(_unit(condition, group)) for group in range(num_groups)]
    records, bases = zip(*units, strict=True)
    conditions[condition] = _summarise_ranks(shapes, records)
    overlaps[condition] = _summarise_overlap(shapes, bases, subspace_rank)
  return {
    "groups": [{"t_first": a, "t_last": b - 1} for a, b in itertools.pairwise(boundaries)],
    "batch_sizes": list(batch_sizes),
    "subspace_rank": subspace_rank,
    "examples": num_examples,
    "seed": seed,
    "conditions": conditions,
    "overlap": overlaps,
  }
