import json

import numpy as np
import pytest

from lrdit.model import dit
from lrdit.rank import plan as rank_schedule
from lrdit.rank import schedules
from lrdit.runtime.errors import UserError
from tests.tiny import GOLDEN

pytestmark = pytest.mark.floats

REFERENCE = json.loads((GOLDEN / "rank_schedules.json").read_text())
ADAPTIVE = [s for s in schedules.SCHEDULES if s != "constant"]


@pytest.mark.parametrize(
  "case", REFERENCE["schedules"], ids=lambda c: f"{c['schedule']}-{c['max_rank']}-{c['min_ratio']}"
)
def test_unbucketed_schedule_is_the_reference_at_every_listed_timestep(case):
  got = schedules.active_rank(
    case["schedule"], case["t"], case["num_train_timesteps"], case["max_rank"], case["min_ratio"]
  )
  assert got.tolist() == case["active_rank"]


@pytest.mark.parametrize(
  "case",
  REFERENCE["matching"],
  ids=lambda c: f"{c['schedule']}-{c['target_mean_rank']}-{c['min_ratio']}",
)
def test_unbucketed_matching_finds_the_reference_rank(case):
  candidates = np.arange(1, 600)
  t = np.arange(1000)
  means = [
    schedules.active_rank(case["schedule"], t, 1000, int(r), case["min_ratio"]).mean()
    for r in candidates
  ]
  best = candidates[np.argmin(np.abs(np.array(means) - case["target_mean_rank"]))]
  assert abs(best - case["max_rank"]) <= 1
  assert means[case["max_rank"] - 1] == pytest.approx(case["mean_active_rank"], abs=0.12)


