"""From a ConfigDict to objects: configs are checked here and go no further."""

import dataclasses
import functools
import itertools
import logging
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float
from ml_collections import ConfigDict

from lrdit.analysis import unit_cache
from lrdit.data import images, latents, pipeline, tfds
from lrdit.data.source import DataOptions, Source
from lrdit.diffusion import process, solvers
from lrdit.evaluation import classifier, features, inception
from lrdit.model import dit, vae, vae_weights
from lrdit.rank import measured, plan, schedules, timesteps
from lrdit.runtime import parallel, workdir
from lrdit.runtime.errors import UserError
from lrdit.runtime.paths import local_path
from lrdit.sampling.sampler import Sampler, SamplerSettings
from lrdit.train import curriculum, optimizer, training_step

log = logging.getLogger("lrdit")

METHODS = ("full", "static", "adaptive")
MEASURED = "measured"  # the schedule that an analysis gives
ANALYSES = ("flops", "weights", "gradients", "truncation")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# From `make_to_pixels`.
ToPixels = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def _require(condition: bool, field: str, value: Any, rule: str) -> None:
  if not condition:
    raise UserError(f"config.{field}={value!r} {rule}")


def _check_choices(config: ConfigDict) -> None:
  """Fields that take one of a few words."""
  choices = {
    "method": METHODS,
    "data.name": tuple(pipeline.LOADERS),
    "model.dtype": tuple(DTYPES),
    "rank.schedule": (*schedules.SCHEDULES, MEASURED),
    "rank.match": plan.MATCHES,
    "rank.compute": timesteps.COMPUTES,
    "diffusion.noise_schedule": process.NOISE_SCHEDULES,
    "diffusion.prediction": process.PREDICTIONS,
    "diffusion.loss_weighting": process.LOSS_WEIGHTINGS,
    "curriculum.start": curriculum.STARTS,
    "optimizer.name": optimizer.OPTIMIZERS,
    "optimizer.decay": optimizer.DECAYS,
    "sampling.solver": solvers.SOLVERS,
    "evaluation.reference_split": ("train", "eval"),
  }
  for field, allowed in choices.items():
    value = _get(config, field)
    _require(value in allowed, field, value, f"is unknown: use one of {', '.join(allowed)}")
  for name in config.evaluation.extractors:
    known = ", ".join(features.EXTRACTORS)
    rule = f"names an unknown extractor {name!r}: use some of {known}"
    _require(
      name in features.EXTRACTORS, "evaluation.extractors", config.evaluation.extractors, rule
    )


def _get(config: ConfigDict, field: str) -> Any:
  for part in field.split("."):
    config = getattr(config, part)
  return config


# Whole numbers are steps, examples or sizes, which are counted in int32.
MOST = 2**31 - 1
# Above it, a number is one in float32 too, and not 0.
SMALLEST = 1e-37

