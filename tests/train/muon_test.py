import jax
import jax.numpy as jnp
import numpy as np
import optax

from lrdit.rank.plan import LayerRanks, RankPlan, dense_plan
from lrdit.train import muon, optimizer
from lrdit.train.muon import MuonOptions

PLAN = RankPlan(10, ((0, 1), (5, 0)), (("blocks_0/fc1", LayerRanks(4, (3, 5))),))


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def polar(matrix):
  u, _, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
  return u @ vt


def factors(scale=1.0):
  """Parameters of a low-rank and a dense layer within a block, and of one outside."""
  down, up = polar(normal(0, 12, 5)) * np.linspace(1, 2, 5), polar(normal(1, 5, 8))
  fc1 = {"down": down * scale, "up": up / scale, "bias": normal(2, 8)}
  fc1 = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), fc1)
  return {"blocks_0": {"fc1": fc1, "fc2": {"kernel": normal(3, 8, 6)}}, "embed": normal(4, 7, 3)}


def gradients(params, kernel_gradient):
  """Those of a function of the product down @ up, and ones elsewhere."""
  own = params["blocks_0"]["fc1"]
  grads = jax.tree.map(lambda p: normal(5, *p.shape), params)
  grads["blocks_0"]["fc1"]["down"] = kernel_gradient @ own["up"].T
  grads["blocks_0"]["fc1"]["up"] = own["down"].T @ kernel_gradient
  return grads


def make(rule="whole", plan=PLAN, weight_decay=0.0, **fields):
  layers = ("blocks_0/fc1", "blocks_0/fc2")
  options = MuonOptions(layers, factor_update=rule, **fields)
  return optimizer.make_optimizer("muon", weight_decay, None, plan=plan, muon=options)


def moved(tx, params, grads):
  return tx.update(grads, tx.init(params), params)[0]


# The quintic iteration maps singular values to about 0.7 to 1.2.
NEAR = dict(low=0.6, high=1.3)


def singular_values(update, scale):
  return np.linalg.svd(np.asarray(update) / scale, compute_uv=False)


def assert_orthogonal(update, scale, low=NEAR["low"], high=NEAR["high"]):
  values = singular_values(update, scale)
  assert low < values.min(), values
  assert values.max() < high, values


