"""Fill in a config and reject fields that do not fit each other."""

import itertools
import logging

from ml_collections import ConfigDict

from lrdit.config import derive, measured_schedule
from lrdit.config.checks import require
from lrdit.config.schema import FIELDS, get
from lrdit.model import dit
from lrdit.runtime import cluster
from lrdit.runtime.errors import UserError
from lrdit.train import curriculum

log = logging.getLogger("lrdit")


def resolve(config: ConfigDict) -> ConfigDict:
  """Return a new, locked config with the variant's sizes and scaled timestep groups.

  An `Experiment` of it may still find that fields do not fit each other.

  Raises:
    UserError: a field is wrong; the message names the first such field and the fix.
  """
  config = ConfigDict(config.to_dict())
  for name, field in FIELDS.items():
    field.check(name, get(config, name))
  _check_vae(config)
  for name, value in dit.decode_variant(config.model.variant).items():
    config.model[name] = config.model[name] or value
  _check_model(config)
  _check_sampling(config)
  _check_boundaries(config)
  _check_stages(config)
  steps, distillation = config.training.num_steps, config.init.distillation
  rule, has_trained = "needs trained parameters: set config.init.from_", bool(config.init.from_)
  require(steps != 0 or has_trained, "training.num_steps", steps, rule)
  require(distillation == 0 or has_trained, "init.distillation", distillation, rule)
  energy, schedule = config.init.energy, config.rank.schedule
  require(energy is None or has_trained, "init.energy", energy, rule)
  rule = "does not fit rank.schedule=measured, which matches the mean rank of rank.ratio"
  require(energy is None or schedule != derive.MEASURED, "init.energy", energy, rule)
  config.curriculum.boundaries = curriculum.scale_boundaries(
    config.curriculum.boundaries, config.diffusion.num_train_timesteps
  )
  sizes = config.analysis.batch_sizes
  require(bool(sizes) and sizes[-1] > 1, "analysis.batch_sizes", sizes, "must end above 1")
  measured_schedule.fill_in(config)
  return config.lock()


def resolve_for_run(config: ConfigDict, run: str) -> ConfigDict:
  """Return `resolve(config)`, where a begun run keeps the ranks that it read when it began.

  These are an r(t) from an analysis, and the ranks that `init.energy` chose. The workdir `run` need
  not exist. All processes call this, and the first reads the workdir.
  """
  begun = cluster.json_from_first(lambda: measured_schedule.read_begun(run))
  if config.init.energy is not None and not config.rank.layer_ranks:
    config = ConfigDict(config.to_dict())
    config.rank.layer_ranks = measured_schedule.kept_layer_ranks(begun, config.init.energy)
  rank, kept = config.rank, None
  if rank.schedule == derive.MEASURED and not rank.measured_shares:
    kept = measured_schedule.kept_schedule(begun, rank.analysis)
  if kept is None:
    return resolve(config)
  own = ConfigDict(config.to_dict())
  own.rank.measured_shares, own.rank.measured_boundaries = kept
  if not cluster.is_first():  # the analysis may be out of its reach
    return resolve(own)
  try:
    if resolve(config).rank.measured_shares != kept[0]:
      log.warning("%s has changed: the run keeps the r(t) it began with", rank.analysis)
  except UserError:
    log.warning("%s cannot be used: the run keeps the r(t) it began with", rank.analysis)
  return resolve(own)


def _check_vae(config: ConfigDict) -> None:
  size, factor = config.data.image_size, config.vae.downsample_factor
  for field in () if factor else ("vae.path", "vae.latents_dir", "vae.encode_on_the_fly"):
    rule = "is not used by a model on pixels, which config.vae.downsample_factor=None makes"
    require(not get(config, field), field, get(config, field), f"{rule}: leave it out")
  rule = "is not read with config.vae.encode_on_the_fly=True: leave one of them out"
  on_the_fly, latents_dir = config.vae.encode_on_the_fly, config.vae.latents_dir
  require(not (on_the_fly and latents_dir), "vae.latents_dir", latents_dir, rule)
  rule = f"is not a multiple of config.vae.downsample_factor={factor}"
  require(size % (factor or 1) == 0, "data.image_size", size, rule)


