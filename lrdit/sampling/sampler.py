"""Sampling: one compiled function per rank bucket, with the parameters sliced to it.

Each bucket's function runs all consecutive solver steps of the bucket in one loop on the device.
The first and last step are arguments, so it is traced once for any number of images, steps or
visits to the bucket.

Axes: B images in flight, S solver steps, H W image, C channels.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, Key

from lrdit.diffusion import process, solvers
from lrdit.model import low_rank
from lrdit.model.dit import DiT
from lrdit.runtime import parallel

# This keeps sampling's keys apart from training's, which fold a step into the seed.
SAMPLING_STREAM = 2**31 - 2
LABEL_STREAM, NOISE_STREAM = 0, 1  # folded into a sample's key

# A label rule maps sample indices to int32 labels.
LabelRule = Callable[[Integer[np.ndarray, " B"]], Int[np.ndarray, " B"]]


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
  """Settings that determine a sample, besides model, solver, index and label.

  All but `prediction` are the fields of the config's `sampling` of the same name.

  Attributes:
    prediction: what the model predicts, one of `process.PREDICTIONS`.
    guidance_scale: of classifier-free guidance; 1 turns it, and its cost, off.
    guidance_channels: how many channels it changes, from the first; None is all of the prediction.
    clip_x_0: keep the predicted x_0 in [-1, 1] (pixels, not latents).
    seed: of the noise.
    batch_size: images in flight, B.
  """

  prediction: str
  guidance_scale: float
  guidance_channels: int | None
  clip_x_0: bool
  seed: int
  batch_size: int


@dataclasses.dataclass
class SamplePath:
  """Clean images (H, W, C) that the model predicts on the way to a sample.

  `x_0` is filled with the predictions of the solver `steps`, counted from 0.
  """

  steps: Collection[int]
  x_0: list[Float[Array, "H W C"]] = dataclasses.field(default_factory=list)

  def split(self, segments: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Return runs of (bucket, first step, end step) that pause after each of `steps`."""
    parts = []
    for bucket, first, end in segments:
      pauses = {step + 1 for step in self.steps if first <= step < end}
      ends = sorted({first, end} | pauses)
      parts += [(bucket, *span) for span in itertools.pairwise(ends)]
    return parts


def balanced_labels(index: Integer[np.ndarray, " B"], num_classes: int) -> Int[np.ndarray, " B"]:
  """Return int32 labels that take the classes in turn by sample index."""
  return (index % num_classes).astype(np.int32)


def random_labels(
  seed: int, index: Integer[np.ndarray, " B"], num_classes: int
) -> Int[np.ndarray, " B"]:
  """Return int32 uniform labels, fixed by the seed and the sample index."""

  def one(i):
    key = jax.random.fold_in(_sample_key(seed, i), LABEL_STREAM)
    return jax.random.randint(key, (), 0, num_classes)

  return np.asarray(jax.vmap(one)(jnp.asarray(index, jnp.uint32)))


def _sample_key(seed: int, index: Integer[Array, ""]) -> Key[Array, ""]:
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), SAMPLING_STREAM), index)


