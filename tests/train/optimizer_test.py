import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lrdit.rank.plan import dense_plan
from lrdit.train import optimizer
from lrdit.train.muon import MuonOptions

pytestmark = pytest.mark.floats


def make_optimizer(*args, **constants):
  muon = MuonOptions(layers=("fc",))
  return optimizer.make_optimizer(*args, plan=dense_plan(10), muon=muon, **constants)


def test_warm_up_reaches_the_peak_and_cosine_ends_at_zero():
  schedule = optimizer.learning_rate_schedule(1.0, 10, 110, "cosine")
  assert float(schedule(0, 0)) == pytest.approx(0.1)
  assert float(schedule(9, 0)) == pytest.approx(1.0)
  assert float(schedule(10, 0)) == pytest.approx(1.0)
  assert float(schedule(60, 0)) == pytest.approx(0.5)
  assert float(schedule(110, 0)) == pytest.approx(0.0, abs=1e-7)


def test_constant_rate_stays_after_the_warm_up():
  schedule = optimizer.learning_rate_schedule(2.0, 1, 100, "constant")
  assert [float(schedule(s, 0)) for s in (0, 1, 50, 1000)] == pytest.approx([2] * 4)
  assert float(optimizer.learning_rate_schedule(2.0, 0, 100, "constant")(0, 0)) == pytest.approx(2)


def test_a_new_warm_up_leaves_the_cosine_alone():
  schedule = optimizer.learning_rate_schedule(1.0, 10, 110, "cosine")
  for step in (40, 44, 49, 70):
    share = min(1.0, (step - 40 + 1) / 10)
    assert float(schedule(step, 40)) == pytest.approx(share * float(schedule(step, 0)))


def test_a_new_cosine_of_a_stage_ends_with_the_run():
  schedule = optimizer.learning_rate_schedule(1.0, 10, 110, "cosine")
  rates = jax.jit(jax.vmap(lambda step: schedule(step, 40, 40)))(jnp.arange(40, 111))
  assert float(rates[0]) == pytest.approx(0.1)
  np.testing.assert_allclose(np.asarray(rates)[[9, 10, 40, 70]], [1, 1, 0.5, 0], atol=1e-6)


def test_only_matrices_decay():
  tx = make_optimizer("adamw", 0.5, None)
  params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
  grads = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
  updates, _ = tx.update(grads, tx.init(params), params)
  np.testing.assert_allclose(updates["kernel"], -0.5, rtol=1e-6)
  assert (updates["bias"] == 0).all()


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_the_gradient_is_clipped_before_the_optimizer(name):
  """A clipped gradient and one of that very norm move the parameters alike."""
  params = {"fc": {"kernel": jnp.array([[1.0, 2.0]])}}
  clipped = make_optimizer(name, 0.0, 1.0)
  plain = make_optimizer(name, 0.0, None)
  big, unit = (
    {"fc": {"kernel": jnp.array([[30.0, 40.0]])}},
    {"fc": {"kernel": jnp.array([[0.6, 0.8]])}},
  )
  a, state_a = clipped.update(big, clipped.init(params), params)
  b, state_b = plain.update(unit, plain.init(params), params)
  np.testing.assert_allclose(a["fc"]["kernel"], b["fc"]["kernel"], rtol=1e-6)
  moments = [jax.tree.leaves(state) for state in (state_a, state_b)]
  for in_a, in_b in zip(*moments, strict=True):
    np.testing.assert_allclose(in_a, in_b, rtol=1e-6)


@pytest.mark.parametrize(("name", "betas"), [("adamw", (0.9, 0.999)), ("lion", (0.9, 0.99))])
def test_constants_are_the_optimizer_s_own_unless_given(name, betas):
  """Two steps, so that each constant counts."""

  def moved(**constants):
    tx = make_optimizer(name, 0.0, None, **constants)
    params = {"w": jnp.array([[1.0, 2.0]])}
    state, trace = tx.init(params), []
    for gradient in (1e-3, -5e-5):
      update, state = tx.update({"w": jnp.array([[gradient, 2.0]])}, state, params)
      trace += [update["w"], optax.tree.get(state, "mu")["w"]]
    return np.array(trace)

  default = moved()
  np.testing.assert_array_equal(moved(beta1=betas[0], beta2=betas[1], epsilon=1e-8), default)
  for constants in ({"beta1": 0.5}, {"beta2": 0.5}, {"epsilon": 0.1}):
    if name == "adamw" or "epsilon" not in constants:
      assert (moved(**constants) != default).any(), constants


def test_average_warms_up_then_keeps_its_decay():
  params = {"w": jnp.array(1.0)}
  ema = {"w": jnp.array(0.0)}
  early = optimizer.update_ema(ema, params, jnp.int32(0), 0.999)["w"]
  assert float(early) == pytest.approx(0.9)  # decay (1 + 0) / (10 + 0)
  late = optimizer.update_ema(ema, params, jnp.int32(10**6), 0.999)["w"]
  assert float(late) == pytest.approx(0.001, rel=1e-4)
  assert float(optimizer.update_ema(params, params, jnp.int32(5), 0.9)["w"]) == pytest.approx(1)


def test_the_average_follows_a_power_of_the_steps_if_given():
  one, zero = {"w": jnp.array(1.0)}, {"w": jnp.array(0.0)}
  moved = [optimizer.update_ema(zero, one, jnp.int32(s), 0.9, 0.75)["w"] for s in (0, 15, 10**6)]
  np.testing.assert_allclose(moved, [1, 16**-0.75, 0.1], rtol=1e-5)


def test_galore_steps_within_the_leading_singular_vectors_of_its_gradient():
  """The first update by Adam is the sign of the projected gradient, projected back."""
  rng = np.random.default_rng(0)
  gradient = rng.standard_normal((6, 4)).astype(np.float32)
  params = {"fc": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}}
  grads = {"fc": {"kernel": jnp.asarray(gradient), "bias": jnp.full(4, 2.0)}}
  tx = make_optimizer("galore", 0.5, None, galore_rank=2, galore_gap=3)
  updates, state = tx.update(grads, tx.init(params), params)
  leading = np.linalg.svd(gradient)[0][:, :2]
  expected = -leading @ np.sign(leading.T @ gradient) - 0.5
  np.testing.assert_allclose(updates["fc"]["kernel"], expected, atol=1e-5)
  np.testing.assert_allclose(updates["fc"]["bias"], -1, atol=1e-5)
  lost = 1 - np.square(leading.T @ gradient).sum() / np.square(gradient).sum()
  assert float(optimizer.projection_loss(grads, state)) == pytest.approx(lost, rel=1e-4)
  # The projection stays for three steps, and so does what it leaves out.
  other = jax.tree.map(lambda g: g[::-1], grads)
  for step in range(1, 4):
    _, state = tx.update(other, state, params)
    projector = optax.tree.get(state, "projector")["fc"]["kernel"]
    is_first = bool(np.allclose(np.abs(projector.T @ leading), np.eye(2), atol=1e-4))
    assert is_first == (step < 3)
  # A stage's fresh state projects to its first gradient, although the gap is not over.
  _, state = tx.update(grads, optax.tree.where(True, tx.init(params), state), params)
  projector = optax.tree.get(state, "projector")["fc"]["kernel"]
  np.testing.assert_allclose(np.abs(projector.T @ leading), np.eye(2), atol=1e-4)
