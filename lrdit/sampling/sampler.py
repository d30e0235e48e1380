"""Sampling: compiled functions for each rank bucket, with the parameters sliced to it.

A bucket has one function for its guided solver steps and one for the others. Either runs all its
consecutive steps in one loop on the device. The first and last step are arguments, so it is traced
once for any number of images, steps or visits.

Axes: B images in flight, S solver steps, H W image, C channels.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key

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
    guidance_min_noise, guidance_max_noise: interval of `guided_steps`.
    clip_x_0: keep the predicted x_0 in [-1, 1] (pixels, not latents).
    seed: of the noise.
    batch_size: images in flight, B.
  """

  prediction: str
  guidance_scale: float
  guidance_channels: int | None
  guidance_min_noise: float | None
  guidance_max_noise: float | None
  clip_x_0: bool
  seed: int
  batch_size: int


class Program(NamedTuple):
  """What one compiled function computes at every solver step."""

  bucket: int  # of rank
  is_guided: bool  # both passes of guidance, on twice the batch, or the conditional one alone


class Segment(NamedTuple):
  """The consecutive solver steps [first, end) of one program."""

  program: Program
  first: int
  end: int


@dataclasses.dataclass
class SamplePath:
  """Clean images (H, W, C) that the model predicts on the way to a sample.

  `x_0` is filled with the predictions of the solver `steps`, counted from 0.
  """

  steps: Collection[int]
  x_0: list[Float[Array, "H W C"]] = dataclasses.field(default_factory=list)

  def split(self, segments: Iterable[Segment]) -> list[Segment]:
    """Return the segments, split so that they pause after each of `steps`."""
    parts = []
    for program, first, end in segments:
      pauses = {step + 1 for step in self.steps if first <= step < end}
      ends = sorted({first, end} | pauses)
      parts += [Segment(program, *span) for span in itertools.pairwise(ends)]
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


def guided_steps(
  table: solvers.SolverTable,
  num_classes: int,
  scale: float,
  min_noise: float | None,
  max_noise: float | None,
) -> Bool[np.ndarray, " S"]:
  """Return which solver steps are guided, and so take two passes.

  They are those whose noise level noise / signal, the sigma of a process that leaves the image
  unscaled, lies in (min_noise, max_noise] (Kynkäänniemi et al. 2024, arXiv:2404.07724), where None
  sets no limit. None is guided at scale 1 or without classes.
  """
  sigma = table.noise / table.signal
  low = -np.inf if min_noise is None else min_noise
  high = np.inf if max_noise is None else max_noise
  return (low < sigma) & (sigma <= high) & (scale != 1.0 and num_classes > 0)


def make_segments(
  bucket: Int[np.ndarray, " S"], is_guided: Bool[np.ndarray, " S"]
) -> tuple[Segment, ...]:
  """Return the longest runs of solver steps with one rank bucket, all guided or all not."""
  programs = [Program(int(b), bool(g)) for b, g in zip(bucket, is_guided, strict=True)]
  starts = [i for i, program in enumerate(programs) if i == 0 or program != programs[i - 1]]
  spans = itertools.pairwise([*starts, len(programs)])
  return tuple(Segment(programs[first], first, end) for first, end in spans)


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
    return model.apply({"params": params}, x_t, jnp.full(batch, t), y, low_rank.RankSelection())
  # A pair stays on its image's device, as the batch is split over devices.
  null_y = jnp.full_like(y, model.shape.num_classes)
  output = model.apply(
    {"params": params},
    jnp.repeat(x_t, 2, axis=0),
    jnp.full(2 * batch, t),
    jnp.stack([y, null_y], axis=1).reshape(-1),
    low_rank.RankSelection(),
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
  """Samples from a model, by the compiled function of each program."""

  def __init__(
    self,
    model: DiT,
    table: solvers.SolverTable,
    settings: SamplerSettings,
    devices: parallel.Devices,
  ):
    """Prepare, without compiling, to sample batches that must divide over the devices."""
    self.model, self.table, self.settings = model, table, settings
    limits = settings.guidance_min_noise, settings.guidance_max_noise
    is_guided = guided_steps(table, model.shape.num_classes, settings.guidance_scale, *limits)
    self.segments = make_segments(model.plan.bucket_of_timestep[table.t], is_guided)
    self._batch_sharding, self._replicated = parallel.shardings(devices)
    jit = functools.partial(jax.jit, out_shardings=self._batch_sharding)
    programs = sorted({segment.program for segment in self.segments})
    self.run_program = {p: jit(functools.partial(self._run_program, p)) for p in programs}

  def _run_program(self, program, params, carry, y, index, first, end):
    """Run the solver steps [first, end) with the parameters of the program's bucket."""
    scale = self.settings.guidance_scale if program.is_guided else 1.0
    step = functools.partial(
      solver_step,
      model=self.model.clone(plan=self.model.plan.at_bucket(program.bucket)),
      params=params,
      y=y,
      index=index,
      table=self.table,
      settings=dataclasses.replace(self.settings, guidance_scale=scale),
    )
    return jax.lax.fori_loop(first, end, step, carry)

  def bucket_params(self, params: Any) -> dict[int, Any]:
    """Return each visited bucket's slice of the parameters, on the devices."""
    return {
      b: jax.device_put(low_rank.slice_params(params, self.model.plan, b), self._replicated)
      for b in {program.bucket for program in self.run_program}
    }

  def compile(self, params: Any, label_rule: LabelRule | None, rows: slice) -> None:
    """Compile what `sample_rows` runs, by running each program for no solver step."""
    index = np.arange(self.settings.batch_size)[rows]
    y = None if label_rule is None else label_rule(index)
    no_steps = [Segment(program, 0, 0) for program in self.run_program]
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
    """Sample as `sample_batch` does, over the given segments."""
    shape = self.model.shape
    image_shape = (shape.image_size, shape.image_size, shape.channels)
    index = jax.device_put(np.asarray(index, np.uint32), self._batch_sharding)
    y = None if labels is None else jax.device_put(labels, self._batch_sharding)
    x = _initial_noise(index, self.settings.seed, image_shape)
    # The placement is that of the programs' outputs, or a program that is visited first and again
    # later would be compiled twice.
    carry = jax.device_put((x, jnp.zeros_like(x)), self._batch_sharding)
    for program, first, end in segments:
      params, steps = sliced_params[program.bucket], (np.int32(first), np.int32(end))
      carry = self.run_program[program](params, carry, y, index, *steps)
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
