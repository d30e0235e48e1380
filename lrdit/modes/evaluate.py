"""Measure a trained model's held-out loss and the quality of a sample set: `--mode=evaluate`."""

import contextlib
import functools
import importlib.metadata
import itertools
import logging
import pathlib
import platform
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lrdit.analysis import figures, over_steps, plot_style
from lrdit.config.run_config import choose_checkpoint, open_trained
from lrdit.data.source import Source
from lrdit.evaluation import held_out, references
from lrdit.evaluation.features import Extractor
from lrdit.experiment import Experiment
from lrdit.runtime import cluster, parallel, store
from lrdit.runtime.locks import owned
from lrdit.sampling.sample_set import read_sample_set
from lrdit.train import checkpoints, run_files

log = logging.getLogger("lrdit")

# Fields of `evaluation` that do not affect the metrics of samples.
HELD_OUT_FIELDS = ("draws", "extractors")
# Fields of a sample set's entry that hold one value per extractor.
BY_EXTRACTOR = ("figures", "extractors", "settings")


def describe_held_out(config: ConfigDict, source: Source) -> dict[str, Any]:
  """Return how held-out losses are measured, as JSON."""
  return store.as_json(
    {
      "draws": config.evaluation.draws,
      "examples": len(source),
      "seed": held_out.SEED,
      "batch_size": config.training.batch_size,
      "dtype": config.model.dtype,
      "data": source.fingerprint,
    }
  )


def held_out_metrics(
  experiment: Experiment, source: Source, weights: dict[str, Any], devices: parallel.Devices
) -> dict[str, Any]:
  """Return `describe_held_out`, and the losses by weights, overall and by timestep group.

  `weights` are host parameters by name, "raw" or "ema".
  """
  config = experiment.config
  batch_size, draws = config.training.batch_size, config.evaluation.draws
  step, slots = experiment.eval_step(devices), parallel.batch_slots(batch_size, devices)
  edges = list(itertools.pairwise(experiment.curriculum.boundaries))
  metrics = describe_held_out(config, source)
  for name, params in weights.items():
    replicated = parallel.replicate(params, devices)
    losses = held_out.held_out_losses(step, replicated, source, slots, batch_size, draws)
    groups = zip(edges, losses.group_means, losses.count, strict=True)
    metrics[name] = {
      "loss": losses.mean,
      "groups": [
        {"t_first": first, "t_last": end - 1, "loss": loss, "examples": int(count)}
        for (first, end), loss, count in groups
      ],
    }
    log.info("held-out loss %.5f (%s weights)", losses.mean, name)
  return metrics


def check_sample_set(
  experiment: Experiment, directory: pathlib.Path, step: int, params: Any, vae_digest: str
) -> dict[str, Any]:
  """Return a sample set's metadata, or raise a UserError unless it is complete and this run's.

  The newest checkpoint has number `step` and the weights `params` that `sampling.use_ema` selects.
  `vae_digest` is "" for pixels.
  """
  metadata, _ = read_sample_set(directory, 1)
  wanted = experiment.sample_settings(step, checkpoints.digest(params), vae_digest)
  wanted["num_samples"] = experiment.config.sampling.num_samples
  store.check_same(
    f"the samples under {directory} are of something else",
    wanted,
    {name: metadata[name] for name in wanted if name in metadata},
    "run the same command with --mode=sample first; --config.sampling.name=NAME in both keeps "
    "the others",
  )
  return metadata