def test_dense_matrices_and_the_rest_are_optax_s_muon_and_adamw():
  params = {"blocks_0": {"fc2": {"kernel": normal(0, 8, 6), "bias": normal(1, 6)}}}
  own = make(plan=dense_plan(10), weight_decay=0.1, momentum=0.9, newton_schulz_steps=4)
  theirs = optax.contrib.muon(1.0, ns_steps=4, beta=0.9, weight_decay=0.1, consistent_rms=0.2)
  adamw = optax.adamw(1.0, weight_decay=0.0)
  states = [tx.init(params) for tx in (own, theirs, adamw)]
  for seed in (10, 20, 30):
    grads = {"blocks_0": {"fc2": {"kernel": normal(seed, 8, 6), "bias": normal(seed + 1, 6)}}}
    pairs = zip((own, theirs, adamw), states, strict=True)
    out = [tx.update(grads, state, params) for tx, state in pairs]
    (a, b, c), states = zip(*out, strict=True)
    a, b, c = (u["blocks_0"]["fc2"] for u in (a, b, c))
    np.testing.assert_allclose(a["kernel"], b["kernel"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(a["bias"], c["bias"], rtol=1e-5)


def test_consistent_rms_and_the_ratio_of_rates_scale_an_orthogonal_update():
  params = factors()
  grads = gradients(params, normal(6, 12, 8))
  update = moved(make(learning_rate_ratio=3.0), params, grads)
  kernel = update["blocks_0"]["fc2"]["kernel"]
  assert_orthogonal(kernel, 3 * 0.2 * np.sqrt(8))
  assert float(jnp.vdot(kernel, grads["blocks_0"]["fc2"]["kernel"])) < 0
  by_width = moved(make(consistent_rms=None), params, grads)["blocks_0"]
  assert_orthogonal(by_width["fc2"]["kernel"], 1.0)  # fewer outputs than inputs
  assert_orthogonal(by_width["fc1"]["up"], np.sqrt(8 / 5))
  # A parameter that no pattern names follows AdamW.
  expected = moved(optax.adamw(1.0, weight_decay=0.0), params["embed"], grads["embed"])
  np.testing.assert_allclose(update["embed"], expected, rtol=1e-6)


def test_the_momentum_is_nesterov_s():
  """Newton-Schulz acts on beta m' + (1 - beta) g, which a step in another direction shows."""
  params = {"blocks_0": {"fc2": {"kernel": jnp.zeros((4, 4))}}}
  tx = make(plan=dense_plan(10), momentum=0.5)
  first, second = jnp.diag(jnp.array([1.0, 1, 1, 1])), jnp.diag(jnp.array([-2.0, 1, 1, 1]))
  state = tx.init(params)
  for gradient in (first, second):
    update, state = tx.update({"blocks_0": {"fc2": {"kernel": gradient}}}, state, params)
  diagonal = jnp.diag(update["blocks_0"]["fc2"]["kernel"])
  assert float(diagonal[0]) > 0 > float(diagonal[1])


def test_each_band_is_orthogonalized_by_itself():
  params = factors()
  grads = gradients(params, normal(6, 12, 8))
  own = moved(make("bands"), params, grads)["blocks_0"]["fc1"]
  for band in (slice(0, 3), slice(3, 5)):
    assert_orthogonal(own["down"][:, band], 0.2 * np.sqrt(12))
    assert_orthogonal(own["up"][band], 0.2 * np.sqrt(8))
  whole = moved(make("whole"), params, grads)["blocks_0"]["fc1"]
  assert_orthogonal(whole["down"], 0.2 * np.sqrt(12))
  assert np.abs(np.asarray(whole["down"] - own["down"])).max() > 0.01


def test_bands_of_a_single_bucket_are_the_whole():
  plan = RankPlan(10, ((0, 0),), (("blocks_0/fc1", LayerRanks(5, (5,))),))
  params = factors()
  grads = gradients(params, normal(6, 12, 8))
  a, b = (moved(make(rule, plan), params, grads) for rule in ("bands", "whole"))
  jax.tree.map(np.testing.assert_array_equal, a, b)


def product_step(rule, scale):
  """The change of down @ up to first order, for factors of another scale."""
  params = factors(scale)
  own = params["blocks_0"]["fc1"]
  grads = gradients(params, normal(6, 12, 8))
  update = moved(make(rule), params, grads)["blocks_0"]["fc1"]
  return np.asarray(update["down"] @ own["up"] + own["down"] @ update["up"])


def test_only_lora_muon_ignores_how_scale_is_split_between_the_factors():
  a, b = (product_step("lora_muon", scale) for scale in (1.0, 1.5))
  np.testing.assert_allclose(a, b, atol=1e-4)
  for rule in ("whole", "bands", "spectron"):
    a, b = (product_step(rule, scale) for scale in (1.0, 1.5))
    assert np.abs(a - b).max() > 1e-2, rule


def test_lora_muon_moves_the_product_by_half_a_dense_step_from_each_factor():
  params = factors()
  own = params["blocks_0"]["fc1"]
  update = moved(make("lora_muon"), params, gradients(params, normal(6, 12, 8)))["blocks_0"]["fc1"]
  half = 0.2 * np.sqrt(12) / 2
  for step in (update["down"] @ own["up"], own["down"] @ update["up"]):
    values = singular_values(step, half)[:5]
    assert NEAR["low"] < values.min(), values
    assert values.max() < NEAR["high"], values


def test_lora_muon_takes_factors_of_zeros():
  params = factors()
  params["blocks_0"]["fc1"]["up"] = jnp.zeros((5, 8))
  update = moved(make("lora_muon"), params, gradients(params, normal(6, 12, 8)))
  assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(update))


def test_spectron_bounds_the_step_of_the_product():
  for scale in (0.3, 1.0, 4.0):
    step = product_step("spectron", scale)
    assert np.linalg.norm(step, 2) <= NEAR["high"] * 0.2 * np.sqrt(12)


def test_the_spectral_norm_is_bounded_closely_from_above():
  for matrix in (normal(0, 40, 9), jnp.eye(9), jnp.zeros((9, 9)), 1e-12 * normal(1, 9, 9)):
    exact = np.linalg.norm(np.asarray(matrix, np.float64), 2)
    bound = float(muon.spectral_norm(matrix.T @ matrix))
    assert exact * (1 - 1e-5) <= bound <= exact * 9 ** (1 / 64) * (1 + 1e-5)


def test_the_state_is_the_same_for_numpy_parameters():
  """Those of a run that starts from trained ones."""
  for rule in muon.FACTOR_UPDATES:
    tx, params = make(rule), factors()
    states = [tx.init(params), tx.init(jax.tree.map(np.asarray, params))]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


def test_a_run_may_change_to_rates_by_fan_in_and_back():
  options = dict(plan=PLAN, muon=MuonOptions(()))
  states = [
    optimizer.make_optimizer("adamw", 0.1, 1.0, factor_rates=rates, **options).init(factors())
    for rates in ("equal", "fan_in")
  ]
  assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


def test_fan_in_scales_the_rate_of_up_by_the_ratio_of_fan_ins():
  params = factors()
  grads = gradients(params, normal(6, 12, 8))
  for name in ("adamw", "muon"):
    options = dict(plan=PLAN, muon=MuonOptions(("blocks_0/fc1",)))
    equal, scaled = (
      moved(optimizer.make_optimizer(name, 0.1, None, factor_rates=rates, **options), params, grads)
      for rates in ("equal", "fan_in")
    )
    equal["blocks_0"]["fc1"]["up"] *= 12 / 5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), scaled, equal)
