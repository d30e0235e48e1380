"""The rows of the report's tables, one for each quantity."""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from lrdit.config.resolve import resolve
from lrdit.config.run_config import as_config
from lrdit.config.sample_settings import from_record
from lrdit.experiment import Experiment
from lrdit.report.arms import Arm, held_out_protocol
from lrdit.report.compare import Cell, Measurement, Quantity, Row, mark_protocols, summarize
from lrdit.report.fields import unique
from lrdit.report.runs import DAMAGED, Run, SampleSet, as_dict, finite
from lrdit.runtime.errors import UserError

# (label, format, comparison) of sample metrics, by name without the extractor.
METRICS = {
  "frechet_distance": ("Frechet distance", "loss", "ratio"),
  "kernel_distance": ("kernel distance", "loss", None),
  "kernel_distance_std": ("kernel distance, deviation over its subsets", "loss", None),
  "precision": ("precision", "share", None),
  "recall": ("recall", "share", None),
  "recognition_accuracy": ("recognition accuracy", "share", "points"),
  "recognition_accuracy_of_held_out_images": ("recognition of real held-out images", "share", None),
  "num_samples": ("images compared", "count", None),
  "num_subset_samples": ("images for kernel distance, precision and recall", "count", None),
}
# Metrics that describe the evaluation itself and are the same for every arm.
SHARED_METRICS = ("recognition_accuracy_of_held_out_images", "num_samples", "num_subset_samples")

_ACTIVE = "active / dense parameters of factorized layers, mean over t"
_BUCKETS = "each rank bucket: MACs of a forward pass, parameters"
MODEL_ROWS = (  # by attribute of `arms.Model`
  Quantity("Model", "parameters", "parameters", "count", None),
  Quantity("Model", "mean_ratio", _ACTIVE, "ratio", None),
  Quantity("Model", "mean_forward_macs", "MACs of a forward pass, mean over t", "macs", "ratio"),
  Quantity("Model", "buckets", _BUCKETS, "buckets", None),
)


def measure_rows(arms: Sequence[Arm]) -> list[Row]:
  """Return the rows of models, training, losses and samples, with incomparable values marked."""
  rows = [
    Row(**vars(quantity), cells=[Cell(getattr(arm.model, quantity.key, None)) for arm in arms])
    for quantity in MODEL_ROWS
  ]
  measured = [[list(_run_rows(run)) for run in arm.runs] for arm in arms]
  for i, (quantity, _) in enumerate(measured[0][0]):
    cells = [summarize(itertools.chain(*(run[i][1] for run in arm))) for arm in measured]
    rows.append(Row(**vars(quantity), cells=cells))
  rows += [*_target_rows(arms), *_sample_rows(arms)]
  for row in rows:
    mark_protocols(row)
  return rows


def is_shared(row: Row) -> bool:
  """Return whether a row describes the evaluation of samples rather than their quality."""
  return row.section == "Samples" and row.key.partition("_")[2] in SHARED_METRICS


def describe_metric(name: str) -> tuple[str, str, str | None]:
  """Return (label, format, comparison) of EXTRACTOR_METRIC; only Inception gives an FID."""
  extractor, _, metric = name.partition("_")
  label, form, comparison = METRICS.get(metric, (metric.replace("_", " "), "loss", None))
  if name == "inception_frechet_distance":
    label = "FID"
  return f"{label} ({extractor})", form, comparison


def _measure(value: Any, run: Run, protocol: dict[str, Any], *sample_set: Any) -> list[Measurement]:
  if finite(value) is None:
    return []
  return [Measurement(value, run.workdir, run.seed, protocol, *sample_set)]


def _run_rows(run: Run) -> Iterator[tuple[Quantity, list[Measurement]]]:
  """Yield each row's quantity and the run's measurements."""
  batch_size = as_dict(run.config.get("training")).get("batch_size")
  rate = run.images_per_second
  speed = _measure(rate, run, {"batch_size": batch_size})
  yield Quantity("Training", "training_images_per_second", "images/s", "rate", "ratio"), speed
  # Untimed windows count at the mean rate of the timed ones.
  seconds = _measure(run.images / rate if rate else None, run, {"images": run.images})
  label = "training time, steps only"
  yield Quantity("Training", "training_seconds", label, "seconds", None), seconds
  for weights, name, compared in (("ema", "EMA", "ratio"), ("raw", "raw", None)):
    losses = run.held_out(weights)
    loss = _measure(losses["loss"], run, held_out_protocol(run)) if "loss" in losses else []
    label = f"held-out loss, {name} weights"
    yield Quantity("Loss", f"held_out_loss_{weights}", label, "loss", compared), loss
  label = "training loss, last logged window"
  yield Quantity("Loss", "final_training_loss", label, "loss", None), _final_loss(run)


