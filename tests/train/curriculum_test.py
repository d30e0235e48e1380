import jax.numpy as jnp
import numpy as np
import pytest

from lrdit.experiment import Experiment
from lrdit.rank import plan as rank_schedule
from lrdit.rank import schedules
from lrdit.rank.plan import RankPlan
from lrdit.rank.strata import (
  COMPUTES,
  TIMESTEPS,
  independent,
  rank_groups,
  stratified_timesteps,
  stratum_bounds,
  uniform_strata,
)
from lrdit.train import curriculum
from tests.tiny import tiny_config

BOUNDARIES = (0, 44, 123, 234, 371, 520, 667, 796, 897, 966, 1000)


def stages(start, batch_size, boundaries=BOUNDARIES):
  order = curriculum.stage_order(start, len(boundaries) - 1)
  return order, curriculum.make_stages(boundaries, order, batch_size)


@pytest.mark.parametrize(
  ("start", "expected"),
  [
    ("high", (9, 8, 7, 6, 5, 4, 3, 2, 1, 0)),
    ("low", (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)),
    ("middle", (4, 3, 5, 2, 6, 1, 7, 0, 8, 9)),
  ],
)
def test_order_of_the_groups(start, expected):
  assert curriculum.stage_order(start, 10) == expected
  assert curriculum.stage_order(start, 1) == (0,)


def test_the_middle_group_may_be_named():
  assert curriculum.stage_order("middle", 5, 0) == (0, 1, 2, 3, 4)
  assert curriculum.stage_order("middle", 5, 3) == (3, 2, 4, 1, 0)
  assert curriculum.stage_order("low", 5, 3) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("start", curriculum.STARTS)
@pytest.mark.parametrize("batch_size", [1, 2, 16, 128, 3000])
def test_a_stage_trains_its_group_and_replays_what_is_finished(start, batch_size):
  order, made = stages(start, batch_size)
  for position, (group, stage) in enumerate(zip(order, made, strict=False)):
    current = BOUNDARIES[group : group + 2]
    done = sorted(order[:position])
    assert stage.groups == (group, group + 1)
    parts = {(low, high): count for low, high, count in stage.strata.ranges}
    assert sum(parts.values()) == stage.strata.batch_size == batch_size
    assert list(parts) == sorted(parts)
    own = parts.pop(current)
    assert own >= 1
    if not parts:
      share = sum(BOUNDARIES[g + 1] - BOUNDARIES[g] for g in done) / 1000
      assert share * batch_size < 0.5 or batch_size == 1
      continue
    [((low, high), replay)] = parts.items()
    assert done == list(range(done[0], done[-1] + 1)), "the finished range has gaps"
    assert (low, high) == (BOUNDARIES[done[0]], BOUNDARIES[done[-1] + 1])
    assert high == current[0] or low == current[1], "not next to the current group"
    share = batch_size * (high - low) / 1000
    assert abs(replay - share) <= 0.5 or (own == 1 and replay < share)
  assert len(made) == len(order) + 1
  last = curriculum.Stage((0, 10), uniform_strata(batch_size, 1000))
  assert made[-1] == last


def test_without_a_curriculum_everything_is_trained():
  [stage] = curriculum.make_stages(BOUNDARIES, (), 16)
  assert stage == curriculum.Stage((0, 10), uniform_strata(16, 1000))


@pytest.mark.parametrize("enabled", [False, True])
def test_independent_timesteps_are_those_of_every_stage(enabled):
  fields = {"curriculum__enabled": enabled, "curriculum__boundaries": (0, 400, 1000)}
  made = {
    kind: Experiment(tiny_config(diffusion__timesteps=kind, **fields)).curriculum.stages
    for kind in TIMESTEPS
  }
  assert len(made["iid"]) == (3 if enabled else 1)
  for iid, stratified in zip(made["iid"], made["stratified"], strict=True):
    assert iid.groups == stratified.groups
    assert iid.strata == independent(stratified.strata) != stratified.strata