def _check_model(config: ConfigDict) -> None:
  patch, size = config.model.patch_size, derive.input_size(config)
  latent = f"({size} latent pixels) " if config.vae.downsample_factor else ""
  rule = f"{latent}is not a multiple of config.model.patch_size={patch}: choose a variant "
  rule += "with another patch"
  require(size % patch == 0, "data.image_size", config.data.image_size, rule)
  width, heads = config.model.hidden_size, config.model.num_heads
  rule = f"is not a multiple of config.model.num_heads={heads}"
  require(width % heads == 0, "model.hidden_size", width, rule)
  rule = "must be a multiple of 4 (the position embedding has four parts)"
  require(width % dit.POSITION_PARTS == 0, "model.hidden_size", width, rule)


def _check_sampling(config: ConfigDict) -> None:
  s, classes = config.sampling, config.data.num_classes
  if s.guidance_scale != 1.0:
    field = "sampling.guidance_scale"
    rule = "needs classes, and config.data.num_classes is 0: use 1"
    require(classes > 0, field, s.guidance_scale, rule)
    rule = "needs a null class, which config.model.class_dropout_rate=0 never trains: use 1"
    require(config.model.class_dropout_rate > 0, field, s.guidance_scale, rule)
  rule = f"applies only to ddim; solver {s.solver} is deterministic or fixes its own noise: use 0"
  require(s.eta == 0 or s.solver == "ddim", "sampling.eta", s.eta, rule)
  rule = "would cut latents, which are not bounded by 1 as pixels are: use False"
  clips = s.clip_x_0 and config.vae.downsample_factor
  require(not clips, "sampling.clip_x_0", s.clip_x_0, rule)
  channels = derive.full_shape(config).channels
  rule = f"must be at most {channels}, the channels there are, or None for all"
  fits = (s.guidance_channels or 1) <= channels
  require(fits, "sampling.guidance_channels", s.guidance_channels, rule)
  low, high = s.guidance_min_noise, s.guidance_max_noise
  rule = f"must be at most config.sampling.guidance_max_noise={high}"
  require(low is None or high is None or low <= high, "sampling.guidance_min_noise", low, rule)
  is_class = s.labels.isdecimal() and int(s.labels) < max(classes, 1)
  rule = f"is unknown: use balanced, random or 0 to {classes - 1}"
  require(is_class or s.labels in ("balanced", "random"), "sampling.labels", s.labels, rule)


def _check_stages(config: ConfigDict) -> None:
  """Check what depends on the number of the curriculum's stages, and the steps of training."""
  c, num_groups = config.curriculum, len(config.curriculum.boundaries) - 1
  field, fix = "curriculum.middle_group", "is not used by config.curriculum.start"
  unused = c.middle_group is not None and c.start != "middle"
  require(not unused, field, c.middle_group, f"{fix}={c.start!r}: use start=middle, or None")
  rule = f"must be below {num_groups}, the number of timestep groups"
  require((c.middle_group or 0) < num_groups, field, c.middle_group, rule)
  rule = f"leaves no learning rate to the last of {num_groups} stages: use less than 1/{num_groups}"
  lasts = not c.enabled or c.learning_rate_decay * num_groups < 1
  require(lasts, "curriculum.learning_rate_decay", c.learning_rate_decay, rule)
  t = config.training
  rule = f"does not divide config.training.batch_size={t.batch_size}: use a divisor, or None"
  require(t.batch_size % (t.microbatch or 1) == 0, "training.microbatch", t.microbatch, rule)
  rule = "measures by config.evaluation.extractors, and it is (): name some, or use None"
  measures = not t.metrics_every_steps or config.evaluation.extractors
  require(bool(measures), "training.metrics_every_steps", t.metrics_every_steps, rule)
  rule = f"beside config.training.num_epochs={t.num_epochs}: set one of them, the other None"
  is_one = (t.num_steps is None) != (t.num_epochs is None)
  require(is_one, "training.num_steps", t.num_steps, rule)


def _check_boundaries(config: ConfigDict) -> None:
  field, value = "curriculum.boundaries", config.curriculum.boundaries
  total = config.diffusion.num_train_timesteps
  whole = len(value) > 1 and all(type(b) is int for b in value)
  require(whole, field, value, "must be two or more whole numbers")
  require(value[0] == 0, field, value, "must start at 0")
  rises = all(a < b for a, b in itertools.pairwise(value))
  require(rises, field, value, "must rise: leave out what is not above the number before it")
  scaled = curriculum.scale_boundaries(value, total)
  rule = f"must end at config.diffusion.num_train_timesteps={total}: use {scaled}"
  require(value[-1] == total or not config.curriculum.enabled, field, value, rule)