def sample_metrics(
  experiment: Experiment,
  directory: pathlib.Path,
  extractors: list[Extractor],
  features: pathlib.Path,
) -> dict[str, Any]:
  """Return the metadata of the sample set in `directory` and its metrics against real images.

  Statistics of the real images are kept in the directory `features`.
  """
  config, e = experiment.config, experiment.config.evaluation
  source = experiment.image_source(e.reference_split)
  result: dict[str, Any] = {field: {} for field in BY_EXTRACTOR}
  for extractor in extractors:
    path = features / f"reference_{extractor.name}_{e.reference_split}.npz"
    reference = references.open_reference(path, source, extractor, e.max_features)
    metadata, batches = read_sample_set(directory, extractor.batch_size)
    metrics = references.measure(batches, extractor, reference)
    for name, value in metrics.items():
      log.info("%s %.6g", name, value)
    fingerprint = dict(reference.fingerprint)
    result["extractors"][extractor.name] = fingerprint.pop("extractor")
    result["settings"][extractor.name] = _sample_settings(config)
    result["figures"] |= metrics
    result |= {"metadata": metadata, "reference": fingerprint | {"split": e.reference_split}}
  return result


def _sample_settings(config: ConfigDict) -> dict[str, Any]:
  """Return the settings on which the metrics of given samples depend, as JSON."""
  fields = config.evaluation.to_dict().items()
  return store.as_json({name: value for name, value in fields if name not in HELD_OUT_FIELDS})


def _is_entry(own: Any) -> bool:
  """Return whether a value has the parts of an entry of this version."""
  parts = [own.get(field, {}) for field in BY_EXTRACTOR] if isinstance(own, dict) else [None]
  return all(isinstance(part, dict) for part in parts) and "metadata" in own


def is_measured(config: ConfigDict, kept: dict[str, Any] | None, metadata: dict[str, Any]) -> bool:
  """Return whether `kept` has the metrics of these samples over all extractors."""
  if kept is None or kept["metadata"] != metadata:
    return False
  settings, wanted = kept.get("settings", {}), _sample_settings(config)
  return all(settings.get(name) == wanted for name in config.evaluation.extractors)


def merged(kept: dict[str, Any] | None, measured: dict[str, Any]) -> dict[str, Any]:
  """Return new metrics of a sample set together with valid ones over other extractors."""
  if not kept or any(kept.get(field) != measured[field] for field in ("metadata", "reference")):
    return measured
  return measured | {field: kept.get(field, {}) | measured[field] for field in BY_EXTRACTOR}


def read_kept(path: pathlib.Path, key: dict[str, Any]) -> dict[str, Any]:
  """Return the kept "held_out" and "samples" (by name) of evaluation.json at `path`.

  They are empty unless the file has the "checkpoint_step" and "checkpoint_digest" of `key`.
  """
  nothing = {"held_out": {}, "samples": {}}
  if not path.exists():
    return nothing
  try:
    evaluation = store.read_json(path, "it is measured again")
    if all(evaluation[name] == value for name, value in key.items()):
      kept = {name: dict(evaluation[name]) for name in nothing}
      kept["samples"] = {k: own for k, own in kept["samples"].items() if _is_entry(own)}
      return kept
  except (store.StoreError, ValueError, KeyError, TypeError) as error:
    log.warning("%s is damaged (%s): its metrics are not kept", path, error)
  return nothing


def _software() -> dict[str, str | None]:
  versions: dict[str, str | None] = dict.fromkeys(("jax", "flax", "lrdit"))
  for name in versions:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  return {"python": platform.python_version(), "backend": jax.default_backend()} | versions


def evaluate(
  config: ConfigDict, workdir: str, devices: parallel.Devices | None = None, checkpoint: str = ""
) -> None:
  """Run `--mode=evaluate`: write evaluation.json, unless it is complete already.

  `workdir` holds a trained run, with a sample set named `sampling.name` unless
  `evaluation.extractors` is empty. All processes measure held-out losses; the first one alone
  measures the samples. Metrics of the same checkpoint over other extractors, and of other sample
  sets, stay in the file. `checkpoint` is that of `run_files.choose_checkpoint`, or
  `run_files.ALL` for the held-out losses of all.
  """
  path, devices = open_trained(workdir, config), devices or parallel.all_devices()
  if checkpoint == run_files.ALL:
    _evaluate_all(config, path, devices)
  else:
    _evaluate_one(Experiment(config), path, devices, checkpoint)