# field: (lowest, highest) allowed values, both inclusive.
RANGES = {
  "seed": (0, 2**32 - 1),
  "data.image_size": (1, 2**16),
  "data.num_channels": (1, MOST),
  "data.num_classes": (0, MOST),
  "data.cache_gib": (0.0, 1e6),
  "vae.downsample_factor": (0, MOST),
  "vae.latent_channels": (1, MOST),
  "vae.batch_size": (1, 2**20),
  "model.hidden_size": (0, 2**16),
  "model.depth": (0, 10_000),
  "model.num_heads": (0, MOST),
  "model.patch_size": (0, MOST),
  "model.class_dropout_rate": (0.0, 1.0),
  "rank.num_buckets": (1, 1000),
  "rank.multiple_of": (1, MOST),
  "diffusion.num_train_timesteps": (2, 1_000_000),
  "curriculum.patience": (1, MOST),
  "curriculum.check_every_steps": (1, MOST),
  "optimizer.warmup_steps": (0, MOST),
  "optimizer.weight_decay": (0.0, math.inf),
  "optimizer.grad_clip_norm": (0.0, math.inf),
  "training.batch_size": (1, 2**20),
  "training.num_steps": (1, MOST),
  "training.log_every_steps": (1, MOST),
  "training.eval_every_steps": (0, MOST),
  "training.sample_every_steps": (0, MOST),
  "checkpoint.every_steps": (1, MOST),
  "checkpoint.keep": (1, MOST),
  "sampling.num_samples": (1, MOST),
  "sampling.batch_size": (1, 2**20),
  "sampling.eta": (0.0, 1.0),
  "sampling.guidance_scale": (0.0, 1000.0),
  "sampling.seed": (0, 2**32 - 1),
  "evaluation.draws": (1, MOST),
  "evaluation.max_features": (10, MOST),
  "evaluation.classifier_steps": (0, MOST),
  "analysis.subspace_rank": (1, MOST),
  "analysis.microbatch": (1, 2**20),
  "analysis.seed": (0, 2**32 - 1),
  "benchmark.rounds": (1, MOST),
  "benchmark.steps": (1, MOST),
  "benchmark.sampling_runs": (0, MOST),
  "benchmark.compile_threads": (1, 1024),
  "benchmark.matmul_size": (0, MOST),
}


def _check_ranges(config: ConfigDict) -> None:
  """Fields that are numbers within bounds; NaN fits no bound."""
  for field, (low, high) in RANGES.items():
    value = _get(config, field)
    kind = "a number" if isinstance(low, float) else "a whole number"
    fits = isinstance(value, int if isinstance(low, int) else int | float)
    _require(fits and not isinstance(value, bool), field, value, f"must be {kind}")
    bound = f"in [{low}, {high}]"
    if high in (MOST, math.inf):
      beyond = "finite" if high == math.inf else f"at most {high}"
      bound = f"at least {low}" if value < low else beyond
    _require(low <= value <= high and math.isfinite(value), field, value, f"must be {bound}")
  for field in ("rank.ratio", "rank.min_ratio"):
    value = _get(config, field)
    _require(0 < value <= 1, field, value, "must lie in (0, 1]")
  o = config.optimizer
  rule = "must be above 0 and below 1e30, and not so small that it is 0 in float32"
  _require(SMALLEST < o.learning_rate < 1e30, "optimizer.learning_rate", o.learning_rate, rule)
  norm = o.grad_clip_norm
  _require(norm == 0 or SMALLEST < norm < 1e30, "optimizer.grad_clip_norm", norm, f"{rule}; or 0")
  _require(o.weight_decay < 1e30, "optimizer.weight_decay", o.weight_decay, "must be below 1e30")
  channels = config.data.num_channels
  _require(channels in (1, 3), "data.num_channels", channels, "must be 3, or 1 for grey")
  decay = config.optimizer.ema_decay
  _require(0 <= decay < 1, "optimizer.ema_decay", decay, "must lie in [0, 1)")


# Fields that name files or directories, or nothing.
PATHS = (
  "data.data_dir",
  "vae.path",
  "vae.latents_dir",
  "rank.analysis",
  "evaluation.features_dir",
  "evaluation.inception_weights",
)


def _check_paths(config: ConfigDict) -> None:
  for field in PATHS:
    local_path(f"config.{field}", _get(config, field))
  for field in ("vae.path", "vae.latents_dir"):
    rule = "is not used by a model on pixels, which config.vae.downsample_factor=0 says: leave it"
    _require(_has_vae(config) or not _get(config, field), field, _get(config, field), f"{rule} out")


def _check_model(config: ConfigDict) -> None:
  """Sizes that must divide each other."""
  model, data, factor = config.model, config.data, config.vae.downsample_factor
  if factor and data.image_size % factor:
    raise UserError(
      f"config.data.image_size={data.image_size} is not a multiple of "
      f"config.vae.downsample_factor={factor}"
    )
  size = input_size(config)
  if size % model.patch_size:
    raise UserError(
      f"config.data.image_size={data.image_size} "
      f"{f'({size} latent pixels) ' if factor else ''}is not a multiple of "
      f"config.model.patch_size={model.patch_size}: choose a variant with another patch"
    )
  if model.hidden_size % model.num_heads:
    raise UserError(
      f"config.model.hidden_size={model.hidden_size} is not a multiple of "
      f"config.model.num_heads={model.num_heads}"
    )
  _require(
    model.hidden_size % 4 == 0,
    "model.hidden_size",
    model.hidden_size,
    "must be a multiple of 4 (the position embedding has four parts)",
  )


