"""Exports samples of a trained model for evaluation by any tool."""

import functools
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from lrdit.config.run_config import open_trained
from lrdit.experiment import Experiment, ToPixels
from lrdit.runtime import cluster, parallel
from lrdit.runtime.errors import UserError
from lrdit.runtime.progress import make_bar
from lrdit.sampling import sampler
from lrdit.sampling.sample_set import SampleSetWriter
from lrdit.train import checkpoints, run_files

log = logging.getLogger("lrdit")


def make_label_rule(config: ConfigDict) -> sampler.LabelRule | None:
  """(B,) sample indices to (B,) int32 labels; None for an unconditional model."""
  s, classes = config.sampling, config.data.num_classes
  if not classes:
    return None
  if s.labels == "balanced":
    return lambda index: sampler.balanced_labels(index, classes)
  if s.labels == "random":
    return lambda index: sampler.random_labels(s.seed, index, classes)
  return lambda index: np.full(len(index), int(s.labels), np.int32)


def make_settings(
  config: ConfigDict, drawn: sampler.Sampler, step: int, params: Any, vae_digest: str
) -> dict[str, Any]:
  """All that defines a sample beside its index; a figure measured is quoted with it.

  Args:
    config: resolved.
    drawn: what draws the samples.
    step: of the checkpoint.
    params: its weights, on the host.
    vae_digest: of the VAE that decodes; "" for pixels.
  """
  s, plan = config.sampling, drawn.model.plan
  visited = [(bucket, end - first) for bucket, first, end in drawn.segments]
  return {
    "checkpoint_step": step,
    "checkpoint_digest": checkpoints.digest(params),
    "weights": "ema" if s.use_ema else "raw",
    "method": config.method,
    "solver": s.solver,
    "num_steps": s.num_steps,
    "first_timestep": int(drawn.table.t[0]),
    "eta": s.eta,
    "guidance_scale": s.guidance_scale,
    "clip_x_0": s.clip_x_0,
    "seed": s.seed,
    "labels": s.labels if config.data.num_classes else None,
    "dtype": config.model.dtype,
    "prediction": config.diffusion.prediction,
    "noise_schedule": config.diffusion.noise_schedule,
    "num_train_timesteps": config.diffusion.num_train_timesteps,
    "rank_table": {name: list(ranks.active) for name, ranks in plan.layers},
    "solver_steps_per_bucket": [
      sum(n for b, n in visited if b == bucket) for bucket in range(plan.num_buckets)
    ],
    "vae_digest": vae_digest or None,
  }


def draw(
  config: ConfigDict,
  drawn: sampler.Sampler,
  params: Any,
  to_pixels: ToPixels,
  step: int,
  first: int,
) -> Iterator[UInt8[np.ndarray, "B H W C"]]:
  """Yield the samples [first, num_samples) by batches, drawn by all processes, on each of them.

  Args:
    config: resolved.
    drawn: what draws the samples.
    params: its weights.
    to_pixels: from `Experiment.to_pixels`.
    step: of the weights' checkpoint.
    first: index of the first sample.

  Raises:
    UserError: on all processes, at a sample that is not finite.
  """
  s = config.sampling
  starts, rows = range(first, s.num_samples, s.batch_size), parallel.own_rows(s.batch_size)
  for start, x_0 in drawn.sample_rows(params, make_label_rule(config), starts, rows):
    kept = s.num_samples - start
    pixels, are_finite = (parallel.gather_rows(part)[:kept] for part in to_pixels(x_0))
    if not are_finite.all():
      raise _non_finite(config, step, start + int(np.argmin(are_finite)))
    yield pixels


