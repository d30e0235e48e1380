"""Read the r(t) of `rank.schedule=measured` from an analysis, which a begun run does once."""

import dataclasses
import itertools
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from lrdit.config import derive, schema
from lrdit.config.checks import require
from lrdit.rank import measured
from lrdit.runtime import workdir
from lrdit.runtime.errors import UserError
from lrdit.runtime.store import DAMAGE, changes, parse_json


def read_truncation(path: str) -> dict[str, Any]:
  """Return the result of rank truncation that `--mode=analyze` wrote."""
  try:
    found = parse_json(pathlib.Path(path).expanduser().read_bytes())
    rise = _check_truncation(found)
    if np.isfinite(rise).all():
      return found
    cause = "has timestep groups without a measurement: raise config.evaluation.draws there"
    if any(None not in row for row in found["rise"]):
      cause = "has losses that are not finite: analyze an intact run"
  except (FileNotFoundError, IsADirectoryError):
    cause = "does not exist: name the analysis/truncation.json that --mode=analyze writes"
  except DAMAGE:
    cause = "is not an analysis: give analysis/truncation.json of a workdir"
  raise UserError(f"config.rank.analysis={path!r} {cause}")


def _check_truncation(found: dict[str, Any]) -> Float[np.ndarray, "K G"]:
  """Return the (K, G) rises, NaN where not measured; raise what `read_truncation` catches."""
  ranks = np.array([*found["ranks"], found["largest_rank"]], np.int64)
  boundaries = np.array(found["boundaries"], np.int64)
  rise = np.array(found["rise"], np.float64)  # None becomes NaN
  rising = (np.diff(ranks) > 0).all() and (np.diff(boundaries) > 0).all() and ranks[0] > 0
  if len(ranks) < 2 or not rising or rise.shape != (len(ranks) - 1, len(boundaries) - 1):
    raise ValueError
  if not isinstance(found["layers"], list):
    raise TypeError
  return rise


def read_begun(run: str) -> dict[str, Any]:
  """Return the config.json of a begun run, or {} if there is none or it is damaged."""
  path = pathlib.Path(run)
  try:
    config = parse_json((path / "config.json").read_bytes())
    if workdir.has_begun(path) and isinstance(config, dict):
      return config
  except (*DAMAGE, OSError):
    pass  # which the mode reports
  return {}


def kept_schedule(begun: dict[str, Any], analysis: str) -> tuple[tuple, tuple] | None:
  """Return the (shares, boundaries) that `read_begun`'s run took from this analysis, or None."""
  try:
    rank = begun["rank"]
    if rank["analysis"] == analysis:
      return tuple(rank["measured_shares"]), tuple(rank["measured_boundaries"])
  except DAMAGE:
    pass
  return None


def kept_layer_ranks(begun: dict[str, Any], energy: float) -> tuple[int, ...]:
  """Return the ranks that `read_begun`'s run took from trained parameters by this energy, or ()."""
  try:
    return tuple(begun["rank"]["layer_ranks"]) if begun["init"]["energy"] == energy else ()
  except (KeyError, TypeError):
    return ()


def describe_model(config: ConfigDict) -> dict[str, Any]:
  """Return, as JSON, what the rises depend on besides their layers and data."""
  return {
    "model": dataclasses.asdict(derive.model_shape(config)),
    "diffusion": config.diffusion.to_dict(),
  }


def measured_ranks(config: ConfigDict, found: dict[str, Any]) -> Float[np.ndarray, " G"]:
  """Return the (G,) iso-loss ranks whose mean over t is that of the static ranks.

  Raises:
    UserError: the analysis `found` is of another model or of one with an r(t) of its own, or
      cannot reach that mean.
  """
  ranks, boundaries, ours = derive.static_ranks(config), found["boundaries"], describe_model(config)
  theirs = {field: found.get(field, {}) for field in ours}
  if "diffusion" in found:  # an older version may lack some of the fields
    theirs["diffusion"] = schema.upgrade({"diffusion": found["diffusion"]})["diffusion"]
  other = changes(ours, theirs)
  other += ["other layers are factorized"] if [*ranks] != found["layers"] else []
  where = f"config.rank.analysis={config.rank.analysis!r} is of"
  if other:
    raise UserError(
      f"{where} another model: {'; '.join(other)}: analyze a run of this one, or give "
      "config.rank.measured_shares and measured_boundaries"
    )
  if found.get("num_buckets", 1) > 1:
    fix = "analyze a run of the full arm"
    raise UserError(f"{where} a run with an r(t) of its own, above which no loss rises: {fix}")
  mean = np.mean([*ranks.values()])
  r = measured.match_mean_rank(
    found["ranks"], found["rise"], found["largest_rank"], boundaries, float(mean)
  )
  return measured.monotone(r, boundaries) if config.rank.monotone else r


def fill_in(config: ConfigDict) -> None:
  """Read r(t) from the analysis, unless the config already holds it, and check it."""
  rank, total = config.rank, config.diffusion.num_train_timesteps
  if rank.schedule != derive.MEASURED:
    for field in ("analysis", "measured_shares", "measured_boundaries"):
      require(not rank[field], f"rank.{field}", rank[field], "needs rank.schedule=measured")
    return
  rule = "must be activated with rank.schedule=measured, which matches the mean rank"
  require(rank.match == "activated", "rank.match", rank.match, rule)
  if not rank.measured_shares:
    rule = "is missing: name the analysis/truncation.json that --mode=analyze writes"
    require(rank.analysis != "", "rank.analysis", rank.analysis, rule)
    ranks = measured_ranks(config, found := read_truncation(rank.analysis))
    rank.measured_shares = tuple(float(r / ranks.max()) for r in ranks)
    rank.measured_boundaries = tuple(found["boundaries"])
  shares, boundaries = rank.measured_shares, rank.measured_boundaries
  are_shares = all(isinstance(share, int | float) and 0 < share <= 1 for share in shares)
  require(are_shares, "rank.measured_shares", shares, "must be numbers in (0, 1]")
  are_whole = all(type(boundary) is int for boundary in boundaries)
  require(are_whole, "rank.measured_boundaries", boundaries, "must be whole numbers")
  fits = len(boundaries) == len(shares) + 1 and boundaries[0] == 0 and boundaries[-1] == total
  rises = all(a < b for a, b in itertools.pairwise(boundaries))
  rule = f"must rise from 0 to {total} and be one more than rank.measured_shares"
  require(fits and rises, "rank.measured_boundaries", boundaries, rule)
