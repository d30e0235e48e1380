"""Encodes a dataset's images with a VAE, once, into a directory training reads."""

import contextlib
import dataclasses
import logging
import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lrdit import builders
from lrdit.data import latents, pipeline
from lrdit.data.source import Source, report_classes
from lrdit.model.vae import VaeRunner
from lrdit.runtime import parallel
from lrdit.runtime.errors import UserError
from lrdit.runtime.locks import owned
from lrdit.runtime.progress import make_bar

log = logging.getLogger("lrdit")

KEEP_EVERY_IMAGES = 1024  # a kill loses at most about this much work


def describe(config: ConfigDict, codec: VaeRunner, sources: dict[str, Source]) -> dict[str, Any]:
  """What a directory of latents is made from: the part of its manifest that a
  later run must agree with."""
  size = config.data.image_size // config.vae.downsample_factor
  copies = 2 if config.data.flip else 1
  return {
    "format": 1,
    "sources": {split: source.fingerprint for split, source in sources.items()},
    "num_classes": sources["train"].num_classes,
    "latent_shape": [copies, 2, size, size, config.vae.latent_channels],
    "vae_digest": codec.digest,
    "vae_config": dataclasses.asdict(codec.config),
  }


def encode_split(
  codec: VaeRunner,
  source: Source,
  split: str,
  writer: latents.LatentWriter,
  with_mirrored: bool,
  batch_size: int,
) -> None:
  """Encodes what a split still lacks.

  Args:
    codec: the VAE.
    source: the images.
    split: "train" or "eval".
    writer: of the directory.
    with_mirrored: encode the mirrored images as well.
    batch_size: images encoded at once.
  """
  total, done = len(source), writer.done(split)

  def read(start: int) -> dict[str, Any]:
    index = np.arange(start, min(start + batch_size, total))
    return source.gather(index, np.zeros(len(index), bool))

  files = writer.open_split(split)
  with contextlib.ExitStack() as stack:
    for file in files:
      stack.callback(file.close)
    bar = stack.enter_context(make_bar(total, done, "image"))
    kept = done
    for batch in pipeline.read_ahead(read, range(done, total, batch_size)):
      images = batch["image"]
      copies = [images, images[:, :, ::-1]] if with_mirrored else [images]
      encoded = np.stack([codec.encode(copy) for copy in copies], axis=1)
      are_finite = np.isfinite(encoded).reshape(len(encoded), -1).all(axis=1)
      if not are_finite.all():
        raise UserError(
          f"the VAE's latents of image {done + int(np.argmin(are_finite))} of the split {split} "
          "are not finite: use another VAE"
        )
      files[0].append(encoded)
      files[1].append(batch["label"])
      done += len(images)
      bar.update(len(images))
      if done - kept >= KEEP_EVERY_IMAGES or done == total:
        writer.keep(split, files, done)
        kept = done


def encode(config: ConfigDict, output: str, devices: parallel.Devices | None = None) -> None:
  """Runs `--mode=encode`: latents of both splits, resumed where it was stopped.

  A finished directory is read through and checked against its checksums.

  Args:
    config: resolved; `data.flip` asks for the mirrored images as well.
    output: the directory to write.
    devices: devices to encode on; all by default.

  Raises:
    UserError: whatever the user can mend.
  """
  codec = builders.make_codec(config, devices or jax.local_devices())
  sources = {split: builders.make_image_source(config, split) for split in latents.SPLITS}
  report_classes(sources["train"], config.data.num_classes)
  directory = pathlib.Path(output)
  directory.mkdir(parents=True, exist_ok=True)
  with owned(directory, "encode"):
    _encode_into(directory, config, codec, sources)
  log.info("train on them by --config.vae.latents_dir=%s", directory)


def _encode_into(
  directory: pathlib.Path, config: ConfigDict, codec: VaeRunner, sources: dict[str, Source]
) -> None:
  """Write what a directory, which is this process's alone, still lacks."""
  writer = latents.LatentWriter(
    directory,
    describe(config, codec, sources),
    {split: len(source) for split, source in sources.items()},
  )
  if writer.is_complete:
    latents.verify(directory)
    log.info("the latents under %s are complete and as they were written", directory)
    return
  for split, source in sources.items():
    log.info("%s: %d of %d images are encoded", split, writer.done(split), len(source))
    if writer.done(split) < len(source):
      encode_split(codec, source, split, writer, config.data.flip, config.vae.batch_size)
  writer.finish()
