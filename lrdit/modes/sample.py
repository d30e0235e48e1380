"""Write a sample set of a trained model, for evaluation by any tool: `--mode=sample`."""

import dataclasses
import functools
import logging
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from lrdit.config.run_config import choose_checkpoint, open_trained
from lrdit.data import images
from lrdit.experiment import Experiment, ToPixels
from lrdit.runtime import cluster, parallel
from lrdit.runtime.errors import UserError
from lrdit.runtime.progress import make_bar
from lrdit.runtime.store import write_json
from lrdit.sampling.sample_set import SampleSetWriter
from lrdit.sampling.sampler import SamplePath, Sampler
from lrdit.train import checkpoints, run_files

log = logging.getLogger("lrdit")

PATH_STEPS = 10  # number of solver steps in the path of a sample


@dataclasses.dataclass
class SampleBatches:
  """The batches of a sample set, which all processes compute together."""

  experiment: Experiment
  sampler: Sampler
  params: Any  # the sampled weights
  to_pixels: ToPixels
  step: int  # of the weights' checkpoint

  @functools.cached_property
  def path(self) -> SamplePath:
    """The path of sample 0, at evenly spread solver steps."""
    shown = np.linspace(0, len(self.sampler.table.t) - 1, PATH_STEPS)
    return SamplePath(np.unique(shown.round().astype(int)).tolist())

  def compile(self) -> None:
    """Compile what `iterate` runs."""
    rows = parallel.own_rows(self.sampler.settings.batch_size)
    self.sampler.compile(self.params, self.experiment.label_rule, rows)

  def iterate(self, first: int) -> Iterator[UInt8[np.ndarray, "B H W C"]]:
    """Yield the batches of the samples [first, num_samples), whole on every process.

    Raise a UserError on all processes if a sample is not finite.
    """
    s, label_rule = self.experiment.config.sampling, self.experiment.label_rule
    starts, rows = range(first, s.num_samples, s.batch_size), parallel.own_rows(s.batch_size)
    for start, x_0 in self.sampler.sample_rows(self.params, label_rule, starts, rows, self.path):
      kept = s.num_samples - start
      pixels, are_finite = (parallel.gather_rows(part)[:kept] for part in self.to_pixels(x_0))
      if not are_finite.all():
        raise self._non_finite(start + int(np.argmin(are_finite)))
      yield pixels

  def write_path(self, directory: pathlib.Path) -> None:
    """Write path.png and path.json, once the set's first batch has been computed.

    path.png shows the clean images that the model predicts on the way to sample 0. path.json holds
    its label, solver steps, timesteps, and the active ranks of each factorized layer there.
    """
    label_rule, t, steps = self.experiment.label_rule, self.sampler.table.t, self.path.steps
    x_0 = np.stack([np.asarray(x_0) for x_0 in self.path.x_0])
    images.write_grid(directory / "path.png", self.to_pixels(x_0)[0], len(steps))
    plan = self.sampler.model.plan
    buckets = plan.bucket_of_timestep[t[steps]]
    record = {
      "label": None if label_rule is None else int(label_rule(np.arange(1))[0]),
      "steps": steps,
      "timesteps": t[steps].tolist(),
      "ranks": {name: [ranks.active[bucket] for bucket in buckets] for name, ranks in plan.layers},
    }
    write_json(directory / "path.json", record)

  def _non_finite(self, index: int) -> UserError:
    config, fixes = self.experiment.config, []
    s = config.sampling
    if s.guidance_scale != 1.0:
      fixes.append(f"lower config.sampling.guidance_scale={s.guidance_scale}")
    if not (s.clip_x_0 or config.vae.downsample_factor):
      fixes.append("set config.sampling.clip_x_0=True")
    if config.model.dtype != "float32":
      fixes.append("set config.model.dtype=float32")
    fixes.append("train longer, or again with a lower config.optimizer.learning_rate")
    weights = "averaged" if s.use_ema else "raw"
    return UserError(
      f"sample {index} of the {weights} weights of step {self.step} is not finite, and no sample "
      f"from there on was written: {'; or '.join(fixes)}"
    )


def write_samples(batches: SampleBatches, writer: SampleSetWriter, num_devices: int) -> None:
  """Write the remaining samples of a set; only the first process calls this."""
  s = batches.experiment.config.sampling
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
      if writer.num_done == 0:
        batches.write_path(writer.directory)
      writer.append(batch)
      bar.update(len(batch))
  facts = dict(batch_size=s.batch_size, num_devices=num_devices, compile_seconds=compile_seconds)
  metadata = writer.finish(batches.experiment.label_rule, facts)
  text = "%d samples of step %d in %.1f s: %s"
  log.info(text, s.num_samples, batches.step, metadata["wall_clock_seconds"], writer.directory)


def help_to_sample(batches: SampleBatches) -> None:
  """Compute, with the first process, the samples that it writes."""
  first, is_finished = cluster.from_first((np.int32(0), np.bool_(False)))
  if not is_finished:
    batches.compile()
    for _ in batches.iterate(int(first)):
      pass


def sample(
  config: ConfigDict, workdir: str, devices: parallel.Devices | None = None, checkpoint: str = ""
) -> None:
  """Run `--mode=sample`: write exactly `sampling.num_samples` images of the run in `workdir`.

  An unfinished sample set resumes; a finished one is left alone. `checkpoint` is that of
  `run_files.choose_checkpoint`.
  """
  devices, s, experiment = devices or parallel.all_devices(), config.sampling, Experiment(config)
  sampler = experiment.sampler(devices)
  path = open_trained(workdir, config)
  weights = "ema" if s.use_ema else "raw"
  chosen = choose_checkpoint(path, config, checkpoint)
  template = experiment.params_template
  step, restored = run_files.restore_params(chosen.run, template, [weights], chosen.step)
  params = restored[weights]
  vae_digest = run_files.read_vae_digest(path) if config.vae.downsample_factor else ""
  to_pixels = experiment.to_pixels(devices, vae_digest)
  batches = SampleBatches(experiment, sampler, params, to_pixels, step)
  if not cluster.is_first():
    help_to_sample(batches)
    return
  software = {"backend": jax.default_backend(), "jax": jax.__version__}
  with SampleSetWriter(
    chosen.output / "samples" / s.name,
    settings=experiment.sample_settings(step, checkpoints.digest(params), vae_digest),
    software=software | {"scan_blocks": config.model.scan_blocks},
    num_samples=s.num_samples,
    image_size=config.data.image_size,
    batch_size=s.batch_size,
    png_files=s.png_files,
  ) as writer:
    write_samples(batches, writer, len(devices))
