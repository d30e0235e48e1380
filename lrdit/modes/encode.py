"""Encode a dataset's images with a VAE into a directory for training: `--mode=encode`."""

import dataclasses
import logging
import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lrdit.data import images, latents, pipeline
from lrdit.data.source import Source, report_classes
from lrdit.experiment import Experiment
from lrdit.model.vae import VaeRunner
from lrdit.runtime import parallel
from lrdit.runtime.errors import UserError
from lrdit.runtime.locks import owned
from lrdit.runtime.progress import make_bar

log = logging.getLogger("lrdit")

KEEP_EVERY_IMAGES = 1024  # a kill loses the work on about this many images at most


def describe(config: ConfigDict, runner: VaeRunner, sources: dict[str, Source]) -> dict[str, Any]:
  """Return the part of a manifest that a later start must match."""
  size = config.data.image_size // config.vae.downsample_factor
  copies = 2 if config.data.flip else 1
  return {
    "format": 1,
    "sources": {split: source.fingerprint for split, source in sources.items()},
    "num_classes": sources["train"].num_classes,
    "latent_shape": [copies, 2, size, size, config.vae.latent_channels],
    "vae_digest": runner.digest,
    "vae_config": dataclasses.asdict(runner.config),
  }


def encode_split(
  config: ConfigDict, runner: VaeRunner, source: Source, split: str, writer: latents.LatentWriter
) -> None:
  """Encode the remaining images of a split, and their mirror images if `data.flip` is set."""
  total, done, batch_size = len(source), writer.num_done(split), config.vae.batch_size

  def read(start: int) -> dict[str, Any]:
    index = np.arange(start, min(start + batch_size, total))
    return source.gather(index, np.zeros(len(index), bool))

  with writer.open_split(split) as files, make_bar(total, done, "image") as bar:
    kept = done
    for batch in pipeline.read_ahead(read, range(done, total, batch_size)):
      pixels = batch["image"]
      copies = [pixels, pixels[:, :, ::-1]] if config.data.flip else [pixels]
      encoded = np.stack([runner.encode(copy) for copy in copies], axis=1)
      are_finite = images.are_finite(encoded)
      if not are_finite.all():
        raise UserError(
          f"the VAE's latents of image {done + int(np.argmin(are_finite))} of the split {split} "
          "are not finite: use another VAE"
        )
      files[0].append(encoded)
      files[1].append(batch["label"])
      done += len(pixels)
      bar.update(len(pixels))
      if done - kept >= KEEP_EVERY_IMAGES or done == total:
        writer.keep(split, files)
        kept = done


def encode(config: ConfigDict, output: str, devices: parallel.Devices | None = None) -> None:
  """Run `--mode=encode`: write the latents of both splits to `output`, or resume.

  With `data.flip` the mirror images are encoded as well. A finished directory is read and compared
  with its checksums.
  """
  experiment = Experiment(config)
  runner = experiment.vae_runner(devices or jax.local_devices())
  sources = {split: experiment.image_source(split) for split in latents.SPLITS}
  report_classes(sources["train"], config.data.num_classes)
  directory = pathlib.Path(output)
  directory.mkdir(parents=True, exist_ok=True)
  with owned(directory, "encode"):
    _encode_into(directory, config, runner, sources)
  log.info("train on these latents with --config.vae.latents_dir=%s", directory)


def _encode_into(
  directory: pathlib.Path, config: ConfigDict, runner: VaeRunner, sources: dict[str, Source]
) -> None:
  num_examples = {split: len(source) for split, source in sources.items()}
  writer = latents.LatentWriter(directory, describe(config, runner, sources), num_examples)
  if writer.is_complete:
    latents.verify(directory)
    log.info("the latents under %s are complete and intact", directory)
    return
  for split, source in sources.items():
    log.info("%s: %d of %d images are encoded", split, writer.num_done(split), len(source))
    if writer.num_done(split) < len(source):
      encode_split(config, runner, source, split, writer)
  writer.finish()