@pytest.mark.parametrize("position", [0, 1, 4, 9])
def test_slots_are_in_order_and_each_timestep_of_a_range_is_equally_likely(position):
  _, made = stages("middle", 48)
  strata, grid = made[position].strata, 4000
  u = jnp.tile((jnp.arange(grid, dtype=jnp.float32) + 0.5) / grid, (48, 1)).T.reshape(-1)
  index = jnp.tile(jnp.arange(48, dtype=jnp.int32), grid)
  t = np.asarray(stratified_timesteps(u, index, strata)).reshape(grid, 48)
  assert (np.diff(t, axis=1) >= 0).all()
  first, last = stratum_bounds(strata)
  assert (t >= first).all() and (t <= last).all()
  counts = np.bincount(t.reshape(-1), minlength=1000)
  expected = np.zeros(1000)
  for low, high, n in strata.ranges:
    expected[low:high] = grid * n / (high - low)
    assert t[:, (first >= low) & (last < high)].shape[1] == n
  assert (counts[expected == 0] == 0).all()
  np.testing.assert_allclose(counts, expected, rtol=0.005, atol=4)


@pytest.mark.parametrize("start", curriculum.STARTS)
@pytest.mark.parametrize("schedule", ["logistic_decreasing", "midpeak", "increasing"])
@pytest.mark.parametrize("num_devices", [1, 4])
def test_no_rank_above_what_the_stage_needs_is_computed(start, schedule, num_devices):
  segments, _ = rank_schedule.quantize(schedules.schedule_height(schedule, 1000), 5)
  plan = RankPlan(1000, segments, ())
  _, made = stages(start, 64)
  for stage in made:
    table = plan.bucket_of_timestep
    most = max(int(table[low:high].max()) for low, high, _ in stage.strata.ranges)
    grouped, masked = (
      rank_groups(plan, compute, stage.strata, num_devices) for compute in ("grouped", "masked")
    )
    assert masked == ((64 // num_devices, most),)
    assert max(bucket for _, bucket in grouped) == most
    assert sum(size for size, _ in grouped) == 64 // num_devices
    # No slot on any device draws a timestep above its group.
    given = np.repeat([b for _, b in grouped], [n for n, _ in grouped]).repeat(num_devices)
    for u in (0.0, 0.3, 0.9999999):
      t = stratified_timesteps(jnp.full(64, u), jnp.arange(64), stage.strata)
      assert (table[np.asarray(t)] <= given).all()


def test_the_first_stage_from_high_costs_the_lowest_rank():
  segments, _ = rank_schedule.quantize(schedules.schedule_height("logistic_decreasing", 1000), 4)
  plan = RankPlan(1000, segments, ())
  _, made = stages("high", 64)
  for compute in COMPUTES:
    assert rank_groups(plan, compute, made[0].strata, 1) == ((64, 0),)
    assert max(rank_groups(plan, compute, made[-1].strata, 1))[1] == 3


def test_groups_are_scaled_to_other_numbers_of_timesteps():
  assert curriculum.scale_boundaries(BOUNDARIES, 1000) == BOUNDARIES
  assert curriculum.scale_boundaries((0, 44, 500, 1000), 100) == (0, 4, 50, 100)
  assert curriculum.scale_boundaries(BOUNDARIES, 2) == (0, 1, 2)


@pytest.mark.parametrize("restart_optimizer", [False, True])
@pytest.mark.parametrize("restart_decay", [False, True])
def test_the_ratio_shortens_new_warm_ups_alone(restart_optimizer, restart_decay):
  fields = dict(curriculum__enabled=True, optimizer__warmup_steps=20, training__num_steps=120)
  fields |= dict(
    curriculum__restart_optimizer=restart_optimizer, curriculum__restart_decay=restart_decay
  )
  whole = Experiment(tiny_config(**fields))
  half = Experiment(tiny_config(**fields, curriculum__warmup_ratio=0.5))
  first = 40  # step of the stage
  starts = [first * restart_optimizer, first * restart_decay]

  def rates(experiment, stage, steps):
    return [float(experiment.learning_rate(stage)(step, *starts)) for step in steps]

  assert rates(half, 0, range(20, 120)) == rates(whole, 0, range(20, 120))
  in_warm_up, decay_of_run = range(first, first + 9), range(first + 19, 120)
  if restart_optimizer:
    assert np.all(rates(half, 1, in_warm_up) > np.array(rates(whole, 1, in_warm_up)))
  else:
    assert rates(half, 1, range(first, 120)) == rates(whole, 1, range(first, 120))
  if not restart_decay:
    assert rates(half, 1, decay_of_run) == rates(whole, 1, decay_of_run)