def _check_sampling(config: ConfigDict) -> None:
  sampling, classes = config.sampling, config.data.num_classes
  if sampling.guidance_scale != 1.0:
    _require(
      classes > 0,
      "sampling.guidance_scale",
      sampling.guidance_scale,
      "needs classes, and config.data.num_classes is 0: use 1",
    )
    _require(
      config.model.class_dropout_rate > 0,
      "sampling.guidance_scale",
      sampling.guidance_scale,
      "needs a null class, which config.model.class_dropout_rate=0 never trains: use 1",
    )
  _require(
    sampling.eta == 0 or sampling.solver == "ddim",
    "sampling.eta",
    sampling.eta,
    f"is noise of ddim, and config.sampling.solver={sampling.solver!r} has none to set: use 0",
  )
  _require(
    not (sampling.clip_x_0 and config.vae.downsample_factor),
    "sampling.clip_x_0",
    sampling.clip_x_0,
    "would cut latents, which are not bounded by 1 as pixels are: use False",
  )
  labels = sampling.labels
  known = labels in ("balanced", "random") or (labels.isdecimal() and int(labels) < max(classes, 1))
  _require(
    known, "sampling.labels", labels, f"is unknown: use balanced, random or 0 to {classes - 1}"
  )
  name = sampling.name
  _require(
    name not in ("", ".", "..") and "/" not in name and name.isprintable() and len(name) <= 100,
    "sampling.name",
    name,
    "must be the name of a directory to make, without '/', of at most 100 printable characters",
  )


def _check_boundaries(config: ConfigDict) -> None:
  """Groups of timesteps that begin at 0, rise and, for a curriculum, end at T."""
  field, value = "curriculum.boundaries", config.curriculum.boundaries
  _require(
    len(value) > 1 and all(type(b) is int for b in value),
    field,
    value,
    "must be two or more whole numbers",
  )
  _require(value[0] == 0, field, value, "must start at 0")
  rises = all(a < b for a, b in itertools.pairwise(value))
  _require(rises, field, value, "must rise: leave out what is not above the number before it")
  total = config.diffusion.num_train_timesteps
  _require(
    value[-1] == total or not config.curriculum.enabled,
    field,
    value,
    f"must end at config.diffusion.num_train_timesteps={total}: use "
    f"{curriculum.scale_boundaries(value, total)}",
  )


def _check_analysis(config: ConfigDict) -> None:
  """Sections that exist, and rising numbers."""
  a = config.analysis
  for name in a.sections:
    rule = f"names an unknown section {name!r}: use some of {', '.join(ANALYSES)}"
    _require(name in ANALYSES, "analysis.sections", a.sections, rule)
  for field, least, value in (("batch_sizes", 1, a.batch_sizes), ("ranks", 0, a.ranks)):
    whole = all(type(x) is int and 1 <= x <= MOST for x in value)
    rises = whole and all(x < y for x, y in itertools.pairwise(value))
    _require(
      rises and len(value) >= least,
      f"analysis.{field}",
      value,
      f"must be rising numbers up to {MOST}",
    )
  _require(a.batch_sizes[-1] > 1, "analysis.batch_sizes", a.batch_sizes, "must end above 1")


