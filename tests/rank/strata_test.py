import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrdit.rank import schedules
from lrdit.rank.plan import RankPlan, quantize
from lrdit.rank.strata import (
  Strata,
  independent,
  rank_groups,
  stratified_timesteps,
  stratum_bounds,
  uniform_strata,
)
from lrdit.runtime import parallel


def make_plan(schedule, num_buckets):
  segments, levels = quantize(schedules.schedule_height(schedule, 1000), num_buckets)
  return RankPlan(1000, segments, ()), levels


@pytest.mark.parametrize(("batch_size", "total"), [(16, 1000), (128, 1000), (7, 100), (300, 100)])
def test_timesteps_stay_in_their_stratum(batch_size, total):
  strata = uniform_strata(batch_size, total)
  first, last = stratum_bounds(strata)
  for u in (0.0, 0.5, np.nextafter(np.float32(1), np.float32(0))):
    t = stratified_timesteps(jnp.full(batch_size, u), jnp.arange(batch_size), strata)
    assert (t >= first).all() and (t <= last).all()
  assert first[0] == 0 and last[-1] == total - 1


def test_every_timestep_is_equally_likely():
  batch_size, total, grid = 48, 100, 2000
  u = jnp.repeat(jnp.arange(grid) / grid, batch_size).astype(jnp.float32)
  j = jnp.tile(jnp.arange(batch_size, dtype=jnp.int32), grid)
  t = stratified_timesteps(u, j, uniform_strata(batch_size, total))
  counts = np.bincount(np.asarray(t), minlength=total)
  assert counts.sum() == grid * batch_size
  np.testing.assert_allclose(counts, grid * batch_size / total, rtol=0.005)


@pytest.mark.floats
@pytest.mark.parametrize(
  ("batch_size", "total"), [(16, 1000), (48, 1000), (7, 100), (300, 100), (12, 999_983)]
)
def test_timesteps_are_exact(batch_size, total):
  """They are floor((j + u) T / B) in exact arithmetic, where float rounding could change it."""
  index = np.tile(np.arange(batch_size, dtype=np.int32), 2000)
  strata = uniform_strata(batch_size, total)
  uniform = np.asarray(jax.random.uniform(jax.random.key(batch_size), index.shape))
  # Some values lie on either side of a change of timestep.
  edges = np.round(uniform * total / batch_size) * batch_size / total
  below = np.ceil(edges * 2**23) / 2**23 - 2.0**-23
  for u in (uniform, *np.clip([edges, below], 0, 1 - 2.0**-24).astype(np.float32)):
    bits = np.floor(u * 2.0**24).astype(np.int64)
    expected = (index.astype(np.int64) * 2**24 + bits) * total // (batch_size * 2**24)
    got = jax.jit(stratified_timesteps, static_argnums=2)(u, index, strata)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
@pytest.mark.parametrize("num_devices", [1, 4])
def test_no_slot_needs_more_than_its_group(schedule, num_devices):
  plan, _ = make_plan(schedule, 5)
  key = jax.random.key(0)
  for batch_size in (4, 12, 128):
    strata = uniform_strata(batch_size, 1000)
    groups = rank_groups(plan, "grouped", strata, num_devices)
    local = batch_size // num_devices
    assert sum(size for size, _ in groups) == local
    group_bucket = np.repeat([b for _, b in groups], [n for n, _ in groups])
    index = [parallel.global_index(d, local, num_devices) for d in range(num_devices)]
    assert sorted(np.concatenate(index)) == list(range(batch_size))
    for u in (0.0, 0.999999, *np.asarray(jax.random.uniform(key, (20,)))):
      t = stratified_timesteps(jnp.full(batch_size, u), jnp.arange(batch_size), strata)
      need = plan.bucket_of_timestep[np.asarray(t)][np.stack(index)]
      assert (need <= group_bucket).all()
    masked = rank_groups(plan, "masked", strata, num_devices)
    assert masked == ((local, plan.num_buckets - 1),)


def test_groups_cost_little_more_than_the_mean_rank():
  plan, levels = make_plan("logistic_decreasing", 4)
  groups = rank_groups(plan, "grouped", uniform_strata(128, 1000), 1)
  mean = levels[plan.bucket_of_timestep].mean()
  grouped = sum(size * levels[b] for size, b in groups) / 128
  assert mean <= grouped <= mean + 0.02


def test_independent_timesteps_cover_their_ranges_whatever_the_slot():
  strata = independent(Strata(((0, 400, 2), (400, 1000, 3))))
  assert strata.batch_size == 5
  first, last = stratum_bounds(strata)
  assert (first.tolist(), last.tolist()) == ([0, 0, 400, 400, 400], [399, 399, 999, 999, 999])
  uniform = jnp.float32([0, 0.5, 0, 0.5, 1 - 2**-24])
  assert stratified_timesteps(uniform, jnp.arange(5), strata).tolist() == [0, 200, 400, 700, 999]
  plan, _ = make_plan("logistic_decreasing", 3)
  assert rank_groups(plan, "grouped", independent(uniform_strata(6, 1000)), 2) == ((3, 2),)
