"""Analyze ranks of weights and gradients by timestep, and rank truncation: `--mode=analyze`."""

import contextlib
import functools
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lrdit.analysis import (
  figures,
  gradient_batches,
  gradient_figures,
  gradient_spectra,
  over_steps,
  plot_style,
  truncation,
  weight_figures,
  weight_spectra,
)
from lrdit.analysis.unit_cache import UnitCache
from lrdit.config import measured_schedule
from lrdit.config.checks import require
from lrdit.config.derive import METHODS
from lrdit.config.resolve import resolve
from lrdit.config.run_config import choose_checkpoint, open_trained, open_workdir
from lrdit.data.source import Source
from lrdit.evaluation import held_out
from lrdit.experiment import Experiment
from lrdit.model import flops
from lrdit.rank import measured
from lrdit.rank.plan import RankPlan
from lrdit.runtime import parallel, store
from lrdit.runtime.errors import UserError
from lrdit.runtime.locks import owned
from lrdit.runtime.text import format_table
from lrdit.train import checkpoints, run_files

log = logging.getLogger("lrdit")

AGAIN = "it is made again"
LAYOUT = 1  # version of the sections' JSON; files of another one are made again


def count_flops(config: ConfigDict) -> dict[str, Any]:
  """Return `flops.describe_arm` of every arm, by method.

  An arm that the config does not allow is left out, with a warning.
  """
  arms = {}
  for method in METHODS:
    arm = ConfigDict(config.to_dict())
    arm.method = method
    try:
      made = Experiment(resolve(arm))
    except UserError as error:
      log.warning("the FLOPs of %s are not counted: %s", method, error)
      continue
    counts = flops.describe_arm(made.shape, made.plan, made.solver_table.t, made.num_passes)
    arms[method] = counts | {"update_macs": made.update_macs}
  return arms


def format_flops(arms: dict[str, Any]) -> str:
  """Return the counts as a table."""
  entries: dict[str, dict[str, Any]] = {}
  for method, counts in arms.items():
    buckets = counts["buckets"]
    entries[method] = {
      "timesteps": sum(bucket["timesteps"] for bucket in buckets),
      "parameters": counts["parameters"],
      "forward_macs": counts["mean_forward_macs"],
      "sampling": f"{counts['sampling_macs'] / 1e6:,.2f}",
      "update": f"{counts['update_macs'] / 1e6:,.2f}",
    }
    for number, bucket in enumerate(buckets if len(buckets) > 1 else []):
      entries[f"  {method}, bucket {number}"] = bucket | {"sampling": "", "update": ""}
  columns = {
    "timesteps": lambda e: f"{e['timesteps']:,}",
    "parameters": lambda e: f"{e['parameters']:,}",
    "million MACs: forward": lambda e: f"{e['forward_macs'] / 1e6:,.3f}",
    "sampling run": lambda e: e["sampling"],
    "optimizer, each step": lambda e: e["update"],
  }
  return format_table("of one image", columns, entries)


class Analysis:
  """The parameters and files that the sections share."""

  def __init__(
    self,
    experiment: Experiment,
    path: pathlib.Path,
    devices: parallel.Devices,
    checkpoint: str = "",
  ):
    """Read a checkpoint of the trained run in workdir `path`."""
    chosen = choose_checkpoint(path, experiment.config, checkpoint)
    self.experiment, self.devices, self._workdir = experiment, devices, path
    self.config, self._directory = experiment.config, chosen.output / "analysis"
    config = self.config
    weights = "ema" if config.sampling.use_ema else "raw"
    template = experiment.params_template
    step, restored = run_files.restore_params(chosen.run, template, [weights], chosen.step)
    self.params = restored[weights]
    self.plan, self.boundaries = self.experiment.plan, self.experiment.curriculum.boundaries
    self.key = {
      "layout": LAYOUT,
      "checkpoint_step": step,
      "checkpoint_digest": checkpoints.digest(self.params),
      "weights": weights,
      "boundaries": list(self.boundaries),
    }
    model = f"{config.method} DiT-{config.model.variant} on {config.data.name}"
    self.title = f"{model}, step {step}, {weights} weights"

  def source(self, split: str) -> Source:
    """Return the split's images or latents; raise a UserError unless they are the run's."""
    source = self.experiment.source(split)
    run_files.check_run_data(self._workdir, split, source.fingerprint)
    return source

  def run(self, name: str, settings: dict[str, Any], make: Callable[[UnitCache], dict]) -> dict:
    """Return a section's result, from its file if that has the same checkpoint and settings.

    The section depends on `settings` and the parameters alone. `make` computes the result, given
    the units that an earlier start has finished.
    """
    path, key = self._directory / f"{name}.json", store.as_json(self.key | settings)
    with contextlib.suppress(store.StoreError):  # it is missing, damaged or of other settings
      result = store.read_json(path, AGAIN)
      found = {field: result[field] for field in key if field in result}
      store.check_same(f"{path} is of another analysis", key, found, AGAIN)
      log.info("%s is up to date", path)
      return result
    cache = UnitCache(self._directory / "parts" / name, key)
    result = key | make(cache)
    store.write_json(path, result)
    cache.remove()
    log.info("wrote %s", path)
    return result

  def drawn(self, name: str) -> contextlib.AbstractContextManager[None]:
    """Turn the errors of drawing a section, whose file is damaged, into a StoreError."""
    return store.damage_of(self._directory / f"{name}.json", "delete it to make it again")

  def plot(self, name: str, figure: Any) -> None:
    """Write a figure, if there is anything to show."""
    plot_style.write_png(self._directory / f"{name}.png", figure)