def _noise(
  seed: int, index: Integer[Array, " B"], step: Int[Array, ""] | int, shape: tuple[int, ...]
) -> Float[Array, "B H W C"]:
  """Return Gaussian noise for step 0, the initial noise, or i + 1, which solver step i adds."""

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
  """Return (bucket, first step, end step) of each run of solver steps in one bucket."""
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
  guided_channels: int | None = None,
) -> Float[Array, "B H W C_out"]:
  """Return the model's output under classifier-free guidance (Ho and Salimans 2022, eq. 6).

  That is null + scale (conditional - null) on the prediction's first `guided_channels`, all of them
  by default, from one forward pass over 2 B images; at scale 1, it is the conditional pass alone.
  Other channels, and a learned variance, which doubles the channels, are the conditional ones. The
  model has one bucket; `scale` is static.
  """
  batch, channels = x_t.shape[0], guided_channels or model.shape.channels
  if scale == 1.0 or y is None:
    selection = low_rank.uniform_selection(batch)
    return model.apply({"params": params}, x_t, jnp.full(batch, t), y, selection)
  # A pair stays on its image's device, as the batch is split over devices.
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
  """Apply one row of the solver's table: (x_t, x_0_last) to (x_prev, x_0)."""
  x_t, x_0_last = carry
  row = {name: jnp.asarray(column)[i] for name, column in table.float32_columns().items()}
  channels = model.shape.channels
  guidance = settings.guidance_scale, settings.guidance_channels
  output = guided_output(model, params, x_t, jnp.asarray(table.t)[i], y, *guidance)
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
  """Samples from a model, by the compiled function of each bucket."""

  def __init__(
    self,
    model: DiT,
    table: solvers.SolverTable,
    settings: SamplerSettings,
    devices: parallel.Devices,
  ):
    """Prepare, without compiling, to sample batches that must divide over the devices."""
    self.model, self.table, self.settings = model, table, settings
    self.segments = bucket_segments(model.plan.bucket_of_timestep, table.t)
    self._batch_sharding, self._replicated = parallel.shardings(devices)
    jit = functools.partial(jax.jit, out_shardings=self._batch_sharding)
    buckets = {bucket for bucket, _, _ in self.segments}
    self.run_bucket = {b: jit(functools.partial(self._run_bucket, b)) for b in buckets}

  def _run_bucket(self, bucket, params, carry, y, index, first, end):
    """Run the solver steps [first, end) with the bucket's parameters."""
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

  def bucket_params(self, params: Any) -> dict[int, Any]:
    """Return each visited bucket's slice of the parameters, on the devices."""
    return {
      b: jax.device_put(low_rank.slice_params(params, self.model.plan, b), self._replicated)
      for b in self.run_bucket
    }

  def compile(self, params: Any, label_rule: LabelRule | None, rows: slice) -> None:
    """Compile what `sample_rows` runs, by running each bucket for no solver step."""
    index = np.arange(self.settings.batch_size)[rows]
    y = None if label_rule is None else label_rule(index)
    no_steps = [(bucket, 0, 0) for bucket in self.run_bucket]
    jax.block_until_ready(self._run(self.bucket_params(params), index, y, no_steps))

  def sample_batch(
    self,
    sliced_params: dict[int, Any],
    index: Integer[np.ndarray, " B"],
    labels: Int[np.ndarray, " B"] | None,
    path: SamplePath | None = None,
  ) -> Float[Array, "B H W C"]:
    """Return the float32 samples of some indices, without waiting for them.

    Labels are None for an unconditional model. `path` is filled for the first index.
    """
    segments = path.split(self.segments) if path else self.segments
    return self._run(sliced_params, index, labels, segments, path)

  def _run(self, sliced_params, index, labels, segments, path=None):
    """Sample as `sample_batch` does, over runs of (bucket, first step, end step)."""
    shape = self.model.shape
    image_shape = (shape.image_size, shape.image_size, shape.channels)
    index = jax.device_put(np.asarray(index, np.uint32), self._batch_sharding)
    y = None if labels is None else jax.device_put(labels, self._batch_sharding)
    x = _initial_noise(index, self.settings.seed, image_shape)
    # The placement is that of the bucket functions' outputs, or a bucket that is visited first and
    # again later would be compiled twice.
    carry = jax.device_put((x, jnp.zeros_like(x)), self._batch_sharding)
    for bucket, first, end in segments:
      carry = self.run_bucket[bucket](
        sliced_params[bucket], carry, y, index, np.int32(first), np.int32(end)
      )
      if path and end - 1 in path.steps:
        path.x_0.append(carry[1][0])
    return carry[0]

  def sample(
    self, params: Any, label_rule: LabelRule | None, num_samples: int
  ) -> Iterator[Float[np.ndarray, "B H W C"]]:
    """Yield the samples in index order, a batch at a time.

    The last batch is padded with further indices, whose samples are dropped: the compiled shapes
    and every kept sample are the same for any number. The next batch is computed meanwhile.
    """
    size = self.settings.batch_size
    starts = range(0, num_samples, size)
    for start, images in self.sample_rows(params, label_rule, starts, slice(size)):
      yield images[: num_samples - start]

  def sample_rows(
    self,
    params: Any,
    label_rule: LabelRule | None,
    starts: range,
    rows: slice,
    path: SamplePath | None = None,
  ) -> Iterator[tuple[int, Float[np.ndarray, "b H W C"]]]:
    """Yield the start and some rows of each batch, for a process that shares batches with others.

    The next batch is computed meanwhile. `path` is filled if the first batch starts at sample 0.
    """
    sliced, pending = self.bucket_params(params), None
    for start in starts:
      index = np.arange(start, start + self.settings.batch_size)[rows]
      y = None if label_rule is None else label_rule(index)
      ahead = start, self.sample_batch(sliced, index, y, path if start == 0 else None)
      if pending:
        yield pending[0], np.asarray(pending[1])
      pending = ahead
    if pending:
      yield pending[0], np.asarray(pending[1])
