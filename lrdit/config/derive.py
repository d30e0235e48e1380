"""Derive the model's shape, the rank plan and the solver from a config."""

from typing import Any

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from lrdit.config.checks import require
from lrdit.config.schema import get
from lrdit.diffusion import process, solvers
from lrdit.model import dit, flops
from lrdit.rank import measured, plan, schedules
from lrdit.runtime.errors import UserError

METHODS = ("full", "narrow", "static", "adaptive")
DENSE_METHODS = ("full", "narrow")
MEASURED = "measured"  # the schedule that an analysis determines


def input_size(config: ConfigDict) -> int:
  """Return the height and width of the model's input, pixels or latents."""
  return config.data.image_size // (config.vae.downsample_factor or 1)


def full_shape(config: ConfigDict) -> dit.DiTShape:
  """Return the sizes of the full arm's model."""
  has_vae = config.vae.downsample_factor
  names = ("hidden_size", "depth", "num_heads", "patch_size", "learn_sigma")
  return dit.DiTShape(
    image_size=input_size(config),
    channels=config.vae.latent_channels if has_vae else config.data.num_channels,
    num_classes=config.data.num_classes,
    **{name: config.model[name] for name in names},
  )


def model_shape(config: ConfigDict) -> dit.DiTShape:
  """Return the model's sizes; the narrow arm's width is that of the static arm's MACs."""
  shape = full_shape(config)
  return flops.narrow_shape(shape, _static_plan(config)) if config.method == "narrow" else shape


def static_ranks(config: ConfigDict) -> dict[str, int]:
  """Return the static arm's rank of each layer that a low-rank arm factorizes, by name.

  It does not depend on the config's own arm.

  Raises:
    UserError: `rank.layer_ranks` does not fit the layers.
  """
  rank, names, shapes = config.rank, selected_layers(config), dit.layer_shapes(full_shape(config))
  if not rank.layer_ranks:
    return {name: plan.static_rank(rank.ratio, *shapes[name]) for name in names}
  given, largest = rank.layer_ranks, [min(shapes[name]) for name in names]
  rule = f"must be the ranks of {len(names)} layers, each at most min(D_in, D_out), and not all 0"
  fits = len(given) == len(names) and any(given)
  fits = fits and all(r <= most for r, most in zip(given, largest, strict=True))
  require(fits, "rank.layer_ranks", given, rule)
  return {name: r for name, r in zip(names, given, strict=True) if r}


def selected_layers(config: ConfigDict) -> list[str]:
  """Return the names of the layers that the config does not keep dense by name or block."""
  rank, shapes = config.rank, dit.layer_shapes(full_shape(config))
  first, last = rank.first_n_blocks, rank.last_n_blocks
  return plan.select_layers(shapes, rank.dense_layers, first, last, config.model.depth)


def factorized_layers(config: ConfigDict) -> list[str]:
  """Return the names of the layers that a low-rank arm factorizes, whatever the config's arm."""
  return [*static_ranks(config)]


def _adaptive_layers(config: ConfigDict) -> list[str]:
  """Return the names of the low-rank layers whose rank follows the schedule."""
  names = ("rank.adaptive_first_n_blocks", "rank.adaptive_last_n_blocks")
  limits = {name: get(config, name) for name in names}
  layers = plan.layers_of_blocks(factorized_layers(config), limits, config.model.depth)
  if not layers:
    raise UserError(f"{' and '.join(names)} leave no low-rank layer to adapt: raise one of them")
  return layers


def _static_plan(config: ConfigDict) -> plan.RankPlan:
  steps = config.diffusion.num_train_timesteps
  fields = dict(min_ratio=1.0, match="total", num_buckets=1, multiple_of=1)
  return _low_rank_plan(config, schedules.schedule_height("constant", steps), fields)


def _adaptive_plan(config: ConfigDict) -> plan.RankPlan:
  rank, steps = config.rank, config.diffusion.num_train_timesteps
  names = ("min_ratio", "match", "num_buckets", "multiple_of")
  fields = {name: rank[name] for name in names}
  fields["adaptive_layers"] = _adaptive_layers(config)
  if rank.schedule == MEASURED:
    height, fields["min_ratio"] = measured.height(rank.measured_shares, rank.measured_boundaries)
  else:
    logistic = {name: rank[name] for name in ("logistic_steepness", "logistic_midpoint")}
    height = schedules.schedule_height(rank.schedule, steps, **logistic)
  return _low_rank_plan(config, height, fields)


def _low_rank_plan(
  config: ConfigDict, height: Float[np.ndarray, " T"], fields: dict[str, Any]
) -> plan.RankPlan:
  shapes, ranks = dit.layer_shapes(full_shape(config)), static_ranks(config)
  layers = {name: shapes[name] for name in ranks}
  return plan.make_plan(layers, height=height, static_ranks=ranks, **fields)


def lacks_ranks(config: ConfigDict) -> bool:
  """Return whether `init.energy` has yet to choose the ranks of the config's arm."""
  is_low_rank = config.method not in DENSE_METHODS
  return is_low_rank and config.init.energy is not None and not config.rank.layer_ranks


def rank_plan(config: ConfigDict) -> plan.RankPlan:
  """Return the rank plan of the config's arm.

  The static arm ignores the schedule: it is `constant` at the static rank.

  Raises:
    UserError: `init.energy` has yet to choose the ranks, or the fields do not fit each other.
  """
  if config.method in DENSE_METHODS:
    factorized_layers(config)  # raises for patterns that fit no layer
    return plan.dense_plan(config.diffusion.num_train_timesteps)
  rule = "chooses the ranks when training begins: begin it in this --workdir first"
  require(not lacks_ranks(config), "init.energy", config.init.energy, rule)
  return {"static": _static_plan, "adaptive": _adaptive_plan}[config.method](config)


def muon_layers(config: ConfigDict) -> tuple[str, ...]:
  """Return the names of the layers whose matrices Muon updates, () for another optimizer."""
  names, patterns = dit.layer_shapes(full_shape(config)), config.optimizer.muon_layers
  if config.optimizer.name != "muon":
    return ()
  plan.check_patterns("optimizer.muon_layers", patterns, names)
  return tuple(name for name in names if any(plan.covers(pattern, name) for pattern in patterns))


def alphas_cumprod(config: ConfigDict) -> Float[np.ndarray, " T"]:
  """Return the (T,) float64 products of 1 - beta."""
  d = config.diffusion
  return process.make_alphas_cumprod(d.noise_schedule, d.num_train_timesteps)


def solver_table(config: ConfigDict) -> solvers.SolverTable:
  """Return the sampling solver's coefficients."""
  s, prediction = config.sampling, config.diffusion.prediction
  return solvers.solver_table(s.solver, alphas_cumprod(config), s.num_steps, s.eta, prediction)
