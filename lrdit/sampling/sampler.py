"""Sampling: one compiled function per rank bucket, parameters sliced to it.

Each bucket's function runs all consecutive solver steps of the bucket in one
loop on the device. Step bounds are arguments, so it is traced once, whatever
the number of images, of steps or of visits to the bucket.

Axes: B images in flight, S solver steps, H W image, C channels.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, Key

from lrdit.diffusion import process, solvers
from lrdit.model import low_rank
from lrdit.model.dit import DiT
from lrdit.runtime import parallel

# Keeps sampling's keys apart from training's, which fold a step into the seed.
SAMPLING_STREAM = 2**31 - 2
# The streams of a sample, folded into its key.
LABEL_STREAM, NOISE_STREAM = 0, 1

# Labels of sample indices.
LabelRule = Callable[[Integer[np.ndarray, " B"]], Int[np.ndarray, " B"]]


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
  """How samples are drawn.

  Attributes:
    prediction: what the model predicts, one of `diffusion.PREDICTIONS`.
    guidance_scale: classifier-free guidance; 1 turns it, and its cost, off.
    clip_x_0: keep predicted x_0 in [-1, 1] (pixels, not latents).
    seed: of the noise and of random labels.
    batch_size: images in flight, B.
  """

  prediction: str
  guidance_scale: float
  clip_x_0: bool
  seed: int
  batch_size: int


def balanced_labels(index: Integer[np.ndarray, " B"], num_classes: int) -> Int[np.ndarray, " B"]:
  """Label of each sample index: classes in turn, (B,) int32."""
  return (index % num_classes).astype(np.int32)


def random_labels(
  seed: int, index: Integer[np.ndarray, " B"], num_classes: int
) -> Int[np.ndarray, " B"]:
  """Label of each sample index: uniform, fixed by (seed, index), (B,) int32."""

  def one(i):
    key = jax.random.fold_in(_sample_key(seed, i), LABEL_STREAM)
    return jax.random.randint(key, (), 0, num_classes)

  return np.asarray(jax.vmap(one)(jnp.asarray(index, jnp.uint32)))


def _sample_key(seed: int, index: Integer[Array, ""]) -> Key[Array, ""]:
  key = jax.random.fold_in(jax.random.key(seed), SAMPLING_STREAM)
  return jax.random.fold_in(key, index)


def _noise(
  seed: int, index: Integer[Array, " B"], step: Int[Array, ""] | int, shape: tuple[int, ...]
) -> Float[Array, "B H W C"]:
  """(B, *shape) Gaussian noise, fixed per sample index and step.

  Step 0 is the initial noise; solver step i adds noise i + 1.
  """

  def one(i):
    key = jax.random.fold_in(_sample_key(seed, i), NOISE_STREAM)
    return jax.random.normal(jax.random.fold_in(key, step), shape)

  return jax.vmap(one)(index)


@functools.partial(jax.jit, static_argnames=("seed", "shape"))
def _initial_noise(
  index: Integer[Array, " B"], seed: int, shape: tuple[int, ...]
) -> Float[Array, "B H W C"]:
  return _noise(seed, index, 0, shape)


def bucket_segments(
  bucket_of_timestep: Int[np.ndarray, " T"], t: Int[np.ndarray, " S"]
) -> list[tuple[int, int, int]]:
  """(bucket, first step, end step) of each run of solver steps in one bucket."""
  bucket = bucket_of_timestep[t]
  starts = [*np.flatnonzero(np.diff(bucket, prepend=-1)), len(t)]
  return [(int(bucket[a]), int(a), int(b)) for a, b in itertools.pairwise(starts)]


def guided_output(
  model: DiT,
  params: Any,
  x_t: Float[Array, "B H W C"],
  t: Int[Array, ""],
  y: Int[Array, " B"] | None,
  scale: float,
) -> Float[Array, "B H W C_out"]:
  """Model output under classifier-free guidance (Ho and Salimans 2022, eq. 6).

  null + scale (conditional - null) on the prediction's channels, in one
  forward pass over 2 B images; at scale 1 the conditional pass alone. A
  learned variance is always the conditional one.

  Args:
    model: a DiT of one bucket.
    params: its parameters.
    x_t: (B, H, W, C).
    t: int32 scalar timestep.
    y: (B,) labels, or None.
    scale: guidance scale, static.

  Returns:
    (B, H, W, C or 2 C).
  """
  batch, channels = x_t.shape[0], model.shape.channels
  if scale == 1.0 or y is None:
    selection = low_rank.uniform_selection(batch)
    return model.apply({"params": params}, x_t, jnp.full(batch, t), y, selection)
  # Pairs stay on their image's device: the batch is split over devices.
  null_y = jnp.full_like(y, model.shape.num_classes)
  output = model.apply(
    {"params": params},
    jnp.repeat(x_t, 2, axis=0),
    jnp.full(2 * batch, t),
    jnp.stack([y, null_y], axis=1).reshape(-1),
    low_rank.uniform_selection(2 * batch),
  )
  conditional, null = output[::2], output[1::2]
  guided = null + scale * (conditional - null)
  return jnp.concatenate([guided[..., :channels], conditional[..., channels:]], axis=-1)


def solver_step(
  i: Int[Array, ""],
  carry: tuple[Float[Array, "B H W C"], Float[Array, "B H W C"]],
  *,
  model: DiT,
  params: Any,
  y: Int[Array, " B"] | None,
  index: Integer[Array, " B"],
  table: solvers.SolverTable,
  settings: SamplerSettings,
) -> tuple[Float[Array, "B H W C"], Float[Array, "B H W C"]]:
  """One row of the solver's table: (x_t, x_0_last) to (x_prev, x_0)."""
  x_t, x_0_last = carry
  row = {name: jnp.asarray(column)[i] for name, column in table.float32_columns().items()}
  channels = model.shape.channels
  output = guided_output(model, params, x_t, jnp.asarray(table.t)[i], y, settings.guidance_scale)
  x_0, eps = process.predict_x_0_eps(
    settings.prediction, output[..., :channels], x_t, row["signal"], row["noise"]
  )
  if settings.clip_x_0:
    x_0 = jnp.clip(x_0, -1.0, 1.0)
    eps = (x_t - row["signal"] * x_0) / row["noise"]
  x_prev = row["on_x_t"] * x_t + row["on_x_0"] * x_0 + row["on_eps"] * eps
  x_prev = x_prev + row["on_x_0_last"] * x_0_last
  if table.is_stochastic:
    std = row["on_noise"]
    if model.shape.learn_sigma and table.takes_learned_variance:
      share = (output[..., channels:] + 1) / 2
      low, high = row["log_variance_low"], row["log_variance_high"]
      learned = jnp.exp(0.5 * (share * high + (1 - share) * low))
      std = jnp.where(std > 0, learned, 0.0)
    x_prev = x_prev + std * _noise(settings.seed, index, i + 1, x_t.shape[1:])
  return x_prev, x_0


