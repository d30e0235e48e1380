import json

import numpy as np
import pytest

from lrdit.config import derive
from lrdit.model import dit
from lrdit.rank import plan as rank_plan
from lrdit.rank import schedules
from lrdit.runtime.errors import UserError
from tests import tiny
from tests.tiny import GOLDEN

pytestmark = pytest.mark.floats

REFERENCE = json.loads((GOLDEN / "rank_schedules.json").read_text())
ADAPTIVE = [s for s in schedules.SCHEDULES if s != "constant"]


def case_id(case):
  return "-".join(str(case[key]) for key in ("schedule", "max_rank", "min_ratio"))


@pytest.mark.parametrize("case", REFERENCE["schedules"], ids=case_id)
def test_schedules_match_the_reference_at_every_listed_timestep(case):
  """The reference rounds r(t) down and the plan to the nearest, so they differ by at most one."""
  height = schedules.schedule_height(case["schedule"], case["num_train_timesteps"])
  got = rank_plan.bucket_ranks(height[case["t"]], case["max_rank"], case["min_ratio"], 1)
  above = np.array(got) - case["active_rank"]
  assert set(above.tolist()) <= {0, 1}


@pytest.mark.parametrize("case", REFERENCE["matching"], ids=case_id)
def test_matching_without_buckets_finds_the_reference_rank(case):
  segments, levels = rank_plan.quantize(schedules.schedule_height(case["schedule"], 1000), 1000)
  bucket = rank_plan.RankPlan(1000, segments, ()).bucket_of_timestep
  target, counts = case["target_mean_rank"], np.bincount(bucket)
  ranks = rank_plan.match_activated(target, 600, levels, counts, case["min_ratio"], 1)
  assert abs(ranks[-1] - case["max_rank"]) <= 1
  assert np.array(ranks)[bucket].mean() == pytest.approx(target, abs=0.5)


