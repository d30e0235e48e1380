"""r(t) from an analysis: contours, their mean, and the run's own copy of it."""

import json

import numpy as np
import pytest

from lrdit import builders, measured_schedule
from lrdit.errors import UserError
from tests.tiny import tiny_config

BOUNDARIES = (0, 250, 1000)
RANKS = (4, 8, 16)
# Group 0 needs twice the ranks of group 1: rise = c / k, less what k = 32 leaves.
RISE = [[2 / k - 2 / 32, 1 / k - 1 / 32] for k in RANKS]


def test_a_contour_is_read_between_the_measured_ranks():
  ranks, rise = np.array([4.0, 8.0, 16.0]), np.array([[4.0, 1.0], [2.0, 0.5], [0.0, 0.0]])
  np.testing.assert_allclose(measured_schedule.contour(ranks, rise, 1.0), [12, 4])
  np.testing.assert_allclose(measured_schedule.contour(ranks, rise, 3.0), [6, 4])
  # A dip at rank 8 does not count, as rank 16 still has a rise of 1.
  rise = np.array([[4.0], [0.5], [1.0]])
  np.testing.assert_allclose(measured_schedule.contour(ranks, rise, 1.0), [8])
  np.testing.assert_allclose(measured_schedule.contour(ranks, rise, 2.5), [6])


@pytest.mark.parametrize("mean", [6.0, 11.5, 25.0])
def test_the_mean_is_met_by_one_level_for_all_groups(mean):
  found = measured_schedule.iso_loss_ranks(RANKS, RISE, 32, BOUNDARIES, mean)
  assert found @ [0.25, 0.75] == pytest.approx(mean, rel=1e-9)
  ranks, rise = np.array([*RANKS, 32.0]), np.array([*RISE, [0, 0]])
  levels = [np.interp(r, ranks, column) for r, column in zip(found, rise.T, strict=True)]
  assert levels[0] == pytest.approx(levels[1], rel=1e-6)
  assert found[0] > found[1]


@pytest.mark.parametrize("mean", [3.0, 33.0])
def test_a_mean_beyond_the_analysis_is_refused(mean):
  with pytest.raises(UserError, match="cannot meet a mean rank"):
    measured_schedule.iso_loss_ranks(RANKS, RISE, 32, BOUNDARIES, mean)


def test_smoothing_keeps_the_mean_and_never_rises():
  boundaries, ranks = (0, 100, 400, 1000), np.array([20.0, 8.0, 12.0])
  smooth = measured_schedule.monotone(ranks, boundaries)
  weights = np.diff(boundaries) / 1000
  assert smooth @ weights == pytest.approx(ranks @ weights)
  np.testing.assert_allclose(smooth, [20, 32 / 3, 32 / 3])


def test_heights_are_linear_between_the_groups_middles():
  height, least = measured_schedule.height((1.0, 0.25), (0, 101, 1001))
  assert least == 0.25
  assert (height[:51] == 1).all()
  assert (height[551:] == 0).all()
  share = least + (1 - least) * height
  np.testing.assert_allclose(share[50:551], np.interp(np.arange(501), [0, 500.5], [1, 0.25]), 1e-2)
  height, least = measured_schedule.height((0.5, 0.5), BOUNDARIES)
  assert (height == 1).all()
  assert least == 1


def write_analysis(path, **changes):
  found = {"ranks": RANKS, "rise": RISE, "largest_rank": 32, "boundaries": BOUNDARIES}
  path.write_text(json.dumps(found | changes))
  return dict(rank__schedule="measured", rank__analysis=str(path))


def test_a_config_takes_r_of_t_from_the_analysis_and_keeps_it(tmp_path):
  path = tmp_path / "truncation.json"
  config = tiny_config("method=adaptive", **write_analysis(path))
  plan = builders.make_plan(config)
  for name, ranks in plan.layers:
    assert abs(plan.mean_active_rank(name) - ranks.static_rank) <= config.rank.multiple_of
    assert ranks.active[plan.bucket_of_timestep[0]] > ranks.active[plan.bucket_of_timestep[999]]
  # What is stored with the run is enough without the file.
  path.unlink()
  kept = {f"rank__{f}": config.rank[f] for f in ("measured_shares", "measured_boundaries")}
  again = tiny_config("method=adaptive", rank__schedule="measured", **kept)
  assert builders.make_plan(again) == plan


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"rise": [[None, 1.0]] * 3}, "without a measurement"),
    ({"ranks": []}, "without|not an analysis"),
    ({"boundaries": (0, 500, 900)}, "must rise from 0 to 1000"),
  ],
)
def test_an_analysis_that_does_not_fit_is_refused(tmp_path, changes, words):
  fields = write_analysis(tmp_path / "truncation.json", **changes)
  with pytest.raises(UserError, match=words):
    tiny_config("method=adaptive", **fields)


def test_a_missing_analysis_is_refused(tmp_path):
  with pytest.raises(UserError, match="is missing: name"):
    tiny_config(rank__schedule="measured")
  with pytest.raises(UserError, match="is not there"):
    tiny_config(rank__schedule="measured", rank__analysis=str(tmp_path / "none.json"))
  with pytest.raises(UserError, match=r"needs rank\.schedule=measured"):
    tiny_config(rank__analysis="analysis.json")
