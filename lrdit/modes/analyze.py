"""Ranks of a trained model's weights and gradients by timestep, and what its rank is worth."""

import functools
import json
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lrdit.analysis import figures, gradient_spectra, truncation, weight_spectra
from lrdit.analysis.unit_cache import UnitCache
from lrdit.benchmark.arms import arm_config
from lrdit.benchmark.results import format_table
from lrdit.config import measured_schedule
from lrdit.config.run_config import open_trained
from lrdit.data.source import Source
from lrdit.evaluation import held_out
from lrdit.experiment import Experiment
from lrdit.model import flops
from lrdit.rank import measured
from lrdit.rank.plan import RankPlan
from lrdit.runtime import parallel
from lrdit.runtime.errors import UserError
from lrdit.runtime.locks import owned
from lrdit.runtime.progress import make_bar
from lrdit.runtime.store import write_json
from lrdit.train import checkpoints, run_files

log = logging.getLogger("lrdit")

ARMS = ("full", "static", "adaptive")
LAYOUT = 1  # of the sections' JSON; files of another one are made again


def count_flops(config: ConfigDict) -> dict[str, Any]:
  """Parameters and multiply-accumulates of every arm, by rank bucket and sampling run.

  Args:
    config: resolved, of any arm.

  Returns:
    As JSON by arm: "parameters" as allocated, "buckets" of `flops.describe_buckets`, and of
    one image "mean_forward_macs" over timesteps and "sampling_macs" of a whole sampling run.
    An arm that cannot be made of these fields is left out, with a warning.
  """
  arms = {}
  for arm in ARMS:
    try:
      own = arm_config(config, arm)
    except UserError as error:
      log.warning("%s is not counted: %s", arm, error)
      continue
    shape, plan = Experiment(own).shape, Experiment(own).plan
    t, guidance_scale = Experiment(own).solver_table.t, own.sampling.guidance_scale
    arms[arm] = {
      "parameters": flops.num_parameters(shape, plan),
      "buckets": flops.describe_buckets(shape, plan),
      "mean_forward_macs": flops.mean_forward_macs(shape, plan),
      "sampling_macs": flops.sampling_macs(shape, plan, t, 1, guidance_scale),
    }
  return arms


def format_flops(arms: dict[str, Any]) -> str:
  """The counts as a table."""
  entries: dict[str, dict[str, Any]] = {}
  for arm, counts in arms.items():
    buckets = counts["buckets"]
    entries[arm] = {
      "timesteps": sum(bucket["timesteps"] for bucket in buckets),
      "parameters": counts["parameters"],
      "forward_macs": counts["mean_forward_macs"],
      "sampling": f"{counts['sampling_macs'] / 1e6:,.2f}",
    }
    for number, bucket in enumerate(buckets if len(buckets) > 1 else []):
      entries[f"  {arm}, bucket {number}"] = bucket | {"sampling": ""}
  columns = {
    "timesteps": lambda e: f"{e['timesteps']:,}",
    "parameters": lambda e: f"{e['parameters']:,}",
    "million MACs: forward": lambda e: f"{e['forward_macs'] / 1e6:,.3f}",
    "sampling run": lambda e: e["sampling"],
  }
  return format_table("of one image", columns, entries)


