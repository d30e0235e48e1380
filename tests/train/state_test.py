import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrdit.train.curriculum import Curriculum, make_stages
from lrdit.train.state import StageProgress, WindowMetrics

BOUNDARIES = (0, 300, 700, 1000)


def make_curriculum(order=(2, 1, 0), patience=2, check_every_steps=3):
  stages = make_stages(BOUNDARIES, order, 8)
  return Curriculum(BOUNDARIES, stages, patience, check_every_steps, False, False)


def follow(curriculum, check_means, example_count=4):
  """Stage number after every check; a window's losses vary round their mean."""
  add = jax.jit(lambda p, loss, step: p.add(loss, jnp.int32(example_count), step, curriculum))
  progress, step, numbers, every = StageProgress.begin(0, 0), 0, [], curriculum.check_every_steps
  for mean in check_means:
    for part in range(every):
      before, step = int(progress.number), step + 1
      offset = part - (every - 1) / 2
      progress = add(progress, jnp.float32(example_count * (mean + offset)), jnp.int32(step))
      assert int(progress.number) == before or part == every - 1, "ended between checks"
    numbers.append(int(progress.number))
  return numbers, progress, step


def test_a_stage_ends_after_patience_checks_without_a_better_loss():
  # Best at the second check, equal and worse after it; then better ones, then two bad ones.
  numbers, progress, step = follow(make_curriculum(), [5, 4, 4, 4.5, 9, 8, 8.5, 7, 7.1])
  assert numbers == [0, 0, 0, 1, 1, 1, 1, 1, 1]
  assert (int(progress.first_step), step) == (12, 27)
  assert float(progress.best_loss) == pytest.approx(7)
  assert int(progress.bad_checks) == 1
  assert (float(progress.loss_sum), int(progress.example_count)) == (0, 0)
  numbers, *_ = follow(make_curriculum(), [5, 4, 4, 4.5, 9, 8, 8.5, 7, 7.1, 7])
  assert numbers[-1] == 2


@pytest.mark.parametrize("patience", [1, 3])
def test_patience_counts_checks_and_a_new_stage_forgets_the_best(patience):
  means = [1.0] + [2.0] * patience + [3.0] * (patience + 1)
  numbers, progress, _ = follow(make_curriculum(patience=patience), means)
  assert numbers == [0] * patience + [1] * (patience + 1) + [2]
  assert float(progress.best_loss) == np.inf


def test_the_last_stage_never_ends():
  numbers, *_ = follow(make_curriculum(order=(0,), patience=1), [1.0] * 9)
  assert numbers == [0] + [1] * 8
  numbers, *_ = follow(make_curriculum(order=(), patience=1), [1.0] * 5)
  assert numbers == [0] * 5


def test_the_mean_over_the_checked_steps_decides():
  """Not their last loss, nor their sum: windows of other sizes compare."""
  curriculum, progress = make_curriculum(patience=1, check_every_steps=2), StageProgress.begin(0, 0)
  for step, (loss, count) in enumerate([(8, 4), (8, 4), (9, 8), (17, 8)], start=1):
    progress = progress.add(jnp.float32(loss), jnp.int32(count), jnp.int32(step), curriculum)
  assert float(progress.best_loss) == pytest.approx(26 / 16)
  assert int(progress.number) == 0


def test_window_sums_restart():
  window = WindowMetrics.empty(2)
  assert window.non_finite == 0
  for step, loss in enumerate([1.0, 2.0, 3.0, 4.0], start=1):
    new = WindowMetrics(
      loss=jnp.float32(loss),
      grad_norm=jnp.float32(10 * loss),
      count=jnp.int32(1),
      learning_rate=jnp.float32(step / 10),
      group_loss=jnp.array([loss, 0.0]),
      group_count=jnp.array([2, 0]),
      non_finite=jnp.int32(step),
    )
    window = window.add(new, jnp.int32(step), log_every_steps=3)
    assert window.non_finite == step  # the last step's own
    if step == 3:
      assert (float(window.loss), float(window.grad_norm), int(window.count)) == (6.0, 60.0, 3)
      assert (window.group_loss.tolist(), window.group_count.tolist()) == ([6, 0], [6, 0])
      assert window.learning_rate == pytest.approx(0.3)
  assert (float(window.loss), int(window.count)) == (4.0, 1)
  assert (window.group_loss.tolist(), window.group_count.tolist()) == ([4, 0], [2, 0])
