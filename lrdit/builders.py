"""From a ConfigDict to objects: configs are checked here and go no further."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float
from ml_collections import ConfigDict

from lrdit import diffusion, dit, input_pipeline, optimizer, parallel, rank_schedule, timesteps
from lrdit.errors import UserError
from lrdit.sampler import Sampler, SamplerSettings
from lrdit.training_step import Objective

METHODS = ("full", "static", "adaptive")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def _require(condition: bool, field: str, value: Any, rule: str) -> None:
  if not condition:
    raise UserError(f"config.{field}={value!r} {rule}")


def _check_choices(config: ConfigDict) -> None:
  """Fields that take one of a few words."""
  choices = {
    "method": METHODS,
    "data.name": tuple(input_pipeline.SOURCES),
    "model.dtype": tuple(DTYPES),
    "rank.schedule": rank_schedule.SCHEDULES,
    "rank.match": rank_schedule.MATCHES,
    "rank.compute": timesteps.COMPUTES,
    "diffusion.noise_schedule": diffusion.NOISE_SCHEDULES,
    "diffusion.prediction": diffusion.PREDICTIONS,
    "diffusion.loss_weighting": diffusion.LOSS_WEIGHTINGS,
    "optimizer.name": optimizer.OPTIMIZERS,
    "optimizer.decay": optimizer.DECAYS,
    "sampling.solver": diffusion.SOLVERS,
  }
  for field, allowed in choices.items():
    value = _get(config, field)
    _require(value in allowed, field, value, f"is unknown: use one of {', '.join(allowed)}")


def _get(config: ConfigDict, field: str) -> Any:
  for part in field.split("."):
    config = config[part]
  return config


# field: (lowest, highest) allowed values, both inclusive.
RANGES = {
  "seed": (0, 2**32 - 1),
  "data.image_size": (1, math.inf),
  "data.num_channels": (1, math.inf),
  "data.num_classes": (0, math.inf),
  "model.hidden_size": (0, math.inf),
  "model.depth": (0, math.inf),
  "model.num_heads": (0, math.inf),
  "model.patch_size": (0, math.inf),
  "model.class_dropout_rate": (0.0, 1.0),
  "rank.num_buckets": (1, 1000),
  "rank.multiple_of": (1, math.inf),
  "diffusion.num_train_timesteps": (2, 1_000_000),
  "optimizer.warmup_steps": (0, math.inf),
  "optimizer.weight_decay": (0.0, math.inf),
  "optimizer.grad_clip_norm": (0.0, math.inf),
  "training.batch_size": (1, math.inf),
  "training.num_steps": (1, math.inf),
  "training.log_every_steps": (1, math.inf),
  "training.eval_every_steps": (0, math.inf),
  "training.sample_every_steps": (0, math.inf),
  "checkpoint.every_steps": (1, math.inf),
  "checkpoint.keep": (1, math.inf),
  "sampling.num_samples": (1, math.inf),
  "sampling.batch_size": (1, math.inf),
  "sampling.eta": (0.0, 1.0),
  "sampling.guidance_scale": (0.0, 1000.0),
  "sampling.seed": (0, 2**32 - 1),
}


def _check_ranges(config: ConfigDict) -> None:
  """Fields that are numbers within bounds; NaN fits no bound."""
  for field, (low, high) in RANGES.items():
    value = _get(config, field)
    bound = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
    _require(low <= value <= high and math.isfinite(value), field, value, f"must be {bound}")
  for field in ("rank.ratio", "rank.min_ratio"):
    value = _get(config, field)
    _require(0 < value <= 1, field, value, "must lie in (0, 1]")
  rate = config.optimizer.learning_rate
  _require(0 < rate < 1e30, "optimizer.learning_rate", rate, "must be above 0 and below 1e30")
  decay = config.optimizer.ema_decay
  _require(0 <= decay < 1, "optimizer.ema_decay", decay, "must lie in [0, 1)")


def _check_model(config: ConfigDict) -> None:
  """Sizes that must divide each other."""
  model, data = config.model, config.data
  if data.image_size % model.patch_size:
    raise UserError(
      f"config.data.image_size={data.image_size} is not a multiple of "
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
  labels = sampling.labels
  known = labels in ("balanced", "random") or (labels.isdecimal() and int(labels) < max(classes, 1))
  _require(
    known, "sampling.labels", labels, f"is unknown: use balanced, random or 0 to {classes - 1}"
  )
  name = sampling.name
  _require(
    name not in ("", ".", "..") and "/" not in name,
    "sampling.name",
    name,
    "must be the name of a directory to make, without '/'",
  )


def resolve(config: ConfigDict) -> ConfigDict:
  """Fills in the variant's sizes and refuses what cannot work.

  Returns:
    A new, locked config without zeros that stand for defaults.

  Raises:
    UserError: naming the first field that is wrong, and how to mend it.
  """
  config = ConfigDict(config.to_dict())
  _check_ranges(config)
  _check_choices(config)
  for field, value in dit.decode_variant(config.model.variant).items():
    config.model[field] = config.model[field] or value
  _check_model(config)
  _check_sampling(config)
  # Built for their own checks: both raise where values do not fit together.
  make_plan(config)
  make_solver_table(config)
  return config.lock()


def make_source(config: ConfigDict, split: str) -> input_pipeline.Source:
  """The "train" or "eval" split, checked against the config's sizes.

  Raises:
    UserError: the data has another size or other classes than the config says.
  """
  _require(
    not config.data.data_dir,
    "data.data_dir",
    config.data.data_dir,
    f"is not used by the data {config.data.name!r}, which needs no files: leave it empty",
  )
  source = input_pipeline.make_source(config.data.name, split)
  size, _, channels = source.image_shape
  for field, expected in (("image_size", size), ("num_channels", channels)):
    _require(
      config.data[field] == expected,
      f"data.{field}",
      config.data[field],
      f"does not fit the data {config.data.name!r}: use {expected}",
    )
  _require(
    config.data.num_classes in (0, source.num_classes),
    "data.num_classes",
    config.data.num_classes,
    f"does not fit the data {config.data.name!r}: use {source.num_classes}, or 0 for no labels",
  )
  return source


def make_shape(config: ConfigDict) -> dit.DiTShape:
  """The model's sizes from a resolved config."""
  return dit.DiTShape(
    image_size=config.data.image_size,
    channels=config.data.num_channels,
    num_classes=config.data.num_classes,
    hidden_size=config.model.hidden_size,
    depth=config.model.depth,
    num_heads=config.model.num_heads,
    patch_size=config.model.patch_size,
    learn_sigma=config.model.learn_sigma,
  )