@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
@pytest.mark.parametrize("num_train_timesteps", [7, 100, 1000])
def test_rank_stays_between_floor_and_maximum(schedule, num_train_timesteps):
  ranks = schedules.active_rank(
    schedule, np.arange(num_train_timesteps), num_train_timesteps, 40, 0.3
  )
  assert ranks.min() >= 12
  assert ranks.max() <= 40
  if schedule == "constant":
    assert (ranks == 40).all()
  elif "decreasing" in schedule:
    assert (np.diff(ranks) <= 0).all()
    assert (ranks[: num_train_timesteps // 20] == 40).all()
  elif "increasing" in schedule:
    assert (np.diff(ranks) >= 0).all()


def test_static_rank_keeps_the_share_of_parameters():
  for ratio in (0.1, 0.25, 0.5, 0.9, 1.0):
    for d_in, d_out in ((384, 384), (384, 1536), (1536, 384), (256, 384)):
      rank = rank_schedule.static_rank(ratio, d_in, d_out)
      assert rank * (d_in + d_out) <= ratio * d_in * d_out < (rank + 1) * (d_in + d_out)
  assert rank_schedule.static_rank(0.5, 384, 1536) == 153
  assert rank_schedule.static_rank(0.001, 8, 8) == 1


SHAPES = {
  name: dims
  for name, dims in dit.layer_shapes(dit.DiTShape(32, 3, 10, **dit.decode_variant("S/2"))).items()
  if not name.startswith(("patch_embed", "final_layer/linear"))
}


def make_plan(schedule, match="activated", num_buckets=4, multiple_of=8, min_ratio=0.4):
  return rank_schedule.make_plan(
    SHAPES,
    height=schedules.schedule_height(schedule, 1000),
    ratio=0.5,
    min_ratio=min_ratio,
    match=match,
    num_buckets=num_buckets,
    multiple_of=multiple_of,
  )


@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
@pytest.mark.parametrize(("num_buckets", "multiple_of"), [(1, 1), (4, 8), (8, 16), (50, 1)])
def test_activated_matches_the_mean_to_within_the_multiple(schedule, num_buckets, multiple_of):
  for min_ratio in (0.25, 0.4, 0.75):
    plan = make_plan(schedule, "activated", num_buckets, multiple_of, min_ratio)
    for name, ranks in plan.layers:
      assert abs(plan.mean_active_rank(name) - ranks.static_rank) <= multiple_of, (name, ranks)
      assert all(r % multiple_of == 0 for r in ranks.active)


@pytest.mark.parametrize(
  ("counts", "target", "smallest"),
  [((1, 2), 6, (3, 7)), ((3, 7), 48, (23, 58)), ((1, 2, 4), 17, (8, 14, 20))],
)
def test_of_equally_near_means_the_smallest_ranks_are_taken(counts, target, smallest):
  levels = np.linspace(0, 1, len(counts))
  ranks = rank_schedule.match_activated(target, 96, levels, np.array(counts), 0.4, 1)
  assert ranks == smallest


@pytest.mark.parametrize("schedule", ADAPTIVE)
def test_total_allocates_the_static_rank(schedule):
  plan = make_plan(schedule, "total", 4, 8, 0.4)
  for name, ranks in plan.layers:
    assert ranks.max_rank == ranks.static_rank == rank_schedule.static_rank(0.5, *SHAPES[name])
    assert plan.mean_active_rank(name) < ranks.static_rank
    assert all(r % 8 == 0 for r in ranks.active[:-1])


@pytest.mark.parametrize("schedule", ADAPTIVE)
def test_buckets_follow_the_schedule_and_ascend(schedule):
  segments, levels = rank_schedule.quantise(schedules.schedule_height(schedule, 1000), 5)
  plan = rank_schedule.RankPlan(1000, segments, ())
  got = levels[plan.bucket_of_timestep]
  exact = (schedules.active_rank(schedule, np.arange(1000), 1000, 10**6, 1e-6) - 1) / (10**6 - 1)
  assert np.abs(got - exact).max() <= 0.5 / 4 + 1e-5
  assert (np.diff(levels) > 0).all()
  for ranks in (rank_schedule.bucket_ranks(levels, r, 0.4, 8) for r in range(8, 200, 7)):
    assert list(ranks) == sorted(ranks)


def test_many_buckets_recover_the_unbucketed_schedule():
  segments, levels = rank_schedule.quantise(schedules.schedule_height("decreasing", 1000), 1000)
  ranks = np.array(rank_schedule.bucket_ranks(levels, 192, 0.4, 1))
  plan = rank_schedule.RankPlan(1000, segments, ())
  exact = schedules.active_rank("decreasing", np.arange(1000), 1000, 192, 0.4)
  assert np.abs(ranks[plan.bucket_of_timestep] - exact).max() <= 1


def test_plan_is_hashable_and_a_bucket_of_it_holds_one_rank():
  plan = make_plan("midpeak", "activated", 4, 8, 0.4)
  assert hash(plan) == hash(rank_schedule.RankPlan(1000, plan.segments, plan.layers))
  one = plan.at_bucket(1)
  assert one.num_buckets == 1
  assert all(r.active == (plan.by_name[name].active[1],) for name, r in one.layers)


def test_midpeak_visits_a_bucket_twice():
  segments, _ = rank_schedule.quantise(schedules.schedule_height("midpeak", 1000), 3)
  assert [bucket for _, bucket in segments] == [0, 1, 2, 1, 0]


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
def test_any_ratio_is_matched_or_refused(ratio, schedule):
  try:
    plan = rank_schedule.make_plan(
      SHAPES,
      height=schedules.schedule_height(schedule, 1000),
      ratio=ratio,
      min_ratio=0.4,
      match="activated",
      num_buckets=4,
      multiple_of=8,
    )
  except UserError as error:
    assert ratio >= 0.75
    assert "cannot be met" in str(error)
    return
  for name, ranks in plan.layers:
    assert abs(plan.mean_active_rank(name) - ranks.static_rank) <= 8


def test_a_multiple_above_the_static_rank_is_refused():
  with pytest.raises(UserError, match=r"multiple_of=256 is above the static rank"):
    make_plan("decreasing", "activated", 4, 256, 0.4)


def select(dense=(), first=0, last=0):
  shape = dit.DiTShape(8, 1, 10, hidden_size=32, depth=4, num_heads=2, patch_size=2)
  return rank_schedule.select_layers(dit.layer_shapes(shape), dense, first, last, 4)


def test_dense_layers_by_name_prefix_and_pattern():
  everything = select()
  assert len(everything) == 3 + 4 * 5 + 2
  assert "blocks_0/mlp/fc1" not in select(dense=["blocks_0/mlp"])
  assert "blocks_1/mlp/fc1" in select(dense=["blocks_0/mlp"])
  assert not any("adaln" in n for n in select(dense=["blocks_*/adaln", "final_layer/adaln"]))
  with pytest.raises(UserError, match="leaves no layer to factorise"):
    select(dense=["*"])
  with pytest.raises(UserError, match="leaves no layer to factorise"):
    select(dense=["blocks_0"], first=1)
  with pytest.raises(UserError, match="fits no layer"):
    select(dense=["blocks_9"])


def test_first_and_last_blocks_limit_what_is_factorised():
  def blocks(names):
    return {n.split("/")[0] for n in names}

  assert blocks(select(first=1)) == {"blocks_0"}
  assert blocks(select(last=2)) == {"blocks_2", "blocks_3"}
  assert blocks(select(first=1, last=1)) == {"blocks_0", "blocks_3"}
  with pytest.raises(UserError, match="first_n_blocks"):
    select(first=5)