def _fill_in_measured_schedule(config: ConfigDict) -> None:
  """Reads r(t) from the analysis, unless the config holds it already."""
  rank, total = config.rank, config.diffusion.num_train_timesteps
  if rank.schedule != MEASURED:
    for field in ("analysis", "measured_shares", "measured_boundaries"):
      _require(not rank[field], f"rank.{field}", rank[field], "needs rank.schedule=measured")
    return
  rule = "must be activated where rank.schedule=measured: its mean is what is met"
  _require(rank.match == "activated", "rank.match", rank.match, rule)
  if not rank.measured_shares:
    rule = "is missing: name analysis/truncation.json of a run after --mode=analyze"
    _require(rank.analysis != "", "rank.analysis", rank.analysis, rule)
    found = unit_cache.read_truncation(rank.analysis)
    ranks = measured_ranks(config, found)
    rank.measured_shares = tuple(float(r / ranks.max()) for r in ranks)
    rank.measured_boundaries = tuple(found["boundaries"])
  shares, boundaries = rank.measured_shares, rank.measured_boundaries
  are_shares = all(isinstance(share, int | float) and 0 < share <= 1 for share in shares)
  _require(are_shares, "rank.measured_shares", shares, "must be numbers in (0, 1]")
  are_whole = all(type(boundary) is int for boundary in boundaries)
  rule = "must be whole numbers"
  _require(are_whole, "rank.measured_boundaries", boundaries, rule)
  fits = len(boundaries) == len(shares) + 1 and boundaries[0] == 0 and boundaries[-1] == total
  rises = all(a < b for a, b in itertools.pairwise(boundaries))
  rule = f"must rise from 0 to {total} and be one more than rank.measured_shares"
  _require(fits and rises, "rank.measured_boundaries", boundaries, rule)


def describe_analysed(config: ConfigDict) -> dict[str, Any]:
  """What the rises of a causal test depend on, beside its layers and data; as JSON."""
  return {
    "model": dataclasses.asdict(make_shape(config)),
    "diffusion": config.diffusion.to_dict(),
  }


def measured_ranks(config: ConfigDict, found: dict[str, Any]) -> np.ndarray:
  """(G,) iso-loss ranks whose mean over t is that of the static ranks of `rank.ratio`.

  Args:
    config: whose layers, `rank.ratio` and `rank.monotone` count.
    found: of `analysis_files.read_truncation`.

  Raises:
    UserError: the analysis is of another model, of one with an r(t) of its own, or of no such
      mean.
  """
  shapes, boundaries = dit.layer_shapes(make_shape(config)), found["boundaries"]
  names = factorised_layers(config)
  ours = describe_analysed(config)
  other = workdir.changes(ours, {field: found.get(field, {}) for field in ours})
  other += ["other layers are factorised"] if names != found["layers"] else []
  if other:
    raise UserError(
      f"config.rank.analysis={config.rank.analysis!r} is of another model: {'; '.join(other)}: "
      "analyze a run of this one, or give config.rank.measured_shares and measured_boundaries"
    )
  mean = np.mean([plan.static_rank(config.rank.ratio, *shapes[name]) for name in names])
  if found.get("num_buckets", 1) > 1:
    raise UserError(
      f"config.rank.analysis={config.rank.analysis!r} is of a run with an r(t) of its own, above "
      "which no loss rises: analyze a run of the full arm"
    )
  ranks = measured.iso_loss_ranks(
    found["ranks"], found["rise"], found["largest_rank"], boundaries, float(mean)
  )
  return measured.monotone(ranks, boundaries) if config.rank.monotone else ranks


def resolve(config: ConfigDict) -> ConfigDict:
  """Fills in the variant's sizes, fits the groups of timesteps and refuses what cannot work.

  Returns:
    A new, locked config without zeros that stand for defaults.

  Raises:
    UserError: naming the first field that is wrong, and how to mend it.
  """
  config = ConfigDict(config.to_dict())
  _check_ranges(config)
  _check_choices(config)
  _check_paths(config)
  for field, value in dit.decode_variant(config.model.variant).items():
    config.model[field] = config.model[field] or value
  _check_model(config)
  _check_sampling(config)
  _check_boundaries(config)
  _check_analysis(config)
  config.curriculum.boundaries = curriculum.scale_boundaries(
    config.curriculum.boundaries, config.diffusion.num_train_timesteps
  )
  _fill_in_measured_schedule(config)
  # Built for their own checks: both raise where values do not fit together.
  make_plan(config)
  make_solver_table(config)
  return config.lock()