def _final_loss(run: Run) -> list[Measurement]:
  lines = [line for line in run.lines if line.get("train/loss") is not None]
  if not lines:
    return []
  window = lines[-1]["step"] - (lines[-2]["step"] if len(lines) > 1 else 0)
  protocol = {"step": lines[-1]["step"], "steps averaged": window}
  protocol["diffusion"] = run.config.get("diffusion")
  return _measure(lines[-1]["train/loss"], run, protocol)


def _target_rows(arms: Sequence[Arm]) -> Iterator[Row]:
  """Yield the steps and the time until the held-out loss that the first full arm ends with."""
  full = next((arm for arm in arms if arm.method == "full"), None)
  ends = [losses[-1] for run in full.runs if (losses := run.curves["eval/loss"][1])] if full else []
  if not ends or None in ends:
    return
  target, steps, seconds = statistics.fmean(ends), [], []
  for arm in arms:
    reached = [(run, _first_step(run, target)) for run in arm.runs]
    protocol = {"loss to reach": target}
    steps.append(summarize(m for run, step in reached for m in _measure(step, run, protocol)))
    times = [(run, _seconds(run, step)) for run, step in reached]
    seconds.append(summarize(m for run, time in times for m in _measure(time, run, protocol)))
  label = f"until the held-out loss that {full.name} ends with, {target:.4f} in training"
  yield Row("Loss", "steps_to_full", f"steps {label}", "count", "ratio", None, steps)
  yield Row("Loss", "seconds_to_full", f"training time {label}", "seconds", "ratio", None, seconds)


def _first_step(run: Run, target: float) -> int | None:
  """Return the first evaluated step whose held-out loss is at most `target`, if there is one."""
  steps, losses = run.curves["eval/loss"]
  found = (s for s, loss in zip(steps, losses, strict=True) if loss is not None and loss <= target)
  return next(found, None)


def _seconds(run: Run, step: int | None) -> float | None:
  batch_size = finite(as_dict(run.config.get("training")).get("batch_size"))
  known = None not in (step, batch_size, run.images_per_second)
  return step * batch_size / run.images_per_second if known else None


def _sample_rows(arms: Sequence[Arm]) -> Iterator[Row]:
  """Yield the rows of samples, in a section for each way of sampling (all seeds together)."""
  everything = [
    [(run, name, own) for run in arm.runs for name, own in run.sample_sets.items()] for arm in arms
  ]
  for settings in unique(own.settings for sets in everything for _, _, own in sets):
    alike = [[one for one in sets if one[2].settings == settings] for sets in everything]
    macs = [Cell(sampling_macs(sets[0][0], settings) if sets else None) for sets in alike]
    yield Row("Samples", "sampling_macs", "MACs of an image", "macs", "ratio", settings, macs)
    rate = [summarize(itertools.chain(*(_sampling_speed(*one) for one in sets))) for sets in alike]
    label = "images/s, without compilation"
    yield Row("Samples", "sampling_images_per_second", label, "rate", "ratio", settings, rate)
    for metric in dict.fromkeys(m for sets in alike for _, _, own in sets for m in own.metrics):
      measured = [itertools.chain(*(_metric(*one, metric) for one in sets)) for sets in alike]
      yield Row("Samples", metric, *describe_metric(metric), settings, [*map(summarize, measured)])


def sampling_macs(run: Run, settings: dict[str, Any]) -> int | None:
  """Return the MACs of sampling one image with a run's model, or None if they are unknown."""
  try:
    config = as_config(run.config)
    config.sampling.update(from_record(settings))
    return Experiment(resolve(config)).sampling_macs
  except (UserError, *DAMAGED):
    return None  # the arm's notes report a config that does not fit


def _sampling_speed(run: Run, name: str, own: SampleSet) -> list[Measurement]:
  metadata = own.metadata
  # An interrupted or cut set took time for more samples than num_samples.
  count, seconds = finite(metadata.get("num_drawn")), finite(metadata.get("wall_clock_seconds"))
  protocol = {field: metadata.get(field) for field in ("backend", "num_devices", "jax")}
  protocol["compilation"] = "not counted" if "compile_seconds" in metadata else "counted"
  rate = count / seconds if count and seconds else None
  return _measure(rate, run, protocol, name, metadata.get("seed"))


def _metric(run: Run, name: str, own: SampleSet, metric: str) -> list[Measurement]:
  protocol = {
    "checkpoint_step": own.metadata.get("checkpoint_step"),
    "extractor digest": as_dict(own.extractors.get(metric.partition("_")[0])).get("digest"),
    "reference": own.reference or None,
  }
  return _measure(own.metrics.get(metric), run, protocol, name, own.metadata.get("seed"))