class Sampler:
  """Draws samples from a model; holds the compiled function of each bucket."""

  def __init__(
    self,
    model: DiT,
    table: solvers.SolverTable,
    settings: SamplerSettings,
    devices: parallel.Devices,
  ):
    """Prepares, without compiling yet.

    Args:
      model: the DiT with all its components, as trained.
      table: the solver's coefficients.
      settings: how to sample; its batch must divide over `devices`.
      devices: where to sample.
    """
    self.model, self.table, self.settings = model, table, settings
    self.segments = bucket_segments(model.plan.bucket_of_timestep, table.t)
    self._batch_sharding, self._replicated = parallel.shardings(devices)
    self.run_bucket = {
      bucket: jax.jit(
        functools.partial(self._run_bucket, bucket), out_shardings=self._batch_sharding
      )
      for bucket in {bucket for bucket, _, _ in self.segments}
    }

  def _run_bucket(self, bucket, params, carry, y, index, first, end):
    """Solver steps [first, end) with the bucket's parameters."""
    step = functools.partial(
      solver_step,
      model=self.model.clone(plan=self.model.plan.at_bucket(bucket)),
      params=params,
      y=y,
      index=index,
      table=self.table,
      settings=self.settings,
    )
    return jax.lax.fori_loop(first, end, step, carry)

  def slice_params(self, params: Any) -> dict[int, Any]:
    """Each visited bucket's parameters on the devices, sliced once."""
    return {
      bucket: jax.device_put(
        low_rank.slice_params(params, self.model.plan, bucket), self._replicated
      )
      for bucket in self.run_bucket
    }

  def compile(self, params: Any, label_rule: LabelRule | None, rows: slice) -> None:
    """Compiles what `sample_rows` runs, by running no solver step of each bucket.

    Args:
      params, label_rule, rows: as for `sample_rows`.
    """
    index = np.arange(self.settings.batch_size)[rows]
    y = None if label_rule is None else label_rule(index)
    no_steps = [(bucket, 0, 0) for bucket in self.run_bucket]
    jax.block_until_ready(self._run(self.slice_params(params), index, y, no_steps))

  def sample_batch(
    self,
    sliced_params: dict[int, Any],
    index: Integer[np.ndarray, " B"],
    labels: Int[np.ndarray, " B"] | None,
  ) -> Float[Array, "B H W C"]:
    """Samples by index: (B,) indices to (B, H, W, C) float32, not waited for.

    Args:
      sliced_params: from `slice_params`.
      index: (B,) sample indices.
      labels: (B,) int32, or None for an unconditional model.
    """
    return self._run(sliced_params, index, labels, self.segments)

  def path(
    self, params: Any, label_rule: LabelRule | None, rows: slice, steps: Sequence[int]
  ) -> Float[np.ndarray, "K h w C"]:
    """Return the clean images that the model predicts on the way to the first sample of `rows`.

    It runs a whole batch, since the functions of the buckets are compiled for that.

    Args:
      params, label_rule, rows: as for `sample_rows`.
      steps: K ascending solver steps from 0, whose predictions of x_0 are returned.
    """
    segments = []
    for bucket, first, end in self.segments:
      stops = {step + 1 for step in steps if first <= step < end}
      segments += [(bucket, *span) for span in itertools.pairwise(sorted({first, end} | stops))]
    index = np.arange(self.settings.batch_size)[rows]
    y = None if label_rule is None else label_rule(index)
    predicted: list[Array] = []
    self._run(self.slice_params(params), index, y, segments, predicted)
    shown = [x_0 for x_0, (_, _, end) in zip(predicted, segments, strict=True) if end - 1 in steps]
    return np.stack([np.asarray(x_0) for x_0 in shown])

  def _run(self, sliced_params, index, labels, segments, predicted=None):
    """`sample_batch` over other runs of solver steps: (bucket, first step, end step).

    Appends the first image's prediction of x_0 at the end of each run to `predicted`.
    """
    shape = self.model.shape
    image_shape = (shape.image_size, shape.image_size, shape.channels)
    index = jax.device_put(np.asarray(index, np.uint32), self._batch_sharding)
    y = None if labels is None else jax.device_put(labels, self._batch_sharding)
    x = _initial_noise(index, self.settings.seed, image_shape)
    # Placed as the bucket functions place their outputs, or a bucket that is
    # visited first and again later would be compiled for both placements.
    carry = jax.device_put((x, jnp.zeros_like(x)), self._batch_sharding)
    for bucket, first, end in segments:
      carry = self.run_bucket[bucket](
        sliced_params[bucket], carry, y, index, np.int32(first), np.int32(end)
      )
      if predicted is not None:
        predicted.append(carry[1][0])
    return carry[0]

  def sample(
    self, params: Any, label_rule: LabelRule | None, num_samples: int, first: int = 0
  ) -> Iterator[Float[np.ndarray, "B H W C"]]:
    """The samples [first, num_samples) in index order, a batch at a time.

    The last batch is padded with further indices, which are dropped, so the
    compiled shapes and every kept sample are the same whatever the number.

    Args:
      params: the model's parameters.
      label_rule: (B,) indices to (B,) int32 labels; None for an unconditional model.
      num_samples: N, counted from index 0.
      first: index of the first sample that is drawn.

    Yields:
      (at most B, H, W, C) float32; the next batch is computed meanwhile.
    """
    size = self.settings.batch_size
    batches = self.sample_rows(params, label_rule, range(first, num_samples, size), slice(size))
    for start, images in batches:
      yield images[: num_samples - start]

  def sample_rows(
    self, params: Any, label_rule: LabelRule | None, starts: range, rows: slice
  ) -> Iterator[tuple[int, Float[np.ndarray, "b H W C"]]]:
    """Some rows of each batch, for a process that shares batches with others.

    Args:
      params, label_rule: as for `sample`.
      starts: index of the first sample of each batch.
      rows: which of the B samples of a batch.

    Yields:
      the batch's start, and (b, H, W, C) float32; the next batch is computed meanwhile.
    """
    sliced = self.slice_params(params)
    pending: list[tuple[int, Array]] = []
    for start in starts:
      index = np.arange(start, start + self.settings.batch_size)[rows]
      y = None if label_rule is None else label_rule(index)
      pending.append((start, self.sample_batch(sliced, index, y)))
      if len(pending) > 1:
        done, images = pending.pop(0)
        yield done, np.asarray(images)
    for done, images in pending:
      yield done, np.asarray(images)