def resolve_for_run(config: ConfigDict, run: str) -> ConfigDict:
  """`resolve`, where a run that has begun keeps the r(t) that it took from an analysis.

  Args:
    config: as given.
    run: its workdir, which need not be there.

  Raises:
    UserError: as `resolve`.
  """
  rank, kept = config.rank, None
  if rank.schedule == MEASURED and not rank.measured_shares:
    kept = unit_cache.read_kept_schedule(run, rank.analysis)
  if kept is None:
    return resolve(config)
  own = ConfigDict(config.to_dict())
  own.rank.measured_shares, own.rank.measured_boundaries = kept
  try:
    if resolve(config).rank.measured_shares != kept[0]:
      log.warning("%s has changed: the run keeps the r(t) it began with", rank.analysis)
  except UserError:
    log.warning("%s cannot be used: the run keeps the r(t) it began with", rank.analysis)
  return resolve(own)


def _has_vae(config: ConfigDict) -> bool:
  return config.vae.downsample_factor > 0


def input_size(config: ConfigDict) -> int:
  """Height and width of what the model works on, pixels or latents."""
  return config.data.image_size // (config.vae.downsample_factor or 1)


def _with_classes(config: ConfigDict, source: Source) -> Source:
  """The source restricted to the config's first classes.

  Raises:
    UserError: it has fewer classes than the config says.
  """
  wanted = config.data.num_classes
  _require(
    wanted <= source.num_classes,
    "data.num_classes",
    wanted,
    f"does not fit the data {config.data.name!r}: use {source.num_classes}, fewer for the first "
    "ones, or 0 for no labels"
    if source.num_classes
    else f"does not fit the data {config.data.name!r}, which has no labels: use 0",
  )
  if wanted in (0, source.num_classes):
    return source
  kept = source.first_classes(wanted)
  _require(
    len(kept) > 0,
    "data.num_classes",
    wanted,
    f"leaves none of the {len(source)} images of a split of {config.data.name!r}: use more",
  )
  log.info("%d of %d images are of the first %d classes", len(kept), len(source), wanted)
  return kept


def _data_options(config: ConfigDict) -> DataOptions:
  data = config.data
  return DataOptions(
    data_dir=data.data_dir,
    image_size=data.image_size,
    num_channels=data.num_channels,
    cache_bytes=int(data.cache_gib * 2**30),
    skip_unreadable=data.skip_unreadable,
  )


def make_image_source(config: ConfigDict, split: str) -> Source:
  """The images of the "train" or "eval" split.

  Raises:
    UserError: the data is missing, or other than the config says.
  """
  source = pipeline.make_source(config.data.name, split, _data_options(config))
  return _with_classes(config, source)


def _check_origin(config: ConfigDict, source: latents.LatentSource, split: str) -> None:
  """Refuses latents of other images than the config's, or of what those were before.

  The images themselves are looked at where `data.data_dir` names them, as
  training needs no images and may be where there are none.
  """
  data = config.data
  side = tfds.DATASETS[data.name].crop_size if data.name in tfds.DATASETS else 0
  expected = {"name": data.name, "crop": images.crop_name(side, data.image_size)}
  _check_fingerprint(config, source.fingerprint, expected)
  if data.data_dir and os.path.exists(os.path.expanduser(data.data_dir)):
    expected = pipeline.LOADERS[data.name].fingerprint(split, _data_options(config))
    if "num_classes" in source.fingerprint:  # of the first classes only
      expected.pop("num_examples", None)
    _check_fingerprint(config, source.fingerprint, expected)
  elif data.data_dir:
    log.warning("the latents are not compared with their images: no %s", data.data_dir)