class Analysis:
  """What the sections share: the parameters, the files and how they are named."""

  def __init__(self, config: ConfigDict, workdir: str, devices: parallel.Devices):
    """Reads the checkpoint.

    Args:
      config: resolved.
      workdir: of a trained run.
      devices: to use.
    """
    path = open_trained(workdir, config)
    template, use_ema = Experiment(config).params_template, config.sampling.use_ema
    self.config, self.devices = config, devices
    weights = "ema" if use_ema else "raw"
    self.step, restored = run_files.restore_params(path, template, [weights])
    self.params = restored[weights]
    self.directory = path / "analysis"
    self.directory.mkdir(exist_ok=True)
    self.plan, self.shape = Experiment(config).plan, Experiment(config).shape
    self.boundaries = Experiment(config).curriculum.boundaries
    self.about = {
      "layout": LAYOUT,
      "checkpoint_step": self.step,
      "checkpoint_digest": checkpoints.digest(self.params),
      "weights": weights,
      "boundaries": list(self.boundaries),
    }
    variant = f"DiT-{config.model.variant} on {config.data.name}"
    self.title = f"{config.method} {variant}, step {self.step}, {weights} weights"
    self._path = path

  def source(self, split: str) -> Source:
    """The split's images or latents; refused if they are not the run's."""
    source = Experiment(self.config).source(split)
    run_files.check_run_data(self._path, split, source.fingerprint)
    return source

  def run(self, name: str, settings: dict[str, Any], make: Callable[[UnitCache], dict]) -> dict:
    """A section's result, computed where its file is not of the same checkpoint and settings.

    Args:
      name: of the section and its JSON file.
      settings: all the section depends on beside the parameters.
      make: computes it, from the parts that an earlier start has left.
    """
    path, key = self.directory / f"{name}.json", json.loads(json.dumps(self.about | settings))
    try:
      result = json.loads(path.read_text())
      if all(result[field] == value for field, value in key.items()):
        log.info("%s is there", path)
        return result
    except (FileNotFoundError, ValueError, KeyError, TypeError):
      pass  # missing, damaged, or of an older layout: it is made again
    parts = UnitCache(self.directory / "parts" / name, key)
    result = key | make(parts)
    write_json(path, result)
    parts.remove()
    log.info("%s", path)
    return result

  def plot(self, name: str, figure: Any) -> None:
    """Writes a picture, if there is anything to show."""
    figures.write_png(self.directory / f"{name}.png", figure)


def analyse_weights(analysis: Analysis) -> None:
  """Writes weights.json and its plots."""

  def make(parts: UnitCache) -> dict[str, Any]:
    a = analysis
    return weight_spectra.analyse_weights(a.params, a.plan, a.shape, a.boundaries, parts, make_bar)

  weights = analysis.run("weights", {}, make)
  analysis.plot("weights_spectra", figures.weight_spectra(weights, analysis.title))
  analysis.plot("weights_ranks", figures.weight_ranks(weights, analysis.title))
  analysis.plot("weights_groups", figures.weight_groups(weights, analysis.title))


def analyse_gradients(analysis: Analysis) -> None:
  """Writes gradients.json and its plots."""
  config, a = analysis.config, analysis.config.analysis
  source = analysis.source("train")
  settings = {
    "condition_names": list(gradient_spectra.CONDITIONS),
    "batch_sizes": list(a.batch_sizes),
    "subspace_rank": a.subspace_rank,
    "seed": a.seed,
    "data": source.fingerprint,
  }

  def make(parts: UnitCache) -> dict[str, Any]:
    objective = Experiment(config).objective(analysis.devices[:1])
    return gradient_spectra.analyse_gradients(
      objective,
      jax.device_put(analysis.params, analysis.devices[0]),
      source,
      boundaries=analysis.boundaries,
      batch_sizes=a.batch_sizes,
      subspace_rank=a.subspace_rank,
      microbatch=a.microbatch,
      seed=a.seed,
      parts=parts,
    )

  found = analysis.run("gradients", settings, make)
  analysis.plot("gradients_ranks", figures.gradient_ranks(found, analysis.title))
  analysis.plot("gradients_layers", figures.gradient_layers(found, analysis.title))
  for side in gradient_spectra.SIDES:
    figure = figures.gradient_overlap(found, side, analysis.title)
    analysis.plot(f"gradients_overlap_{side}", figure)