def _evaluate_one(
  experiment: Experiment, path: pathlib.Path, devices: parallel.Devices, checkpoint: str
) -> None:
  """Write the evaluation.json of one checkpoint, unless it is complete already."""
  config, chosen = experiment.config, choose_checkpoint(path, experiment.config, checkpoint)
  with contextlib.ExitStack() as opened:
    if cluster.is_first():
      chosen.output.mkdir(parents=True, exist_ok=True)
      opened.enter_context(owned(chosen.output, "evaluate"))
      directory = chosen.output / "samples" / config.sampling.name
      if config.evaluation.extractors and directory.is_dir():
        opened.enter_context(owned(directory, "sample"))
    _evaluate(experiment, path, chosen, devices)


def _evaluate_all(config: ConfigDict, path: pathlib.Path, devices: parallel.Devices) -> None:
  """Write steps/losses.json and losses.png: held-out losses of every kept checkpoint."""
  alone = ConfigDict(config.to_dict())
  alone.evaluation.extractors = ()
  # One experiment, so that the evaluation step is compiled once.
  measure = functools.partial(_evaluate_one, Experiment(alone), path, devices)
  steps, files = over_steps.measure_kept(path, measure, ("evaluation.json",))
  if not files:
    return
  found, directory = [file["held_out"] for (file,) in files], path / "steps"
  groups = [[group["t_first"], group["t_last"]] for group in found[0]["ema"]["groups"]]
  curves: dict[str, Any] = {"steps": steps, "groups": groups}
  for weights in ("raw", "ema"):
    one = [losses[weights] for losses in found]
    by_group = [[group["loss"] for group in losses["groups"]] for losses in one]
    curves[weights] = {"loss": [losses["loss"] for losses in one], "groups": by_group}
  store.write_json(directory / "losses.json", curves)
  title = f"{config.method} DiT-{config.model.variant} on {config.data.name}, averaged weights"
  plot_style.write_png(directory / "losses.png", figures.loss_curves(curves, title))
  log.info("wrote %s", directory / "losses.json")


def _evaluate(
  experiment: Experiment,
  path: pathlib.Path,
  chosen: run_files.ChosenCheckpoint,
  devices: parallel.Devices,
) -> None:
  """Measure a checkpoint and its samples, both locked by the caller."""
  config = experiment.config
  e, name, target = config.evaluation, config.sampling.name, chosen.output / "evaluation.json"
  directory, template = chosen.output / "samples" / name, experiment.params_template
  features = pathlib.Path(e.features_dir).expanduser() if e.features_dir else path / "features"
  step, weights = run_files.restore_params(chosen.run, template, ("raw", "ema"), chosen.step)
  source = experiment.source("eval")
  run_files.check_run_data(path, "eval", source.fingerprint)
  vae_digest = run_files.read_vae_digest(path) if config.vae.downsample_factor else ""
  key = {"checkpoint_step": step, "checkpoint_digest": checkpoints.digest(weights["ema"])}
  kept, extractors = read_kept(target, key), []
  if e.extractors and cluster.is_first():  # check before the slow work
    params = weights["ema" if config.sampling.use_ema else "raw"]
    metadata = check_sample_set(experiment, directory, step, params, vae_digest)
    if not is_measured(config, kept["samples"].get(name), metadata):
      extractors = experiment.extractors(features)
  losses, wanted = kept["held_out"], describe_held_out(config, source)
  has_losses = all(losses.get(field) == value for field, value in wanted.items())
  if not cluster.from_first(np.bool_(has_losses)):
    losses = held_out_metrics(experiment, source, weights, devices)
  if not cluster.is_first():
    return
  if has_losses and not extractors:
    log.info("%s is complete for step %d; delete it to measure again", target, step)
    return
  samples = kept["samples"]
  if extractors:
    measured = sample_metrics(experiment, directory, extractors, features)
    samples[name] = merged(samples.get(name), measured)
  settings = {"settings": e.to_dict(), "software": _software()}
  store.write_json(target, key | {"held_out": losses, "samples": samples} | settings)
  log.info("wrote %s", target)