def _check_fingerprint(config: ConfigDict, found: dict[str, Any], expected: dict[str, Any]) -> None:
  for field, value in expected.items():
    if found.get(field) != value:
      raise UserError(
        f"the latents under {config.vae.latents_dir} are of other images: {field} is "
        f"{found.get(field)!r} there and {value!r} here; encode again, with another --output"
      )


def make_source(config: ConfigDict, split: str) -> Source:
  """What the model is trained on: images, or their latents.

  Raises:
    UserError: the data is missing, or other than the config says.
  """
  if not _has_vae(config):
    return make_image_source(config, split)
  directory, data = os.path.expanduser(config.vae.latents_dir), config.data
  _require(
    bool(directory),
    "vae.latents_dir",
    directory,
    "must name the directory that --mode=encode wrote: make it by --mode=encode --output=DIR "
    "--config.vae.path=VAE",
  )
  source = latents.open_latents(directory, split)
  _check_origin(config, source, split)
  size, channels = input_size(config), config.vae.latent_channels
  if source.image_shape != (size, size, channels):
    raise UserError(
      f"the latents under {directory} have the shape {source.image_shape}, not "
      f"{(size, size, channels)}: set config.vae.downsample_factor and latent_channels to the VAE's"
    )
  if data.flip and source.images.shape[1] == 1:
    raise UserError(
      f"config.data.flip=True needs latents of the mirrored images, and {directory} has none: "
      "encode again with config.data.flip=True, or train with False"
    )
  return _with_classes(config, source)


def make_codec(config: ConfigDict, devices: parallel.Devices) -> vae.VaeRunner:
  """The VAE at `vae.path`.

  Raises:
    UserError: there is none, or it is another kind than the config says.
  """
  _require(
    _has_vae(config),
    "vae.downsample_factor",
    config.vae.downsample_factor,
    "says that the model works on pixels: use a config with latents, or set it to the VAE's (8)",
  )
  _require(
    bool(config.vae.path),
    "vae.path",
    config.vae.path,
    "must name the VAE, a diffusers directory or safetensors file (only training with "
    "config.training.sample_every_steps=0 needs none)",
  )
  read = vae_weights.read_vae(os.path.expanduser(config.vae.path))
  found = {
    "vae.downsample_factor": read.config.downsample_factor,
    "vae.latent_channels": read.config.latent_channels,
    "data.num_channels": read.config.in_channels,
  }
  for field, value in found.items():
    _require(
      _get(config, field) == value, field, _get(config, field), f"does not fit the VAE: use {value}"
    )
  return vae.VaeRunner(read, devices, config.vae.batch_size)


def make_to_pixels(config: ConfigDict, devices: parallel.Devices, vae_digest: str) -> ToPixels:
  """Return what takes (B, H, W, C) samples of the model to uint8 pixels.

  Beside the (B, height, width, channels) pixels it returns (B,) whether each image is
  finite: where one is not, its pixels mean nothing.

  Args:
    config: resolved.
    devices: devices to decode on.
    vae_digest: of the VAE that the run's latents were made with; "" for pixels.

  Raises:
    UserError: the VAE is missing, or another one.
  """
  if not _has_vae(config):
    return lambda x_0: (images.to_uint8(x_0), images.are_finite(x_0))
  codec = make_codec(config, devices)
  _require(
    codec.digest == vae_digest,
    "vae.path",
    config.vae.path,
    f"is another VAE (digest {codec.digest[:12]}) than the one that made the latents "
    f"({vae_digest[:12]})",
  )

  def decode(x_0: Float[np.ndarray, "B H W C"]) -> tuple[np.ndarray, np.ndarray]:
    decoded = codec.decode(vae.unscale_latents(codec.config, x_0))
    return images.to_uint8(decoded), images.are_finite(x_0) & images.are_finite(decoded)

  return decode