def analyse_truncation(analysis: Analysis) -> None:
  """Writes truncation.json and its plots, the loss by timestep group among them."""
  config, devices = analysis.config, analysis.devices
  source, draws = analysis.source("eval"), config.evaluation.draws
  names = Experiment(config).factorised_layers
  truncator = truncation.Truncator(analysis.params, names)
  ranks = config.analysis.ranks or truncation.default_ranks(truncator.largest_rank)
  if not ranks or ranks[-1] >= truncator.largest_rank:
    raise UserError(
      f"config.analysis.ranks={tuple(ranks)} must end below {truncator.largest_rank}, the largest "
      "rank that these layers have"
    )
  batch_size = config.training.batch_size
  settings = {
    "layers": names,
    "num_buckets": analysis.plan.num_buckets,
    **measured_schedule.describe_model(config),
    "ranks": list(ranks),
    "dtype": config.model.dtype,
    "draws": draws,
    "seed": held_out.SEED,
    "batch_size": batch_size,
    "data": source.fingerprint,
  }

  def make(parts: UnitCache) -> dict[str, Any]:
    step = Experiment(config).eval_step(devices)
    slots = parallel.batch_slots(batch_size, devices)

    def losses_of(params: Any) -> held_out.HeldOutLosses:
      return held_out.held_out_losses(step, params, source, slots, batch_size, draws)

    place = functools.partial(parallel.replicate, devices=devices)
    return truncation.analyse_truncation(truncator, ranks, place, losses_of, parts, make_bar)

  found = analysis.run("truncation", settings, make)
  drawn = schedule_on_map(config, analysis.plan, found)
  analysis.plot("truncation", figures.truncation(found, analysis.title, drawn))
  losses = {analysis.about["weights"]: found["baseline"]}
  analysis.plot("losses", figures.losses(analysis.boundaries, losses, analysis.title))


def schedule_on_map(
  config: ConfigDict, plan: RankPlan, found: dict[str, Any]
) -> tuple[str, np.ndarray] | None:
  """(name, (T,) r(t)): of a run without one, what `rank.schedule=measured` would take.

  Above the r(t) that a run has, cutting changes nothing, and nothing else follows from it.
  None where no r(t) follows.
  """
  if plan.num_buckets > 1:
    active = np.mean([ranks.active for _, ranks in plan.layers], axis=0)
    return "the run's own r(t), mean over layers", active[plan.bucket_of_timestep]
  if any(None in row for row in found["rise"]):
    return None
  try:
    ranks = measured_schedule.measured_ranks(config, found)
  except UserError as error:
    log.warning("the heat map is without r(t): %s", error)
    return None
  name = f"rank.schedule=measured at rank.ratio={config.rank.ratio:g}, before rounding"
  r, widths = (
    measured.interpolate(ranks, found["boundaries"]),
    np.diff(found["boundaries"]),
  )
  # A plan keeps the mean, which interpolation between groups of unequal widths does not.
  return name, r * np.average(ranks, weights=widths) / r.mean()


def analyze(config: ConfigDict, workdir: str, devices: parallel.Devices | None = None) -> None:
  """Runs `--mode=analyze`: writes analysis/*.json and *.png.

  What an earlier start has finished for the same checkpoint and settings is kept.

  Args:
    config: resolved.
    workdir: of a trained run.
    devices: devices to use; all by default.

  Raises:
    UserError: no checkpoint, other data, and the like.
  """
  analysis = Analysis(config, workdir, devices or parallel.all_devices())
  with owned(analysis.directory, "analyze"):
    _analyse_sections(config, analysis)
  log.info("%s", analysis.directory)


def _analyse_sections(config: ConfigDict, analysis: Analysis) -> None:
  sections = config.analysis.sections
  if "flops" in sections:
    arms = count_flops(config)
    print(format_flops(arms))
    write_json(analysis.directory / "flops.json", arms)
  for name, analyse in (
    ("weights", analyse_weights),
    ("gradients", analyse_gradients),
    ("truncation", analyse_truncation),
  ):
    if name in sections:
      analyse(analysis)