def analyze_weights(run: Analysis) -> None:
  """Write weights.json and its figures."""

  def make(cache: UnitCache) -> dict[str, Any]:
    shape = run.experiment.shape
    return weight_spectra.analyze_weights(run.params, run.plan, shape, run.boundaries, cache)

  weights = run.run("weights", {}, make)
  with run.drawn("weights"):
    run.plot("weights_spectra", weight_figures.spectra(weights, run.title))
    run.plot("weights_ranks", weight_figures.ranks(weights, run.title))
    run.plot("weights_groups", weight_figures.groups(weights, run.title))


def analyze_gradients(run: Analysis) -> None:
  """Write gradients.json and its figures."""
  source, a = run.source("train"), run.config.analysis
  settings = {
    "condition_names": list(gradient_batches.CONDITIONS),
    "batch_sizes": list(a.batch_sizes),
    "subspace_rank": a.subspace_rank,
    "seed": a.seed,
    "data": source.fingerprint,
  }

  def make(cache: UnitCache) -> dict[str, Any]:
    return gradient_spectra.analyze_gradients(
      run.experiment.objective(run.devices[:1]),
      jax.device_put(run.params, run.devices[0]),
      source,
      boundaries=run.boundaries,
      batch_sizes=a.batch_sizes,
      subspace_rank=a.subspace_rank,
      microbatch=a.microbatch,
      seed=a.seed,
      cache=cache,
    )

  found = run.run("gradients", settings, make)
  with run.drawn("gradients"):
    run.plot("gradients_ranks", gradient_figures.ranks(found, run.title))
    run.plot("gradients_layers", gradient_figures.layers(found, run.title))
    for side in gradient_spectra.SIDES:
      run.plot(f"gradients_overlap_{side}", gradient_figures.overlap(found, side, run.title))


def analyze_truncation(run: Analysis) -> None:
  """Write truncation.json, its figure, and a figure of the loss by timestep group."""
  config, devices = run.config, run.devices
  source, draws = run.source("eval"), config.evaluation.draws
  names = run.experiment.factorized_layers
  truncator = truncation.Truncator(run.params, names)
  ranks = config.analysis.ranks or truncation.default_ranks(truncator.largest_rank)
  if not ranks or ranks[-1] >= truncator.largest_rank:
    raise UserError(
      f"config.analysis.ranks={tuple(ranks)} must end below {truncator.largest_rank}, the largest "
      "rank of these layers"
    )
  batch_size = config.training.batch_size
  settings = {
    "layers": names,
    "num_buckets": run.plan.num_buckets,
    **measured_schedule.describe_model(config),
    "ranks": list(ranks),
    "dtype": config.model.dtype,
    "draws": draws,
    "seed": held_out.SEED,
    "batch_size": batch_size,
    "data": source.fingerprint,
  }

  def make(cache: UnitCache) -> dict[str, Any]:
    step = run.experiment.eval_step(devices)
    slots = parallel.batch_slots(batch_size, devices)

    def losses_of(params: Any) -> held_out.HeldOutLosses:
      return held_out.held_out_losses(step, params, source, slots, batch_size, draws)

    place = functools.partial(parallel.replicate, devices=devices)
    return truncation.analyze_truncation(truncator, ranks, place, losses_of, cache)

  found = run.run("truncation", settings, make)
  with run.drawn("truncation"):
    schedule = schedule_on_map(config, run.plan, found)
    run.plot("truncation", figures.truncation(found, run.title, schedule))
    losses = {run.key["weights"]: found["baseline"]}
    run.plot("losses", figures.losses(run.boundaries, losses, run.title))


