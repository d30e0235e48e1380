"""r(t) from an analysis: contours, their mean rank, and the copy that a run keeps."""

import json

import numpy as np
import pytest

from lrdit.config import measured_schedule, run_config
from lrdit.config.resolve import resolve_for_run
from lrdit.experiment import Experiment
from lrdit.rank import measured
from lrdit.runtime import cluster
from lrdit.runtime.errors import UserError
from tests.tiny import tiny_config
from tests.truncations import BOUNDARIES, RANKS, RISE, write_truncation

pytestmark = pytest.mark.floats


def test_a_contour_is_linear_between_the_measured_ranks():
  ranks, rise = np.array([4.0, 8.0, 16.0]), np.array([[4.0, 1.0], [2.0, 0.5], [0.0, 0.0]])
  np.testing.assert_allclose(measured.contour(ranks, rise, 1.0), [12, 4])
  np.testing.assert_allclose(measured.contour(ranks, rise, 3.0), [6, 4])
  # The dip at rank 8 does not count because rank 16 still has a rise of 1.
  rise = np.array([[4.0], [0.5], [1.0]])
  np.testing.assert_allclose(measured.contour(ranks, rise, 1.0), [8])
  np.testing.assert_allclose(measured.contour(ranks, rise, 2.5), [6])


@pytest.mark.parametrize("mean", [6.0, 11.5, 25.0])
def test_all_groups_share_one_level_of_the_contour(mean):
  found = measured.match_mean_rank(RANKS, RISE, 32, BOUNDARIES, mean)
  assert found @ [0.25, 0.75] == pytest.approx(mean, rel=1e-9)
  ranks, rise = np.array([*RANKS, 32.0]), np.array([*RISE, [0, 0]])
  levels = [np.interp(r, ranks, column) for r, column in zip(found, rise.T, strict=True)]
  assert levels[0] == pytest.approx(levels[1], rel=1e-6)
  assert found[0] > found[1]


@pytest.mark.parametrize("mean", [3.0, 33.0])
def test_a_mean_rank_outside_the_analysis_is_refused(mean):
  with pytest.raises(UserError, match="cannot meet a mean rank"):
    measured.match_mean_rank(RANKS, RISE, 32, BOUNDARIES, mean)


@pytest.mark.parametrize("mean", [4.0, 32.0])
def test_a_mean_rank_at_either_end_of_the_analysis_tolerates_rounding(mean):
  boundaries = (0, 44, 123, 234, 371, 520, 667, 796, 897, 966, 1000)
  rise = [[rise] * 10 for rise in (0.3, 0.2, 0.1)]
  for given in (mean, np.nextafter(mean, 0), np.nextafter(mean, 99)):
    found = measured.match_mean_rank(RANKS, rise, 32, boundaries, given)
    np.testing.assert_allclose(found, mean)


@pytest.mark.parametrize("mean", [9.0, 12.0, 15.9])
def test_the_mean_rank_is_met_where_the_contour_jumps(mean):
  """A dip at rank 8 makes the contour jump from 8 past 16 at one level."""
  rise = [[1.0], [0.2], [0.5], [0.1]]
  found = measured.match_mean_rank((4, 8, 16, 32), rise, 64, (0, 1000), mean)
  np.testing.assert_allclose(found, [mean])
  rng = np.random.default_rng(0)
  rise = np.linspace(1, 0.1, 8)[:, None] * np.linspace(2, 1, 10) + rng.normal(0, 0.1, (8, 10))
  ranks, boundaries = tuple(range(8, 72, 8)), tuple(range(0, 1001, 100))
  found = measured.match_mean_rank(ranks, rise.tolist(), 128, boundaries, 4 * mean)
  assert found.mean() == pytest.approx(4 * mean, rel=1e-6)


def test_smoothed_ranks_keep_the_mean_and_never_rise():
  boundaries, ranks = (0, 100, 400, 1000), np.array([20.0, 8.0, 12.0])
  smooth = measured.monotone(ranks, boundaries)
  weights = np.diff(boundaries) / 1000
  assert smooth @ weights == pytest.approx(ranks @ weights)
  np.testing.assert_allclose(smooth, [20, 32 / 3, 32 / 3])


def test_heights_are_linear_between_the_groups_centres():
  height, least = measured.height((1.0, 0.25), (0, 101, 1001))
  assert least == 0.25
  assert (height[:51] == 1).all()
  assert (height[551:] == 0).all()
  share = least + (1 - least) * height
  np.testing.assert_allclose(share[50:551], np.interp(np.arange(501), [0, 500.5], [1, 0.25]), 1e-2)
  for second in (0.5, np.nextafter(0.5, 0)):
    height, least = measured.height((0.5, second), BOUNDARIES)
    assert (height == 1).all()
    assert least == 1


