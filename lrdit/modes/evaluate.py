"""Measures a trained model: held-out loss, and the quality of exported samples."""

import contextlib
import importlib.metadata
import itertools
import json
import logging
import pathlib
import platform
from typing import Any

import jax
from ml_collections import ConfigDict

from lrdit.config.run_config import open_trained
from lrdit.data.source import Source
from lrdit.evaluation import held_out, references
from lrdit.evaluation.features import Extractor
from lrdit.experiment import Experiment
from lrdit.modes.sample import make_settings
from lrdit.runtime import cluster, parallel
from lrdit.runtime.errors import UserError
from lrdit.runtime.locks import owned
from lrdit.runtime.store import write_json
from lrdit.sampling import sample_set
from lrdit.train import checkpoints, run_files

log = logging.getLogger("lrdit")


def held_out_figures(
  config: ConfigDict, source: Source, weights: dict[str, Any], devices: parallel.Devices
) -> dict[str, Any]:
  """Losses on the held-out split, overall and by timestep group.

  Noise and timesteps are the same for every run; see `held_out`.

  Args:
    config: resolved.
    source: the held-out split.
    weights: parameters on the host by their name, "raw" or "ema".
    devices: devices to use.

  Returns:
    how they were measured, and the losses by the name of the weights.
  """
  batch_size = config.training.batch_size
  step, slots = Experiment(config).eval_step(devices), parallel.batch_slots(batch_size, devices)
  draws = config.evaluation.draws
  figures: dict[str, Any] = {
    "draws": draws,
    "examples": len(source),
    "seed": held_out.SEED,
    "batch_size": batch_size,
    "dtype": config.model.dtype,
    "data": source.fingerprint,
  }
  edges = list(itertools.pairwise(Experiment(config).curriculum.boundaries))
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
  config: ConfigDict, directory: pathlib.Path, step: int, params: Any, vae_digest: str
) -> None:
  """Refuses samples of other weights or settings than those the config and the workdir name.

  Args:
    config: resolved.
    directory: of the export.
    step: of the newest checkpoint.
    params: its weights that `sampling.use_ema` names.
    vae_digest: of the VAE that decodes; "" for pixels.

  Raises:
    UserError: the export is missing, unfinished, or of something else.
  """
  metadata, _ = sample_set.read_sample_set(directory, 1)
  drawn = Experiment(config).sampler(parallel.all_devices())
  asked = make_settings(config, drawn, step, params, vae_digest)
  asked = json.loads(json.dumps(asked | {"num_samples": config.sampling.num_samples}))
  differing = [name for name in asked if metadata.get(name) != asked[name]]
  if differing:
    shown = [f"{n} ({metadata.get(n)!r} there, {asked[n]!r} asked for)"[:120] for n in differing]
    raise UserError(
      f"the samples under {directory} are of something else: {'; '.join(shown[:3])}. Run the same "
      "command with --mode=sample first; --config.sampling.name=NAME in both keeps the others"
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
  source = Experiment(config).image_source(e.reference_split)
  result: dict[str, Any] = {"figures": {}, "extractors": {}}
  for extractor in extractors:
    path = features / f"reference_{extractor.name}_{e.reference_split}.npz"
    reference = references.open_reference(path, source, extractor, e.max_features)
    metadata, batches = sample_set.read_sample_set(directory, extractor.batch_size)
    figures = references.measure(batches, extractor, reference)
    for name, value in figures.items():
      log.info("%s %.6g", name, value)
    fingerprint = dict(reference.fingerprint)
    result["extractors"][extractor.name] = fingerprint.pop("extractor")
    result["figures"] |= figures
    result |= {"metadata": metadata, "reference": fingerprint | {"split": e.reference_split}}
  return result


def merged(kept: dict[str, Any] | None, measured: dict[str, Any]) -> dict[str, Any]:
  """New figures of an export, beside those over other extractors that still hold."""
  fields = ("metadata", "reference")
  if not kept or any(kept.get(field) != measured[field] for field in fields):
    return measured
  return measured | {field: kept[field] | measured[field] for field in ("figures", "extractors")}


def kept_samples(path: pathlib.Path, held_out_key: dict[str, Any]) -> dict[str, Any]:
  """Figures of the workdir's exports that were measured before.

  Args:
    path: of evaluation.json.
    held_out_key: "checkpoint_step" and "checkpoint_digest" that must be the same.
  """
  try:
    evaluation = json.loads(path.read_text())
    same = all(evaluation[name] == value for name, value in held_out_key.items())
    return dict(evaluation["samples"]) if same else {}
  except FileNotFoundError:
    return {}
  except (ValueError, KeyError, TypeError) as error:
    log.warning("%s is damaged (%s): its figures are not kept", path, error)
    return {}


def _software() -> dict[str, str | None]:
  versions: dict[str, str | None] = {"python": platform.python_version()}
  versions["backend"] = jax.default_backend()
  for name in ("jax", "flax", "lrdit"):
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = None
  return versions


def evaluate(config: ConfigDict, workdir: str, devices: parallel.Devices | None = None) -> None:
  """Runs `--mode=evaluate`: writes evaluation.json.

  All processes measure held-out losses, the first one alone the samples.
  Figures over other extractors, and of the workdir's other exports (other
  `sampling.name`s), stay in it as long as they are of the same checkpoint.

  Args:
    config: resolved.
    workdir: of a trained run, with an export named `sampling.name` unless
      `evaluation.extractors` is empty.
    devices: devices to use; all by default.

  Raises:
    UserError: no checkpoint or no export, other data, and the like.
  """
  path = open_trained(workdir, config)
  with contextlib.ExitStack() as opened:
    if cluster.is_first():
      opened.enter_context(owned(path, "evaluate"))
      directory = path / "samples" / config.sampling.name
      if config.evaluation.extractors and directory.is_dir():
        opened.enter_context(owned(directory, "sample"))
    _evaluate(config, path, devices or parallel.all_devices())


def _evaluate(config: ConfigDict, path: pathlib.Path, devices: parallel.Devices) -> None:
  """Measure the newest checkpoint and its export, which nobody else writes meanwhile."""
  e = config.evaluation
  template = Experiment(config).params_template
  step, weights = run_files.restore_params(path, template, ("raw", "ema"))
  source = Experiment(config).source("eval")
  run_files.check_run_data(path, "eval", source.fingerprint)
  vae_digest = run_files.read_vae_digest(path) if config.vae.downsample_factor else ""
  directory = path / "samples" / config.sampling.name
  features = pathlib.Path(e.features_dir).expanduser() if e.features_dir else path / "features"
  extractors = []
  if e.extractors and cluster.is_first():  # checked before anything takes long
    params = weights["ema" if config.sampling.use_ema else "raw"]
    check_export(config, directory, step, params, vae_digest)
    extractors = Experiment(config).extractors(features)
  losses = held_out_figures(config, source, weights, devices)
  if not cluster.is_first():
    return
  key = {"checkpoint_step": step, "checkpoint_digest": checkpoints.digest(weights["ema"])}
  samples = kept_samples(path / "evaluation.json", key)
  if extractors:
    name = config.sampling.name
    samples[name] = merged(
      samples.get(name), sample_figures(config, directory, extractors, features)
    )
  settings = {"settings": e.to_dict(), "software": _software()}
  evaluation = key | {"held_out": losses, "samples": samples} | settings
  write_json(path / "evaluation.json", evaluation)
  log.info("%s", path / "evaluation.json")