def schedule_on_map(
  config: ConfigDict, plan: RankPlan, found: dict[str, Any]
) -> tuple[str, np.ndarray] | None:
  """Return the name and (T,) values of the r(t) to plot over a rank truncation, or None.

  It is the run's own r(t), above which truncation changes nothing, or else the one that
  `rank.schedule=measured` would choose.
  """
  if plan.num_buckets > 1:
    active = np.mean([ranks.active for _, ranks in plan.layers], axis=0)
    return "the run's own r(t), mean over layers", active[plan.bucket_of_timestep]
  if any(None in row for row in found["rise"]):
    return None
  try:
    ranks = measured_schedule.measured_ranks(config, found)
  except UserError as error:
    log.warning("the heat map does not show r(t): %s", error)
    return None
  name = f"rank.schedule=measured at rank.ratio={config.rank.ratio:g}, before rounding"
  r, widths = measured.interpolate(ranks, found["boundaries"]), np.diff(found["boundaries"])
  # Interpolation between groups of unequal widths changes the mean, which a plan keeps.
  return name, r * np.average(ranks, weights=widths) / r.mean()


def _analyze_all(config: ConfigDict, workdir: str, devices: parallel.Devices | None) -> None:
  """Write steps/ranks.json and ranks.png: ranks and overlaps of every kept checkpoint."""
  sections = tuple(name for name in over_steps.SECTIONS if name in config.analysis.sections)
  rule = f"has none of {', '.join(over_steps.SECTIONS)}, which --checkpoint={run_files.ALL} follows"
  require(bool(sections), "analysis.sections", config.analysis.sections, rule)
  path, alone = open_trained(workdir, config), ConfigDict(config.to_dict())
  alone.analysis.sections = sections
  files = [f"analysis/{name}.json" for name in sections]
  measure = functools.partial(analyze, alone, workdir, devices)
  steps, found = over_steps.measure_kept(path, measure, files)
  if not steps:
    return
  by_section = dict(zip(sections, zip(*found, strict=True), strict=True))
  curves, directory = over_steps.rank_curves(steps, by_section), path / "steps"
  store.write_json(directory / "ranks.json", curves)
  weights = "averaged" if config.sampling.use_ema else "raw"
  title = f"{config.method} DiT-{config.model.variant} on {config.data.name}, {weights} weights"
  plot_style.write_png(directory / "ranks.png", figures.rank_curves(curves, title))
  log.info("wrote %s", directory / "ranks.json")


def analyze(
  config: ConfigDict, workdir: str, devices: parallel.Devices | None = None, checkpoint: str = ""
) -> None:
  """Run `--mode=analyze`: write analysis/*.json and *.png.

  Results of earlier starts for the same checkpoint and settings are kept. The section "flops" alone
  needs no trained run, and creates `workdir` if it is missing. `checkpoint` is that of
  `run_files.choose_checkpoint`, or `run_files.ALL` for the ranks of weights and gradients of all.
  """
  if checkpoint == run_files.ALL:
    _analyze_all(config, workdir, devices)
    return
  experiment = Experiment(config)
  by_name = dict(
    weights=analyze_weights, gradients=analyze_gradients, truncation=analyze_truncation
  )
  sections = [by_name[name] for name in by_name if name in config.analysis.sections]
  path = open_trained(workdir, config) if sections else open_workdir(workdir, config, create=True)
  directory = choose_checkpoint(path, config, checkpoint).output / "analysis"
  devices = devices or parallel.all_devices()
  directory.mkdir(parents=True, exist_ok=True)
  with owned(directory, "analyze"):
    run = Analysis(experiment, path, devices, checkpoint) if sections else None
    if "flops" in config.analysis.sections:
      arms = count_flops(config)
      print(format_flops(arms))
      store.write_json(directory / "flops.json", arms)
    for analyze_section in sections:
      analyze_section(run)
  log.info("wrote the analysis to %s", directory)
