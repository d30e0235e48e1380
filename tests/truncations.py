"""Rank truncations as `--mode=analyze` writes them, for the measured schedule."""

import json

from lrdit.config import measured_schedule
from lrdit.experiment import Experiment
from tests.tiny import tiny_config

BOUNDARIES = (0, 250, 1000)
RANKS = (4, 8, 16)
# Group 0 needs twice the ranks of group 1: rise = c / k, minus its value at k = 32.
RISE = [[2 / k - 2 / 32, 1 / k - 1 / 32] for k in RANKS]


def truncation_of(config):
  """A rank truncation of the config's model."""
  found = {"ranks": RANKS, "rise": RISE, "largest_rank": 32, "boundaries": BOUNDARIES}
  layers = {"layers": Experiment(config).factorized_layers}
  return found | layers | measured_schedule.describe_model(config)


def write_truncation(path, **changes):
  """Write the tiny model's truncation; return the config fields that take r(t) from it."""
  path.write_text(json.dumps(truncation_of(tiny_config()) | changes))
  return dict(rank__schedule="measured", rank__analysis=str(path))
