"""Export samples of a trained model for evaluation by any tool."""

import dataclasses
import logging
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from lrdit import builders
from lrdit.runtime import cluster, parallel
from lrdit.runtime.errors import UserError
from lrdit.runtime.progress import make_bar
from lrdit.sampling.sample_set import ExportWriter
from lrdit.sampling.sampler import Sampler
from lrdit.sampling.settings import make_label_rule, make_settings
from lrdit.train import checkpoints, run_files

log = logging.getLogger("lrdit")


@dataclasses.dataclass
class SampleBatches:
  """The batches of a sample set, which all processes compute together.

  Attributes:
    config: resolved.
    sampler, to_pixels: the config's.
    params: weights, of the checkpoint of step `step`.
  """

  config: ConfigDict
  sampler: Sampler
  params: Any
  to_pixels: builders.ToPixels
  step: int

  def compile(self) -> None:
    """Compile what `iterate` runs."""
    rows = parallel.own_rows(self.config.sampling.batch_size)
    self.sampler.compile(self.params, make_label_rule(self.config), rows)

  def iterate(self, first: int) -> Iterator[UInt8[np.ndarray, "B H W C"]]:
    """Yield the batches of the samples [first, num_samples), whole on every process.

    Raises:
      UserError: on all processes, at a sample that is not finite.
    """
    s = self.config.sampling
    starts, rows = range(first, s.num_samples, s.batch_size), parallel.own_rows(s.batch_size)
    label_rule = make_label_rule(self.config)
    for start, x_0 in self.sampler.sample_rows(self.params, label_rule, starts, rows):
      kept = s.num_samples - start
      pixels, are_finite = (parallel.gather_rows(part)[:kept] for part in self.to_pixels(x_0))
      if not are_finite.all():
        raise self._non_finite(start + int(np.argmin(are_finite)))
      yield pixels

  def _non_finite(self, index: int) -> UserError:
    s, fixes = self.config.sampling, []
    if s.guidance_scale != 1.0:
      fixes.append(f"lower config.sampling.guidance_scale={s.guidance_scale}")
    if not (s.clip_x_0 or self.config.vae.downsample_factor):
      fixes.append("set config.sampling.clip_x_0=True")
    if self.config.model.dtype != "float32":
      fixes.append("set config.model.dtype=float32")
    fixes.append("train longer, or again with a lower config.optimizer.learning_rate")
    weights = "averaged" if s.use_ema else "raw"
    return UserError(
      f"sample {index} of the {weights} weights of step {self.step} is not finite, and no sample "
      f"from there on was written: {'; or '.join(fixes)}"
    )


def export(batches: SampleBatches, writer: ExportWriter, num_devices: int) -> None:
  """Write the samples that a set lacks, in the first process."""
  s = batches.config.sampling
  cluster.from_first((np.int32(writer.num_done), np.bool_(writer.is_finished)))
  if writer.is_finished:
    log.info("%s: all %d samples are there", writer.directory, s.num_samples)
    return
  if writer.num_done:
    log.info("%s: going on from %d of %d samples", writer.directory, writer.num_done, s.num_samples)
  start = time.perf_counter()
  if writer.num_done < s.num_samples:
    batches.compile()
  compile_seconds = time.perf_counter() - start
  writer.start_clock()
  with make_bar(s.num_samples, writer.num_done, "image") as bar:
    for batch in batches.iterate(writer.num_done):
      writer.append(batch)
      bar.update(len(batch))
  facts = {
    "batch_size": s.batch_size,
    "num_devices": num_devices,
    "compile_seconds": compile_seconds,
  }
  metadata = writer.finish(make_label_rule(batches.config), facts)
  text = "%d samples of step %d in %.1f s: %s"
  log.info(text, s.num_samples, batches.step, metadata["wall_clock_seconds"], writer.directory)


def join_export(batches: SampleBatches) -> None:
  """Compute with the first process the samples that it exports, in another process."""
  first, is_finished = cluster.from_first((np.int32(0), np.bool_(False)))
  if not is_finished:
    batches.compile()
    for _ in batches.iterate(int(first)):
      pass


def sample(config: ConfigDict, workdir: str, devices: parallel.Devices | None = None) -> None:
  """Run `--mode=sample`: exactly `sampling.num_samples` images.

  An export that was stopped goes on where it was; a finished one is left alone.

  Args:
    config: resolved.
    workdir: of a trained run.
    devices: devices to sample on; all by default.

  Raises:
    UserError: no checkpoint, another model's workdir, a full disk, and the like.
  """
  devices, s = devices or parallel.all_devices(), config.sampling
  sampler = builders.make_sampler(config, devices)
  path = run_files.open_trained(workdir, config)
  weights = "ema" if s.use_ema else "raw"
  step, restored = run_files.restore_params(path, builders.params_template(config), [weights])
  params = restored[weights]
  vae_digest = run_files.read_vae_digest(path) if config.vae.downsample_factor else ""
  to_pixels = builders.make_to_pixels(config, devices, vae_digest)
  batches = SampleBatches(config, sampler, params, to_pixels, step)
  if not cluster.is_first():
    join_export(batches)
    return
  with ExportWriter(
    path / "samples" / s.name,
    settings=make_settings(config, sampler, step, checkpoints.digest(params), vae_digest),
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
    export(batches, writer, len(devices))