def make_shape(config: ConfigDict) -> dit.DiTShape:
  """The model's sizes from a resolved config."""
  return dit.DiTShape(
    image_size=input_size(config),
    channels=config.vae.latent_channels if _has_vae(config) else config.data.num_channels,
    num_classes=config.data.num_classes,
    hidden_size=config.model.hidden_size,
    depth=config.model.depth,
    num_heads=config.model.num_heads,
    patch_size=config.model.patch_size,
    learn_sigma=config.model.learn_sigma,
  )


def factorised_layers(config: ConfigDict) -> list[str]:
  """Names of the layers that a low-rank arm factorises, whatever the config's own arm."""
  rank, shapes = config.rank, dit.layer_shapes(make_shape(config))
  _require(
    all(isinstance(pattern, str) for pattern in rank.dense_layers),
    "rank.dense_layers",
    rank.dense_layers,
    "must be names of layers",
  )
  return plan.select_layers(
    shapes, rank.dense_layers, rank.first_n_blocks, rank.last_n_blocks, config.model.depth
  )


def make_plan(config: ConfigDict) -> plan.RankPlan:
  """The rank plan of the config's arm.

  The static arm ignores the schedule: it is `constant` at the static rank.
  """
  rank, steps = config.rank, config.diffusion.num_train_timesteps
  shapes, chosen = dit.layer_shapes(make_shape(config)), factorised_layers(config)
  if config.method == "full":
    return plan.dense_plan(steps)
  shapes = {name: shapes[name] for name in chosen}
  common = dict(ratio=rank.ratio)
  if config.method == "static":
    return plan.make_plan(
      shapes,
      height=schedules.schedule_height("constant", steps),
      min_ratio=1.0,
      match="total",
      num_buckets=1,
      multiple_of=1,
      **common,
    )
  if rank.schedule == MEASURED:
    height, min_ratio = measured.height(rank.measured_shares, rank.measured_boundaries)
  else:
    height, min_ratio = schedules.schedule_height(rank.schedule, steps), rank.min_ratio
  return plan.make_plan(
    shapes,
    height=height,
    min_ratio=min_ratio,
    match=rank.match,
    num_buckets=rank.num_buckets,
    multiple_of=rank.multiple_of,
    **common,
  )


