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
from lrdit.model.vae import VaeRunner, unscale_latents
from lrdit.runtime import parallel
from lrdit.runtime.errors import UserError
from lrdit.runtime.locks import owned
from lrdit.runtime.progress import make_bar
from lrdit.runtime.store import write_json

log = logging.getLogger("lrdit")

KEEP_EVERY_IMAGES = 1024  # a kill loses the work on about this many images at most
STATISTICS_EXAMPLES, ROUND_TRIP_EXAMPLES, PICTURES = 4096, 64, 10


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
      latents.append_rows(files, encoded, batch["label"])
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
    if not (directory / "statistics.json").exists():
      describe_latents(directory, runner, sources["eval"])
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


def _spread(source: Source, count: int) -> dict[str, Any]:
  """Return at most `count` examples of a source, evenly spread over it."""
  index = np.unique(np.linspace(0, len(source) - 1, count).astype(np.int64))
  return source.gather(index, np.zeros(len(index), bool))


def describe_latents(directory: pathlib.Path, runner: VaeRunner, eval_images: Source) -> None:
  """Write statistics.json and round_trip.png of finished latents.

  The first has mean and standard deviation of the model's x_0, over all and by channel, and the
  error of decoding held-out latents. The second shows held-out images above their decoded latents.
  """
  train = _spread(latents.open_latents(str(directory), "train"), STATISTICS_EXAMPLES)
  mean = train["image"].mean(axis=(0, 1, 2))
  second = (np.square(train["image"]) + np.square(train["std"])).mean(axis=(0, 1, 2))
  held_out = _spread(latents.open_latents(str(directory), "eval"), ROUND_TRIP_EXAMPLES)
  decoded = runner.decode(unscale_latents(runner.config, held_out["image"]))
  pixels = _spread(eval_images, ROUND_TRIP_EXAMPLES)["image"]
  error = float(np.square(np.clip(decoded, -1, 1) - pixels).mean())
  statistics = {
    "train_examples": len(train["image"]),
    "mean": float(mean.mean()),
    "std": float(np.sqrt(second.mean() - mean.mean() ** 2)),
    "channel_means": mean.tolist(),
    "channel_stds": np.sqrt(second - np.square(mean)).tolist(),
    "round_trip_examples": len(pixels),
    "round_trip_psnr": float(10 * np.log10(4 / max(error, 1e-10))),
  }
  rows = np.concatenate([pixels[:PICTURES], decoded[:PICTURES]])
  columns = min(PICTURES, len(pixels))
  images.write_grid(directory / "round_trip.png", images.to_uint8(rows), columns)
  write_json(directory / "statistics.json", statistics)
  text = "latents as the model sees them: mean %.3f, std %.3f; the VAE's round trip: PSNR %.1f dB"
  log.info(text, *(statistics[name] for name in ("mean", "std", "round_trip_psnr")))