def _non_finite(config: ConfigDict, step: int, index: int) -> UserError:
  """Return what to say of a sample that is not finite."""
  s, mends = config.sampling, []
  if s.guidance_scale != 1.0:
    mends.append(f"lower config.sampling.guidance_scale={s.guidance_scale}")
  if not (s.clip_x_0 or config.vae.downsample_factor):
    mends.append("set config.sampling.clip_x_0=True")
  if config.model.dtype != "float32":
    mends.append("set config.model.dtype=float32")
  mends.append("train longer, or again with a lower config.optimizer.learning_rate")
  weights = "averaged" if s.use_ema else "raw"
  return UserError(
    f"sample {index} of the {weights} weights of step {step} is not finite, and no sample from "
    f"there on was written: {'; or '.join(mends)}"
  )


def write_samples(
  config: ConfigDict,
  writer: SampleSetWriter,
  compile_all: Callable[[], None],
  batches: Callable[[int], Iterator],
  num_devices: int,
) -> None:
  """Exports what is missing; the first process's part.

  Args:
    config: resolved.
    writer: of the export.
    compile_all: what draws them, before the export's clock starts.
    batches: samples from an index on.
    num_devices: they are drawn on.
  """
  s = config.sampling
  cluster.from_first((np.int32(writer.num_done), np.bool_(writer.is_finished)))
  if writer.is_finished:
    log.info("%s: all %d samples are there", writer.directory, s.num_samples)
    return
  if writer.num_done:
    log.info("%s: going on from %d of %d samples", writer.directory, writer.num_done, s.num_samples)
  start = time.perf_counter()
  if writer.num_done < s.num_samples:
    compile_all()
  compile_seconds = time.perf_counter() - start
  writer.start_clock()
  with make_bar(s.num_samples, writer.num_done, "image") as bar:
    for batch in batches(writer.num_done):
      writer.append(batch)
      bar.update(len(batch))
  machine = {"batch_size": s.batch_size, "num_devices": num_devices}
  metadata = writer.finish(make_label_rule(config), machine | {"compile_seconds": compile_seconds})
  text = "%d samples of step %d in %.1f s: %s"
  seconds = metadata["wall_clock_seconds"]
  log.info(text, s.num_samples, metadata["checkpoint_step"], seconds, writer.directory)


def help_to_draw(compile_all: Callable[[], None], batches: Callable[[int], Iterator]) -> None:
  """Draws with the first process what that one exports; the other processes' part.

  Args:
    compile_all, batches: as for `write_samples`.
  """
  first, is_finished = cluster.from_first((np.int32(0), np.bool_(False)))
  if not is_finished:
    compile_all()
    for _ in batches(int(first)):
      pass


def sample(config: ConfigDict, workdir: str, devices: parallel.Devices | None = None) -> None:
  """Runs `--mode=sample`: exactly `sampling.num_samples` images.

  An export that was stopped goes on where it was; a finished one is left alone.

  Args:
    config: resolved.
    workdir: of a trained run.
    devices: devices to sample on; all by default.

  Raises:
    UserError: no checkpoint, another model's workdir, a full disk, and the like.
  """
  devices, s = devices or parallel.all_devices(), config.sampling
  drawn = Experiment(config).sampler(devices)
  path = open_trained(workdir, config)
  weights = "ema" if s.use_ema else "raw"
  step, restored = run_files.restore_params(path, Experiment(config).params_template, [weights])
  params = restored[weights]
  vae_digest = run_files.read_vae_digest(path) if config.vae.downsample_factor else ""
  to_pixels = Experiment(config).to_pixels(devices, vae_digest)
  batches = functools.partial(draw, config, drawn, params, to_pixels, step)
  compile_all = functools.partial(
    drawn.compile, params, make_label_rule(config), parallel.own_rows(s.batch_size)
  )
  if not cluster.is_first():
    help_to_draw(compile_all, batches)
    return
  with SampleSetWriter(
    path / "samples" / s.name,
    settings=make_settings(config, drawn, step, params, vae_digest),
    software={
      "backend": jax.default_backend(),
      "jax": jax.__version__,
      "scan_blocks": config.model.scan_blocks,
    },
    num_samples=s.num_samples,
    image_size=config.data.image_size,
    batch_size=s.batch_size,
    png_files=s.png_files,
  ) as writer:
    write_samples(config, writer, compile_all, batches, len(devices))
