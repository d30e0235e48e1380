"""Measures a trained model: held-out loss, and the quality of exported samples."""

import itertools
import json
import logging
import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict

from lrdit import builders, checkpoints, export, held_out, parallel, references
from lrdit.errors import UserError
from lrdit.extractors import Extractor
from lrdit.workdir import open_workdir, write_json

log = logging.getLogger("lrdit")


def held_out_figures(
  config: ConfigDict, weights: dict[str, Any], devices: parallel.Devices
) -> dict[str, Any]:
  """Losses on the held-out split, overall and by timestep group.

  Noise and timesteps are the same for every run; see `held_out`.

  Args:
    config: resolved.
    weights: parameters on the host by their name, "raw" or "ema".
    devices: devices to use.

  Returns:
    how they were measured, and the losses by the name of the weights.
  """
  source, batch_size = builders.make_source(config, "eval"), config.training.batch_size
  step, slots = builders.make_eval_step(config, devices), parallel.batch_slots(batch_size, devices)
  draws = config.evaluation.draws
  figures: dict[str, Any] = {
    "draws": draws,
    "examples": len(source),
    "seed": held_out.SEED,
    "batch_size": batch_size,
  }
  edges = list(itertools.pairwise(builders.make_curriculum(config).boundaries))
  for name, params in weights.items():
    losses = held_out.held_out_losses(
      step, parallel.replicate(params, devices), source, slots, batch_size, draws
    )
    groups = zip(edges, losses.group_means, losses.count, strict=True)
    figures[name] = {
      "loss": losses.mean,
      "groups": [
        {"t_first": first, "t_last": end - 1, "loss": loss, "examples": int(count)}
        for (first, end), loss, count in groups
      ],
    }
    log.info("held-out loss %.5f (%s weights)", losses.mean, name)
  return figures


def check_export(
  config: ConfigDict, directory: pathlib.Path, step: int, weights: dict[str, Any]
) -> None:
  """Refuses samples of other parameters than those the config and the workdir name.

  Args:
    config: resolved.
    directory: of the export.
    step: of the newest checkpoint.
    weights: its parameters, by name.

  Raises:
    UserError: the export is missing, unfinished, or of other weights.
  """
  metadata, _ = export.iterate_export(directory, 1)
  name = "ema" if config.sampling.use_ema else "raw"
  found = (metadata["checkpoint_step"], metadata["weights"])
  again = "run the same command with --mode=sample again"
  if found != (step, name):
    raise UserError(
      f"the samples under {directory} are of step {found[0]} ({found[1]} weights), not of step "
      f"{step} ({name}): {again}"
    )
  if metadata["checkpoint_digest"] != checkpoints.digest(weights[name]):
    raise UserError(
      f"the samples under {directory} are of another run's step {step} than the checkpoint there: "
      f"{again}"
    )


def sample_figures(
  config: ConfigDict, directory: pathlib.Path, extractors: list[Extractor], features: pathlib.Path
) -> dict[str, Any]:
  """An export's metadata and its figures against real images.

  Args:
    config: resolved.
    directory: of the export.
    extractors: what the images are compared by.
    features: where the statistics of the real images are kept.

  Raises:
    UserError: the export is damaged or too small, or the kept statistics are
      of something else.
  """
  e = config.evaluation
  source = builders.make_image_source(config, e.reference_split)
  result: dict[str, Any] = {"figures": {}, "extractors": {}}
  for extractor in extractors:
    path = features / f"reference_{extractor.name}_{e.reference_split}.npz"
    reference = references.open_reference(path, source, extractor, e.max_features)
    metadata, batches = export.iterate_export(directory, extractor.batch_size)
    figures = references.measure(batches, extractor, reference)
    for name, value in figures.items():
      log.info("%s %.6g", name, value)
    identity = dict(reference.identity)
    result["extractors"][extractor.name] = identity.pop("extractor")
    result["figures"] |= figures
    result |= {"metadata": metadata, "reference": identity | {"split": e.reference_split}}
  return result


def kept_samples(path: pathlib.Path, step: int) -> dict[str, Any]:
  """Figures of exports of the same checkpoint, measured before."""
  try:
    evaluation = json.loads(path.read_text())
    return dict(evaluation["samples"]) if evaluation["checkpoint_step"] == step else {}
  except (OSError, ValueError, KeyError, TypeError):
    return {}


def evaluate(config: ConfigDict, workdir: str, devices: parallel.Devices | None = None) -> None:
  """Runs `--mode=evaluate`: writes evaluation.json.

  Figures of the workdir's other exports (other `sampling.name`s) stay in it as
  long as they are of the same checkpoint.

  Args:
    config: resolved.
    workdir: of a trained run, with an export named `sampling.name` unless
      `evaluation.extractors` is empty.
    devices: devices to use; all by default.

  Raises:
    UserError: no checkpoint or no export, and the like.
  """
  devices, e = devices or jax.local_devices(), config.evaluation
  path = open_workdir(workdir, config, create=False)
  restored = checkpoints.Checkpoints(path)
  template, weights = builders.params_template(config), {}
  for name in ("raw", "ema"):
    step, weights[name] = restored.restore_params(template, use_ema=name == "ema")
  restored.close()
  directory = path / "samples" / config.sampling.name
  if e.extractors:  # checked before anything takes long
    check_export(config, directory, step, weights)
  evaluation = {
    "checkpoint_step": step,
    "held_out": held_out_figures(config, weights, devices),
    "samples": kept_samples(path / "evaluation.json", step),
  }
  if e.extractors:
    features = pathlib.Path(e.features_dir).expanduser() if e.features_dir else path / "features"
    extractors = builders.make_extractors(config, features)
    figures = sample_figures(config, directory, extractors, features)
    evaluation["samples"][config.sampling.name] = figures
  write_json(path / "evaluation.json", evaluation)
  log.info("%s", path / "evaluation.json")
