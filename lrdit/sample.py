"""Exports samples of a trained model for evaluation by any tool."""

import json
import logging
import pathlib
import shutil
import time
import zipfile
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lrdit import builders, images, parallel, sampler
from lrdit.checkpoints import Checkpoints
from lrdit.errors import UserError
from lrdit.progress import make_bar
from lrdit.workdir import atomic_path, open_workdir, read_data, write_json

log = logging.getLogger("lrdit")

GRID_SIZE = 100
GRID_COLUMNS = 10


def make_labels(config: ConfigDict) -> np.ndarray | None:
  """(num_samples,) int32 by the label rule; None for an unconditional model."""
  s, classes = config.sampling, config.data.num_classes
  index = np.arange(s.num_samples)
  if not classes:
    return None
  if s.labels == "balanced":
    return sampler.balanced_labels(index, classes)
  if s.labels == "random":
    return sampler.random_labels(s.seed, index, classes)
  return np.full(s.num_samples, int(s.labels), np.int32)


def make_metadata(
  config: ConfigDict, drawn: sampler.Sampler, step: int, seconds: float, num_devices: int
) -> dict[str, Any]:
  """What a figure measured on these samples must be quoted with."""
  s, plan = config.sampling, drawn.model.plan
  visited = [(bucket, end - first) for bucket, first, end in drawn.segments]
  return {
    "checkpoint_step": step,
    "weights": "ema" if s.use_ema else "raw",
    "method": config.method,
    "num_samples": s.num_samples,
    "solver": s.solver,
    "num_steps": s.num_steps,
    "eta": s.eta,
    "guidance_scale": s.guidance_scale,
    "clip_x_0": s.clip_x_0,
    "seed": s.seed,
    "labels": s.labels if config.data.num_classes else None,
    "dtype": config.model.dtype,
    "rank_table": {name: list(ranks.active) for name, ranks in plan.layers},
    "solver_steps_per_bucket": [
      sum(n for b, n in visited if b == bucket) for bucket in range(plan.num_buckets)
    ],
    "wall_clock_seconds": seconds,
    "num_devices": num_devices,
    "backend": jax.default_backend(),
    "jax": jax.__version__,
  }


def write_export(
  directory: pathlib.Path, samples: np.ndarray, labels: np.ndarray | None, png_files: bool
) -> None:
  """Writes samples.npz (the ADM evaluator's layout), grid.png and PNG files.

  Args:
    directory: exists.
    samples: (N, H, W, 1 or 3) uint8.
    labels: (N,) or None.
    png_files: also write png/000000.png and so on.
  """
  rgb = images.to_rgb(samples)
  arrays = {"arr_0": rgb} if labels is None else {"arr_0": rgb, "arr_1": labels.astype(np.int64)}
  with atomic_path(directory / "samples.npz") as temporary, temporary.open("wb") as file:
    np.savez(file, **arrays)
  images.write_grid(directory / "grid.png", samples[:GRID_SIZE], GRID_COLUMNS)
  if png_files:
    (directory / "png").mkdir()
    for i, image in enumerate(rgb):
      images.write_png(directory / "png" / f"{i:06d}.png", image)


def sample(config: ConfigDict, workdir: str, devices: parallel.Devices | None = None) -> None:
  """Runs `--mode=sample`: exactly `sampling.num_samples` images.

  Args:
    config: resolved.
    workdir: of a trained run.
    devices: devices to sample on; all by default.

  Raises:
    UserError: no checkpoint, another model's workdir, and the like.
  """
  devices = devices or jax.local_devices()
  drawn = builders.make_sampler(config, devices)
  path = open_workdir(workdir, config, create=False)
  checkpoints = Checkpoints(path)
  step, params = checkpoints.restore_params(
    builders.params_template(config), config.sampling.use_ema
  )
  checkpoints.close()
  vae_digest = read_data(path)["train"]["vae"] if config.vae.downsample_factor else ""
  to_pixels = builders.make_to_pixels(config, devices, vae_digest)
  directory = path / "samples" / config.sampling.name
  directory.mkdir(parents=True, exist_ok=True)
  # What an earlier export left would not fit; the metadata is written last, so
  # an export without it is not finished.
  (directory / "metadata.json").unlink(missing_ok=True)
  shutil.rmtree(directory / "png", ignore_errors=True)
  labels, batches = make_labels(config), []
  start = time.perf_counter()
  with make_bar(config.sampling.num_samples, 0, "image") as bar:
    for batch in drawn.sample(params, labels, config.sampling.num_samples):
      batches.append(to_pixels(batch))
      bar.update(len(batch))
  seconds = time.perf_counter() - start
  write_export(directory, np.concatenate(batches), labels, config.sampling.png_files)
  metadata = make_metadata(config, drawn, step, seconds, len(devices))
  write_json(directory / "metadata.json", metadata)
  log.info(
    "%d samples of step %d in %.1f s: %s", config.sampling.num_samples, step, seconds, directory
  )


def load_export(directory: pathlib.Path) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any]]:
  """(samples (N, H, W, 3) uint8, labels or None, metadata) of an export.

  Raises:
    UserError: there is none, or it is damaged.
  """
  again = "run the same command with --mode=sample"
  if not (directory / "metadata.json").exists():
    raise UserError(f"no samples under {directory}: {again} first")
  try:
    metadata = json.loads((directory / "metadata.json").read_text())
    with np.load(directory / "samples.npz") as arrays:
      return arrays["arr_0"], arrays.get("arr_1"), metadata
  except (ValueError, KeyError, EOFError, FileNotFoundError, zipfile.BadZipFile) as error:
    raise UserError(f"the samples under {directory} are damaged: {again} again") from error