def make_model(config: ConfigDict, devices: parallel.Devices = ()) -> dit.DiT:
  """The DiT of the config's arm, as the devices compute it fastest."""
  model, dtype = config.model, DTYPES[config.model.dtype]
  return dit.DiT(
    make_shape(config),
    make_plan(config),
    dtype,
    remat=model.remat,
    scan_blocks=model.scan_blocks,
    attention=dit.choose_attention(devices, dtype, model.hidden_size // model.num_heads),
  )


def init_params(config: ConfigDict) -> Any:
  """Fresh float32 parameters, fixed by the seed."""
  return dit.init_params(make_model(config), jax.random.key(config.seed))


def params_template(config: ConfigDict) -> Any:
  """Shapes and dtypes of the parameters, without computing them."""
  return jax.eval_shape(lambda: init_params(config))


def make_alphas_cumprod(config: ConfigDict) -> Float[np.ndarray, " T"]:
  """(T,) float64."""
  return process.make_alphas_cumprod(
    config.diffusion.noise_schedule, config.diffusion.num_train_timesteps
  )


def make_solver_table(config: ConfigDict) -> solvers.SolverTable:
  """The sampling solver's coefficients."""
  s, prediction = config.sampling, config.diffusion.prediction
  return solvers.solver_table(s.solver, make_alphas_cumprod(config), s.num_steps, s.eta, prediction)


def make_objective(config: ConfigDict, devices: parallel.Devices) -> training_step.Objective:
  """What training minimises, with its batch spread over `devices`."""
  parallel.check_divisible("config.training.batch_size", config.training.batch_size, devices)
  return training_step.Objective(
    model=make_model(config, devices),
    alphas_cumprod=make_alphas_cumprod(config),
    prediction=config.diffusion.prediction,
    loss_weighting=config.diffusion.loss_weighting,
    class_dropout_rate=config.model.class_dropout_rate,
    compute=config.rank.compute,
    strata=timesteps.uniform_strata(
      config.training.batch_size, config.diffusion.num_train_timesteps
    ),
    num_devices=len(devices),
  )


def make_curriculum(config: ConfigDict) -> curriculum.Curriculum:
  """The stages of training: without a curriculum, the one that trains everything."""
  c, order = config.curriculum, ()
  if c.enabled:
    order = curriculum.stage_order(c.start, len(c.boundaries) - 1)
  return curriculum.Curriculum(
    boundaries=c.boundaries,
    stages=curriculum.make_stages(c.boundaries, order, config.training.batch_size),
    patience=c.patience,
    check_every_steps=c.check_every_steps,
    restart_optimizer=c.restart_optimizer,
  )


def make_optimizer(
  config: ConfigDict,
) -> tuple[optax.GradientTransformation, optimizer.Schedule]:
  """(optax transformation for a rate of 1, learning rate of (step, start of the warm-up))."""
  o = config.optimizer
  schedule = optimizer.learning_rate_schedule(
    o.learning_rate, o.warmup_steps, config.training.num_steps, o.decay
  )
  return optimizer.make_optimizer(o.name, o.weight_decay, o.grad_clip_norm), schedule


def make_train_step(config: ConfigDict, devices: parallel.Devices, stage: int) -> Callable:
  """The pmapped training step of a stage of the curriculum, which donates its state."""
  gradient_transformation, learning_rate = make_optimizer(config)
  step = functools.partial(
    training_step.train_step,
    objective=make_objective(config, devices),
    optimizer=gradient_transformation,
    learning_rate=learning_rate,
    curriculum=make_curriculum(config),
    stage=stage,
    ema_decay=config.optimizer.ema_decay,
    log_every_steps=config.training.log_every_steps,
  )
  return parallel.pmap(step, devices, donate_argnums=(0,))


def make_eval_step(config: ConfigDict, devices: parallel.Devices) -> Callable:
  """The pmapped evaluation step, for `held_out.held_out_losses`."""
  step = functools.partial(
    training_step.eval_step,
    objective=make_objective(config, devices).without_augmentation(),
    boundaries=make_curriculum(config).boundaries,
  )
  return parallel.pmap(step, devices)


def make_classifier(config: ConfigDict, directory: pathlib.Path) -> classifier.ClassifierExtractor:
  """The classifier kept in a directory, trained first where there is none.

  Its seed is not the run's: runs that are compared share the classifier.
  """
  train, held_out = (make_image_source(config, split) for split in ("train", "eval"))
  batch_size = classifier.ClassifierSettings.batch_size
  settings = classifier.ClassifierSettings(
    seed=0,
    num_steps=config.evaluation.classifier_steps
    or classifier.default_num_steps(len(train), batch_size),
    flip=config.data.flip,
  )
  return classifier.open_classifier(directory, train, held_out, settings)


def make_extractors(config: ConfigDict, directory: pathlib.Path) -> list[features.Extractor]:
  """The extractors of `evaluation.extractors`.

  Args:
    config: resolved.
    directory: where the classifier is kept.
  """
  e, data = config.evaluation, config.data
  make = {
    "pixel": lambda: features.PixelExtractor(data.image_size, data.num_channels),
    "classifier": lambda: make_classifier(config, directory),
    "inception": lambda: inception.open_inception(e.inception_weights),
  }
  return [make[name]() for name in e.extractors]


def make_sampler(
  config: ConfigDict, devices: parallel.Devices, batch_size: int | None = None
) -> Sampler:
  """The sliced sampler; `batch_size` replaces the config's."""
  s = config.sampling
  batch_size = batch_size or s.batch_size
  parallel.check_divisible("config.sampling.batch_size", batch_size, devices)
  settings = SamplerSettings(
    prediction=config.diffusion.prediction,
    guidance_scale=s.guidance_scale,
    clip_x_0=s.clip_x_0,
    seed=s.seed,
    batch_size=batch_size,
  )
  model = make_model(config, devices)
  return Sampler(model, make_solver_table(config), settings, devices)