def test_a_config_reads_r_of_t_from_the_analysis_and_keeps_it(tmp_path):
  path = tmp_path / "truncation.json"
  config = tiny_config("method=adaptive", **write_truncation(path))
  plan = Experiment(config).plan
  for name, ranks in plan.layers:
    assert abs(plan.mean_active_rank(name) - ranks.static_rank) <= config.rank.multiple_of
    assert ranks.active[plan.bucket_of_timestep[0]] > ranks.active[plan.bucket_of_timestep[999]]
  # The config stored with the run does not need the file.
  path.unlink()
  kept = {f"rank__{f}": config.rank[f] for f in ("measured_shares", "measured_boundaries")}
  again = tiny_config("method=adaptive", rank__schedule="measured", **kept)
  assert Experiment(again).plan == plan


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"rise": [[None, 1.0]] * 3}, "without a measurement"),
    ({"rise": [[float("inf"), 1.0], [2.0, 0.5], [1.0, 0.2]]}, "losses that are not finite"),
    ({"num_buckets": 4}, "a run with an r\\(t\\) of its own"),
    ({"ranks": []}, "not an analysis"),
    ({"ranks": (4, 8, 500)}, "not an analysis"),
    ({"rise": [[1.0, 1.0]] * 2}, "not an analysis"),
    ({"rise": [[1.0, 2.0, 3.0]] * 3}, "not an analysis"),
    ({"boundaries": "abc"}, "not an analysis"),
    ({"layers": None}, "not an analysis"),
    ({"layers": ["foo"]}, "is of another model: other layers are factorized"),
    ({"model": {"depth": 28}}, "is of another model: .*model.depth"),
    ({"diffusion": {"prediction": "epsilon"}}, "another model: diffusion.prediction"),
    ({"boundaries": (0, 500, 900)}, "must rise from 0 to 1000"),
  ],
)
def test_an_analysis_that_does_not_fit_is_refused(tmp_path, changes, words):
  fields = write_truncation(tmp_path / "truncation.json", **changes)
  with pytest.raises(UserError, match=words):
    tiny_config("method=adaptive", **fields)


def test_the_config_enables_smoothing(tmp_path):
  rise = [[x / 4, x] for x, _ in RISE]  # more rank at high timesteps
  fields = write_truncation(tmp_path / "truncation.json", rise=rise)
  rough = tiny_config("method=adaptive", **fields).rank.measured_shares
  smooth = tiny_config("method=adaptive", rank__monotone=True, **fields).rank.measured_shares
  assert rough[0] < rough[1]
  assert smooth == (1, 1)


@pytest.mark.parametrize(
  ("shares", "boundaries", "words"),
  [
    (("a",), (0, 1000), r"measured_shares=.* must be numbers in \(0, 1\]"),
    ((1.5,), (0, 1000), r"measured_shares=.* must be numbers in \(0, 1\]"),
    ((1.0,), (0, 999.5), "measured_boundaries=.* must be whole numbers"),
    ((1.0,), (0, 500, 1000), "measured_boundaries=.* must rise from 0 to 1000"),
  ],
)
def test_invalid_shares_are_refused(shares, boundaries, words):
  fields = {"rank__measured_shares": shares, "rank__measured_boundaries": boundaries}
  with pytest.raises(UserError, match=words):
    tiny_config("method=adaptive", rank__schedule="measured", **fields)


def test_a_started_run_keeps_its_r_of_t(tmp_path, caplog):
  path, run = tmp_path / "truncation.json", tmp_path / "run"
  fields = write_truncation(path)
  asked = tiny_config("method=adaptive", **fields).unlock()
  kept = asked.rank.measured_shares
  asked.rank.measured_shares = asked.rank.measured_boundaries = ()

  def shares():
    return resolve_for_run(asked, str(run)).rank.measured_shares

  assert shares() == kept
  (run / "checkpoints" / "4").mkdir(parents=True)
  run_config.store_config(run, resolve_for_run(asked, str(run)))
  assert shares() == kept
  assert not caplog.records
  write_truncation(path, rise=[[x, 0.3 * x] for x, _ in RISE])
  assert shares() == kept
  path.unlink()
  assert shares() == kept
  assert len(caplog.records) == 2
  assert all("has changed" in r.message or "cannot be used" in r.message for r in caplog.records)
  # Naming another analysis changes r(t), and a run without a checkpoint reads its analysis again.
  write_truncation(tmp_path / "other.json", rise=[[x, 0.3 * x] for x, _ in RISE])
  asked.rank.analysis = str(tmp_path / "other.json")
  other = shares()
  assert other != kept
  asked.rank.analysis = str(path)
  (run / "checkpoints" / "4").rmdir()
  with pytest.raises(UserError, match="does not exist"):
    shares()


@pytest.mark.parametrize("kept", ["measured_shares", "layer_ranks"])
def test_a_process_without_the_workdir_keeps_the_first_one_s_ranks(tmp_path, monkeypatch, kept):
  run, fields = tmp_path / "run", write_truncation(path := tmp_path / "truncation.json")
  if kept == "layer_ranks":
    fields = dict(init__from_="trained", init__energy=0.9, rank__layer_ranks=(4, 8, 6))
  asked = tiny_config("method=adaptive", **fields).unlock()
  (run / "checkpoints" / "4").mkdir(parents=True)
  run_config.store_config(run, asked)
  text = json.dumps(measured_schedule.read_begun(str(run))).encode()
  expected = asked.rank[kept]
  assert len(expected) > 1
  for field in ("measured_shares", "measured_boundaries", "layer_ranks"):
    asked.rank[field] = ()
  path.unlink()

  def broadcast(tree):
    return np.int32(len(text)) if np.ndim(tree) == 0 else np.frombuffer(text, np.uint8)

  monkeypatch.setattr(cluster, "is_first", lambda: False)
  monkeypatch.setattr(cluster, "from_first", broadcast)
  assert resolve_for_run(asked, str(tmp_path / "missing")).rank[kept] == expected


def test_matching_the_total_rank_is_refused(tmp_path):
  fields = write_truncation(tmp_path / "truncation.json")
  with pytest.raises(UserError, match=r"rank\.match='total' must be activated"):
    tiny_config("method=adaptive", rank__match="total", **fields)


def test_a_missing_analysis_is_refused(tmp_path):
  with pytest.raises(UserError, match="is missing: name the"):
    tiny_config(rank__schedule="measured")
  with pytest.raises(UserError, match="does not exist"):
    tiny_config(rank__schedule="measured", rank__analysis=str(tmp_path / "none.json"))
  with pytest.raises(UserError, match=r"needs rank\.schedule=measured"):
    tiny_config(rank__analysis="analysis.json")
