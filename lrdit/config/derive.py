"""Derive the model's shape, the rank plan and the solver from a config."""

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from lrdit.diffusion import process, solvers
from lrdit.model import dit
from lrdit.rank import measured, plan, schedules

MEASURED = "measured"  # the schedule that an analysis determines


def input_size(config: ConfigDict) -> int:
  """Return the height and width of the model's input, pixels or latents."""
  return config.data.image_size // (config.vae.downsample_factor or 1)


def model_shape(config: ConfigDict) -> dit.DiTShape:
  """Return the model's sizes."""
  has_vae = config.vae.downsample_factor
  names = ("hidden_size", "depth", "num_heads", "patch_size", "learn_sigma")
  return dit.DiTShape(
    image_size=input_size(config),
    channels=config.vae.latent_channels if has_vae else config.data.num_channels,
    num_classes=config.data.num_classes,
    **{name: config.model[name] for name in names},
  )


def factorized_layers(config: ConfigDict) -> list[str]:
  """Return the names of the layers that a low-rank arm factorizes, whatever the config's arm."""
  rank, shapes = config.rank, dit.layer_shapes(model_shape(config))
  first, last = rank.first_n_blocks, rank.last_n_blocks
  return plan.select_layers(shapes, rank.dense_layers, first, last, config.model.depth)


def rank_plan(config: ConfigDict) -> plan.RankPlan:
  """Return the rank plan of the config's arm.

  The static arm ignores the schedule: it is `constant` at the static rank.
  """
  rank, steps = config.rank, config.diffusion.num_train_timesteps
  shapes, chosen = dit.layer_shapes(model_shape(config)), factorized_layers(config)
  if config.method == "full":
    return plan.dense_plan(steps)
  names = ("min_ratio", "match", "num_buckets", "multiple_of")
  fields = {name: rank[name] for name in names}
  if config.method == "static":
    height = schedules.schedule_height("constant", steps)
    fields = dict(min_ratio=1.0, match="total", num_buckets=1, multiple_of=1)
  elif rank.schedule == MEASURED:
    height, fields["min_ratio"] = measured.height(rank.measured_shares, rank.measured_boundaries)
  else:
    logistic = {name: rank[name] for name in ("logistic_steepness", "logistic_midpoint")}
    height = schedules.schedule_height(rank.schedule, steps, **logistic)
  layers = {name: shapes[name] for name in chosen}
  return plan.make_plan(layers, height=height, ratio=rank.ratio, **fields)


def alphas_cumprod(config: ConfigDict) -> Float[np.ndarray, " T"]:
  """Return the (T,) float64 products of 1 - beta."""
  d = config.diffusion
  return process.make_alphas_cumprod(d.noise_schedule, d.num_train_timesteps)


def solver_table(config: ConfigDict) -> solvers.SolverTable:
  """Return the sampling solver's coefficients."""
  s, prediction = config.sampling, config.diffusion.prediction
  return solvers.solver_table(s.solver, alphas_cumprod(config), s.num_steps, s.eta, prediction)