def make_plan(config: ConfigDict) -> rank_schedule.RankPlan:
  """The rank plan of the config's arm.

  The static arm ignores the schedule: it is `constant` at the static rank.
  """
  rank, steps = config.rank, config.diffusion.num_train_timesteps
  _require(
    all(isinstance(pattern, str) for pattern in rank.dense_layers),
    "rank.dense_layers",
    rank.dense_layers,
    "must be names of layers",
  )
  shapes = dit.layer_shapes(make_shape(config))
  chosen = rank_schedule.select_layers(
    shapes, rank.dense_layers, rank.first_n_blocks, rank.last_n_blocks, config.model.depth
  )
  if config.method == "full":
    return rank_schedule.dense_plan(steps)
  shapes = {name: shapes[name] for name in chosen}
  common = dict(num_train_timesteps=steps, ratio=rank.ratio)
  if config.method == "static":
    return rank_schedule.make_plan(
      shapes,
      schedule="constant",
      min_ratio=1.0,
      match="total",
      num_buckets=1,
      multiple_of=1,
      **common,
    )
  return rank_schedule.make_plan(
    shapes,
    schedule=rank.schedule,
    min_ratio=rank.min_ratio,
    match=rank.match,
    num_buckets=rank.num_buckets,
    multiple_of=rank.multiple_of,
    **common,
  )


def make_model(config: ConfigDict) -> dit.DiT:
  """The DiT of the config's arm."""
  return dit.DiT(make_shape(config), make_plan(config), DTYPES[config.model.dtype])


def init_params(config: ConfigDict) -> Any:
  """Fresh float32 parameters, fixed by the seed."""
  return dit.init_params(make_model(config), jax.random.key(config.seed))


def params_template(config: ConfigDict) -> Any:
  """Shapes and dtypes of the parameters, without computing them."""
  return jax.eval_shape(lambda: init_params(config))


def make_alphas_cumprod(config: ConfigDict) -> Float[np.ndarray, " T"]:
  """(T,) float64."""
  return diffusion.make_alphas_cumprod(
    config.diffusion.noise_schedule, config.diffusion.num_train_timesteps
  )


def make_solver_table(config: ConfigDict) -> diffusion.SolverTable:
  """The sampling solver's coefficients."""
  s = config.sampling
  return diffusion.solver_table(s.solver, make_alphas_cumprod(config), s.num_steps, s.eta)


def make_objective(config: ConfigDict, devices: parallel.Devices) -> Objective:
  """What training minimises, with its batch spread over `devices`."""
  parallel.check_divisible("config.training.batch_size", config.training.batch_size, devices)
  return Objective(
    model=make_model(config),
    alphas_cumprod=make_alphas_cumprod(config),
    prediction=config.diffusion.prediction,
    loss_weighting=config.diffusion.loss_weighting,
    class_dropout_rate=config.model.class_dropout_rate,
    flip=config.data.flip,
    compute=config.rank.compute,
    batch_size=config.training.batch_size,
    num_devices=len(devices),
  )


def make_optimizer(
  config: ConfigDict,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """(optax transformation, learning-rate schedule over steps)."""
  o = config.optimizer
  schedule = optimizer.learning_rate_schedule(
    o.learning_rate, o.warmup_steps, config.training.num_steps, o.decay
  )
  return optimizer.make_optimizer(o.name, schedule, o.weight_decay, o.grad_clip_norm), schedule


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
  return Sampler(make_model(config), make_solver_table(config), settings, devices)