@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
@pytest.mark.parametrize("num_train_timesteps", [7, 100, 1000])
def test_heights_span_the_rank_range_in_the_schedules_direction(schedule, num_train_timesteps):
  height = schedules.schedule_height(schedule, num_train_timesteps)
  assert height.shape == (num_train_timesteps,) and height.dtype == np.float64
  assert height.min() >= 0 and height.max() <= 1
  if schedule == "constant":
    assert (height == 1).all()
  elif "decreasing" in schedule:
    assert (np.diff(height) <= 0).all()
    assert (height[: num_train_timesteps // 20] == 1).all()
  elif "increasing" in schedule:
    assert (np.diff(height) > 0).all() and height[0] == 0


def test_the_logistic_ramp_has_a_steepness_and_a_midpoint():
  default = schedules.schedule_height("logistic_increasing", 1000)
  same = schedules.schedule_height(
    "logistic_increasing", 1000, logistic_steepness=8.0, logistic_midpoint=0.6
  )
  np.testing.assert_array_equal(default, same)
  steep, early = (
    schedules.schedule_height("logistic_increasing", 1000, **{f"logistic_{name}": value})
    for name, value in (("steepness", 80.0), ("midpoint", 0.5))
  )
  assert steep[500] < 1e-3 and steep[700] > 1 - 1e-3
  assert early[500] == pytest.approx(0.5)


def test_static_rank_keeps_the_share_of_parameters():
  for ratio in (0.1, 0.25, 0.5, 0.9, 1.0):
    for d_in, d_out in ((384, 384), (384, 1536), (1536, 384), (256, 384)):
      rank = rank_plan.static_rank(ratio, d_in, d_out)
      assert rank * (d_in + d_out) <= ratio * d_in * d_out < (rank + 1) * (d_in + d_out)
  assert rank_plan.static_rank(0.5, 384, 1536) == 153
  assert rank_plan.static_rank(0.001, 8, 8) == 1


SHAPES = {
  name: dims
  for name, dims in dit.layer_shapes(dit.DiTShape(32, 3, 10, **dit.decode_variant("S/2"))).items()
  if not name.startswith(("patch_embed", "final_layer/linear"))
}


def static_ranks(ratio):
  return {name: rank_plan.static_rank(ratio, *dims) for name, dims in SHAPES.items()}


def make_plan(schedule, match="activated", num_buckets=4, multiple_of=8, min_ratio=0.4):
  return rank_plan.make_plan(
    SHAPES,
    height=schedules.schedule_height(schedule, 1000),
    static_ranks=static_ranks(0.5),
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
def test_the_smallest_ranks_win_a_tie(counts, target, smallest):
  levels = np.linspace(0, 1, len(counts))
  ranks = rank_plan.match_activated(target, 96, levels, np.array(counts), 0.4, 1)
  assert ranks == smallest


@pytest.mark.parametrize("schedule", ADAPTIVE)
def test_total_allocates_the_static_rank(schedule):
  plan = make_plan(schedule, "total", 4, 8, 0.4)
  for name, ranks in plan.layers:
    assert ranks.max_rank == ranks.static_rank == rank_plan.static_rank(0.5, *SHAPES[name])
    assert plan.mean_active_rank(name) < ranks.static_rank
    assert all(r % 8 == 0 for r in ranks.active[:-1])


@pytest.mark.parametrize("schedule", ADAPTIVE)
def test_buckets_follow_the_schedule_and_ascend(schedule):
  height = schedules.schedule_height(schedule, 1000)
  segments, levels = rank_plan.quantize(height, 5)
  got = levels[rank_plan.RankPlan(1000, segments, ()).bucket_of_timestep]
  assert np.abs(got - height).max() <= 0.5 / 4 + 1e-9
  assert (np.diff(levels) > 0).all()
  for ranks in (rank_plan.bucket_ranks(levels, r, 0.4, 8) for r in range(8, 200, 7)):
    assert list(ranks) == sorted(ranks)


def test_a_plan_is_hashable_and_at_bucket_keeps_one_rank():
  plan = make_plan("midpeak", "activated", 4, 8, 0.4)
  assert hash(plan) == hash(rank_plan.RankPlan(1000, plan.segments, plan.layers))
  one = plan.at_bucket(1)
  assert one.num_buckets == 1
  assert all(r.active == (plan.by_name[name].active[1],) for name, r in one.layers)


def test_midpeak_visits_a_bucket_twice():
  segments, _ = rank_plan.quantize(schedules.schedule_height("midpeak", 1000), 3)
  assert [bucket for _, bucket in segments] == [0, 1, 2, 1, 0]


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
def test_any_ratio_is_matched_or_refused(ratio, schedule):
  try:
    plan = rank_plan.make_plan(
      SHAPES,
      height=schedules.schedule_height(schedule, 1000),
      static_ranks=static_ranks(ratio),
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


def select(dense=(), first=None, last=None):
  shape = dit.DiTShape(8, 1, 10, hidden_size=32, depth=4, num_heads=2, patch_size=2)
  return rank_plan.select_layers(dit.layer_shapes(shape), dense, first, last, 4)


def test_dense_layers_by_name_prefix_and_pattern():
  everything = select()
  assert len(everything) == 3 + 4 * 5 + 2
  assert "blocks_0/mlp/fc1" not in select(dense=["blocks_0/mlp"])
  assert "blocks_1/mlp/fc1" in select(dense=["blocks_0/mlp"])
  assert not any("adaln" in n for n in select(dense=["blocks_*/adaln", "final_layer/adaln"]))
  with pytest.raises(UserError, match="leaves no layer to factorize"):
    select(dense=["*"])
  with pytest.raises(UserError, match="leaves no layer to factorize"):
    select(dense=["blocks_0"], first=1)
  with pytest.raises(UserError, match="fits no layer"):
    select(dense=["blocks_9"])


def test_first_and_last_blocks_limit_what_is_factorized():
  def blocks(names):
    return {n.split("/")[0] for n in names}

  assert blocks(select(first=1)) == {"blocks_0"}
  assert blocks(select(last=2)) == {"blocks_2", "blocks_3"}
  assert blocks(select(first=1, last=1)) == {"blocks_0", "blocks_3"}
  with pytest.raises(UserError, match="first_n_blocks"):
    select(first=5)


def test_adaptivity_may_be_limited_to_some_blocks():
  """The other layers keep the static rank; `first_n_blocks` would make them dense."""
  fields = {"model__depth": 3, "rank__num_buckets": 3}
  config = tiny.tiny_config(**fields, rank__adaptive_first_n_blocks=1)
  limited, everywhere = derive.rank_plan(config), derive.rank_plan(tiny.tiny_config(**fields))
  assert [name for name, _ in limited.layers] == [name for name, _ in everywhere.layers]
  assert (limited.segments, limited.num_buckets) == (everywhere.segments, 3)
  for name, ranks in limited.layers:
    static = ranks.static_rank
    adapts = name.startswith("blocks_0/")
    assert ranks.active == (everywhere.by_name[name].active if adapts else (static,) * 3)
  with pytest.raises(UserError, match="adaptive_last_n_blocks=4 must be at most 3"):
    derive.rank_plan(tiny.tiny_config(**fields, rank__adaptive_last_n_blocks=4))
  fields = {"rank__dense_layers": ("blocks_0",), "rank__adaptive_first_n_blocks": 1}
  with pytest.raises(UserError, match="leave no low-rank layer to adapt"):
    derive.rank_plan(tiny.tiny_config(**fields))
