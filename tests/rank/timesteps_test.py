import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrdit.rank import plan as rank_schedule
from lrdit.rank import schedules, timesteps
from lrdit.rank.plan import RankPlan
from lrdit.runtime import parallel


@pytest.mark.parametrize(("batch_size", "total"), [(16, 1000), (128, 1000), (7, 100), (300, 100)])
def test_draws_stay_in_their_stratum(batch_size, total):
  first, last = timesteps.stratum_bounds(timesteps.uniform_strata(batch_size, total))
  j = np.arange(batch_size)
  for u in (0.0, 0.5, np.nextafter(np.float32(1), np.float32(0))):
    t = timesteps.stratified_timesteps(
      jnp.full(batch_size, u),
      jnp.asarray(j, jnp.int32),
      timesteps.uniform_strata(batch_size, total),
    )
    assert (t >= first).all()
    assert (t <= last).all()
  assert first[0] == 0
  assert last[-1] == total - 1


def test_every_timestep_is_equally_likely():
  batch_size, total, grid = 48, 100, 2000
  u = jnp.repeat(jnp.arange(grid) / grid, batch_size).astype(jnp.float32)
  j = jnp.tile(jnp.arange(batch_size, dtype=jnp.int32), grid)
  t = timesteps.stratified_timesteps(u, j, timesteps.uniform_strata(batch_size, total))
  counts = np.bincount(np.asarray(t), minlength=total)
  assert counts.sum() == grid * batch_size
  np.testing.assert_allclose(counts, grid * batch_size / total, rtol=0.005)


@pytest.mark.floats
@pytest.mark.parametrize(
  ("batch_size", "total"), [(16, 1000), (48, 1000), (7, 100), (300, 100), (12, 999_983)]
)
def test_timesteps_are_exact(batch_size, total):
  """floor((j + u) T / B) of the numbers as they are, also where rounding would tip it."""
  index = np.tile(np.arange(batch_size, dtype=np.int32), 2000)
  strata = timesteps.uniform_strata(batch_size, total)
  uniform = np.asarray(jax.random.uniform(jax.random.key(batch_size), index.shape))
  # Also next to where the timestep changes, on both sides.
  edges = np.round(uniform * total / batch_size) * batch_size / total
  below = np.ceil(edges * 2**23) / 2**23 - 2.0**-23
  for u in (uniform, *np.clip([edges, below], 0, 1 - 2.0**-24).astype(np.float32)):
    bits = np.floor(u * 2.0**24).astype(np.int64)
    expected = (index.astype(np.int64) * 2**24 + bits) * total // (batch_size * 2**24)
    got = jax.jit(timesteps.stratified_timesteps, static_argnums=2)(u, index, strata)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_devices_share_the_global_batch(num_devices):
  batch_size = 16
  index = np.concatenate(
    [parallel.global_index(d, batch_size // num_devices, num_devices) for d in range(num_devices)]
  )
  assert sorted(index.tolist()) == list(range(batch_size))


@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
@pytest.mark.parametrize("num_devices", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 12, 16, 128])
def test_no_draw_needs_more_than_its_group(schedule, num_devices, batch_size):
  segments, _ = rank_schedule.quantise(schedules.schedule_height(schedule, 1000), 5)
  plan = RankPlan(1000, segments, ())
  strata = timesteps.uniform_strata(batch_size, 1000)
  groups = timesteps.rank_groups(plan, "grouped", strata, num_devices)
  local = batch_size // num_devices
  assert sum(size for size, _ in groups) == local
  group_bucket = np.repeat([b for _, b in groups], [n for n, _ in groups])
  index = np.arange(local)[None] * num_devices + np.arange(num_devices)[:, None]
  key = jax.random.key(0)
  for u in (0.0, 0.999999, *np.asarray(jax.random.uniform(key, (20,)))):
    t = timesteps.stratified_timesteps(jnp.full(batch_size, u), jnp.arange(batch_size), strata)
    need = plan.bucket_of_timestep[np.asarray(t)][index]
    assert (need <= group_bucket).all()
  assert timesteps.rank_groups(plan, "masked", strata, num_devices) == (
    (local, plan.num_buckets - 1),
  )


def test_groups_cost_little_more_than_the_mean_rank():
  segments, levels = rank_schedule.quantise(
    schedules.schedule_height("logistic_decreasing", 1000), 4
  )
  plan = RankPlan(1000, segments, ())
  groups = timesteps.rank_groups(plan, "grouped", timesteps.uniform_strata(128, 1000), 1)
  mean = levels[plan.bucket_of_timestep].mean()
  grouped = sum(size * levels[b] for size, b in groups) / 128
  assert mean <= grouped <= mean + 0.02
