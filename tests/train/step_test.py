import dataclasses
import functools
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lrdit.data import pipeline
from lrdit.experiment import Experiment
from lrdit.model import dit
from lrdit.model.low_rank import apply_by_group
from lrdit.runtime import parallel
from lrdit.runtime.parallel import AXIS
from lrdit.train import loss as loss_module
from lrdit.train import step as step_module
from lrdit.train.state import (
  NON_FINITE_QUANTITIES,
  StageProgress,
)
from tests import tiny
from tests.tiny import GOLDEN, tiny_config
from tests.trained import fresh_state, noisy_params

KEY = jax.random.key(7)


def make_step(config, devices, stage=0, **changes):
  """The pmapped training step of a stage."""
  settings = dict(
    objective=Experiment(config).objective(devices),
    optimizer=Experiment(config).optimizer,
    learning_rate=Experiment(config).learning_rate(stage),
    curriculum=Experiment(config).curriculum,
    regularizers=Experiment(config).regularizers,
    stage=stage,
    ema_decay=config.optimizer.ema_decay,
    ema_power=config.optimizer.ema_power,
    log_every_steps=config.training.log_every_steps,
  )
  return parallel.pmap(functools.partial(step_module.train_step, **(settings | changes)), devices)


COMPILED = {}


def compiled_once(config, num_devices, stage):
  key = config.to_json(), num_devices, stage
  if key not in COMPILED:
    COMPILED[key] = make_step(config, jax.devices()[:num_devices], stage)
  return COMPILED[key]


def make_state(config, devices, params=None, stage=0):
  """A replicated state before the first step of a stage."""
  state = fresh_state(config, params)
  return parallel.replicate(state.replace(stage=StageProgress.begin(stage, 0)), devices)


def run_steps(config, num_devices, num_steps, params=None, stage=0, flip=False):
  """Losses and final state of a few steps of a stage on the first devices."""
  devices = jax.devices()[:num_devices]
  step = compiled_once(config, num_devices, stage)
  state = make_state(config, devices, params, stage)
  size = config.training.batch_size
  slots = parallel.batch_slots(size, devices)
  source = Experiment(config).source("train")
  batches = pipeline.train_batches(source, config.seed, slots, size, range(num_steps), flip)
  losses = []
  for _ in range(num_steps):
    state, _ = step(state, next(batches), KEY)
    losses.append(float(parallel.unreplicate(state.window.loss)))
  return losses, parallel.to_host(parallel.unreplicate(state))


@pytest.mark.parametrize("name", ["muon", pytest.param("adamw", marks=pytest.mark.slow)])
def test_one_and_four_devices_give_the_same_losses(name):
  fields = dict(optimizer__warmup_steps=0, optimizer__name=name, optimizer__factor_update="bands")
  config = tiny_config("method=adaptive", **fields)
  one, state_one = run_steps(config, 1, 8, flip=True)
  four, state_four = run_steps(config, 4, 8, flip=True)
  np.testing.assert_allclose(four, one, rtol=1e-5)
  assert len(set(one)) == 8
  for a, b in zip(jax.tree.leaves(state_one), jax.tree.leaves(state_four), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@functools.cache
def gradients(compute, num_devices=1, schedule="logistic_decreasing", stage=None):
  """Mean gradient of the training loss, of a stage of `CURRICULUM` or over all timesteps."""
  config = tiny_config(rank__schedule=schedule, rank__compute=compute, rank__num_buckets=3)
  devices = jax.devices()[:num_devices]
  objective = Experiment(config).objective(devices)
  if stage is not None:
    stages = Experiment(tiny_config(**CURRICULUM)).curriculum.stages
    objective = objective.with_strata(stages[stage].strata)
  source = Experiment(config).source("train")
  slots = parallel.batch_slots(config.training.batch_size, devices)
  size = config.training.batch_size
  batch = next(pipeline.train_batches(source, 0, slots, size, range(1), False))

  def gradient(params, batch, key):
    def mean(p):
      return loss_module.batch_losses(p, objective, key, batch)[0].mean()

    return jax.lax.pmean(jax.grad(mean)(params), AXIS)

  params = parallel.replicate(noisy_params(config), devices)
  return parallel.unreplicate(parallel.pmap(gradient, devices)(params, batch, KEY))


def assert_same_gradients(got, expected):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max() + 1e-9)


@pytest.mark.parametrize(
  ("schedule", "num_devices"),
  [
    pytest.param("midpeak", 1, marks=pytest.mark.gpu),
    ("logistic_decreasing", 4),
    pytest.param("midpeak", 4, marks=pytest.mark.slow),
    pytest.param("logistic_decreasing", 1, marks=[pytest.mark.gpu, pytest.mark.slow]),
  ],
)
def test_grouped_gradients_are_masked_gradients(schedule, num_devices):
  masked = gradients("masked", schedule=schedule)
  assert_same_gradients(gradients("grouped", num_devices, schedule), masked)


def test_microbatches_give_the_gradient_of_the_batch():
  """Each keeps the groups of its slots, and every example its timestep and noise."""
  num_devices, microbatch = 2, 8
  config = tiny_config(training__microbatch=microbatch, rank__num_buckets=3)
  devices = jax.devices()[:num_devices]
  experiment = Experiment(config)
  objective = experiment.objective(devices)
  assert len(objective.rank_groups) > 1
  slots = parallel.batch_slots(16, devices)
  batch = next(pipeline.train_batches(experiment.source("train"), 0, slots, 16, range(1), False))

  def gradient(params, batch, key):
    boundaries = experiment.curriculum.boundaries
    return step_module.mean_gradient(params, objective, key, batch, boundaries)

  params = parallel.replicate(noisy_params(config), devices)
  outputs = parallel.unreplicate(parallel.pmap(gradient, devices)(params, batch, KEY))
  _, (_, group_count), grads, is_finite = outputs
  whole = gradients("grouped")
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max() + 1e-9)
  assert (int(group_count.sum()), bool(is_finite)) == (16, True)


# Two stages of a curriculum from high, then everything; a stage ends at its second check.
CURRICULUM = {
  "curriculum__enabled": True,
  "curriculum__boundaries": (0, 400, 1000),
  "curriculum__check_every_steps": 2,
  "curriculum__patience": 1,
}


@pytest.mark.parametrize(("stage", "num_devices"), [(0, 4), (1, 1)])
def test_grouped_gradients_are_masked_gradients_in_a_stage(stage, num_devices):
  masked, ordinary = gradients("masked", stage=stage), gradients("masked")
  norm = optax.tree.norm
  assert norm(jax.tree.map(jnp.subtract, masked, ordinary)) > 0.01 * norm(ordinary)
  assert_same_gradients(gradients("grouped", num_devices, stage=stage), masked)


def test_one_and_four_devices_train_a_stage_alike():
  fields = CURRICULUM | {"curriculum__patience": 9}
  config = tiny_config(**fields, optimizer__warmup_steps=0)
  (one, state_one), (four, state_four) = (run_steps(config, n, 5, stage=1) for n in (1, 4))
  np.testing.assert_allclose(four, one, rtol=1e-5)
  for name in ("window", "stage"):
    a, b = (jax.tree.leaves(getattr(state, name)) for state in (state_one, state_four))
    np.testing.assert_allclose(np.hstack(a), np.hstack(b), rtol=1e-4)
  assert int(state_one.stage.number) == 1
  assert int(state_one.stage.example_count) == 6  # of one step: 40 % of 16 slots, rounded
  assert state_one.window.group_count.tolist() == [6, 10]


def test_losses_by_group_are_means_over_their_examples():
  boundaries = (0, 44, 123, 371, 1000)
  fields = dict(curriculum__boundaries=boundaries, training__log_every_steps=3)
  config = tiny_config("method=full", **fields)
  devices = jax.devices()[:2]
  # Parameters stay: the learning rate is zero.
  step = make_step(config, devices, learning_rate=lambda *_: jnp.float32(0))
  state = make_state(config, devices, noisy_params(config))
  objective = Experiment(config).objective(devices)
  evaluate = parallel.pmap(lambda p, b, k: loss_module.batch_losses(p, objective, k, b), devices)
  batch = {name: rows.reshape(2, 8, *rows.shape[2:]) for name, rows in digits_batch().items()}
  losses, t = [], []
  for number in range(3):
    step_losses, step_t = evaluate(state.params, batch, jax.random.fold_in(KEY, number))
    losses, t = [*losses, *np.ravel(step_losses)], [*t, *np.ravel(step_t)]
    state, _ = step(state, batch, KEY)
  window = parallel.to_host(parallel.unreplicate(state.window))
  group = np.digitize(t, boundaries) - 1
  for g in range(4):
    assert window.group_count[g] == (group == g).sum() > 0
    expected = np.sum(np.asarray(losses)[group == g])
    np.testing.assert_allclose(window.group_loss[g], expected, rtol=1e-5)
  assert float(window.loss) / 3 == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("restart", [True, False])
def test_a_stage_restarts_the_optimizer_and_its_rate_if_asked_to(restart):
  config = tiny_config(
    "method=full",
    **CURRICULUM | {"curriculum__patience": 2},
    curriculum__restart_optimizer=restart,
    curriculum__restart_decay=restart,
    optimizer__warmup_steps=3,
    optimizer__decay="cosine",
    training__num_steps=11,
  )
  devices, batch = jax.devices()[:1], digits_batch()
  steps = [make_step(config, devices, stage) for stage in (0, 1)]
  state = make_state(config, devices, noisy_params(config))
  # No loss is below 0: both checks up to step 4 are bad.
  state = state.replace(stage=state.stage.replace(best_loss=state.stage.loss_sum))
  seen, stage, rates = [], 0, []
  for _ in range(6):
    state, _ = steps[stage](state, batch, KEY)
    host = parallel.to_host(parallel.unreplicate(state))
    count = int(optax.tree.get(host.opt_state, "count"))
    moments = float(optax.tree.norm(optax.tree.get(host.opt_state, "mu")))
    stage = int(host.stage.number)
    seen.append((stage, count, moments > 0))
    rates.append(float(host.window.learning_rate) / config.optimizer.learning_rate)
  assert int(host.stage.first_step) == 4
  fresh = [(1, 0, False), (1, 1, True), (1, 2, True)]
  going_on = [(1, 4, True), (1, 5, True), (1, 6, True)]
  assert seen[:3] == [(0, 1, True), (0, 2, True), (0, 3, True)]
  assert seen[3:] == (fresh if restart else going_on)
  falling = [0.5 + 0.5 * np.cos(np.pi * done / 8) for done in range(3)]  # from step 3 to 11
  last = [1 / 3, 2 / 3] if restart else falling[1:]
  np.testing.assert_allclose(rates, [1 / 3, 2 / 3, 1, falling[0], *last], rtol=1e-5)


def test_evaluation_stays_on_all_timesteps():
  objective = Experiment(tiny_config(**CURRICULUM)).objective(jax.devices()[:1])
  assert objective.strata.ranges == ((0, 1000, 16),)
  assert objective.without_augmentation().strata == objective.strata


@pytest.mark.gpu
@pytest.mark.parametrize("compute", ["masked", "grouped"])
def test_components_no_example_uses_get_exactly_zero_gradient(compute):
  """All timesteps at the lowest bucket: nothing above it may learn."""
  config = tiny_config(rank__compute=compute, rank__num_buckets=3)
  model = Experiment(config).model()
  params = noisy_params(config)
  x = jax.random.normal(KEY, (8, 8, 8, 1))
  t = jnp.full(8, 999)
  y, bucket = jnp.zeros(8, int), jnp.zeros(8, jnp.int32)
  groups = ((8, 2),) if compute == "masked" else ((4, 2), (4, 1))

  def loss(params):
    def apply(selection, *inputs):
      return model.apply({"params": params}, *inputs, selection)

    return jnp.square(apply_by_group(apply, groups, bucket, x, t, y)).sum()

  grads = jax.jit(jax.grad(loss))(params)
  for name, ranks in model.plan.layers:
    layer = functools.reduce(lambda tree, part: tree[part], name.split("/"), grads)
    low, high = ranks.active[0], ranks.active[-1]
    assert low < high
    assert (layer["down"][:, low:] == 0).all()
    assert (layer["up"][low:] == 0).all()
    assert (jnp.abs(layer["down"][:, :low]).sum(0) > 0).all()


def noise_of_step(config, num_devices, key=KEY):
  objective = Experiment(config).objective(jax.devices()[:num_devices])
  local = config.training.batch_size // num_devices
  parts = []
  for device in range(num_devices):
    index = jnp.arange(local) * num_devices + device
    parts.append((index, loss_module.draw_step_noise(key, index, (8, 8, 1), objective)))
  order = np.argsort(np.concatenate([index for index, _ in parts]))
  fields = ("t", "eps", "drop", "posterior_noise")
  return {f: np.concatenate([getattr(d, f) for _, d in parts])[order] for f in fields}


def test_noise_belongs_to_the_global_index_not_the_device():
  config = tiny_config(training__batch_size=32)
  one, four = noise_of_step(config, 1), noise_of_step(config, 4)
  for name in ("t", "drop"):
    np.testing.assert_array_equal(one[name], four[name])
  for name in ("eps", "posterior_noise"):  # of programs of other shapes
    np.testing.assert_allclose(one[name], four[name], atol=1e-5)
  other = noise_of_step(config, 1, jax.random.key(8))
  assert (one["eps"] != other["eps"]).all()
  assert len(np.unique(one["eps"])) == one["eps"].size


def test_noise_has_its_distributions():
  config = tiny_config(training__batch_size=4000, model__class_dropout_rate=0.1)
  got = noise_of_step(config, 1)
  assert got["drop"].mean() == pytest.approx(0.1, abs=0.02)
  for noise in ("eps", "posterior_noise"):
    assert got[noise].mean() == pytest.approx(0, abs=0.01)
    assert got[noise].std() == pytest.approx(1, abs=0.01)
  assert got["t"].mean() == pytest.approx(499.5, abs=0.5)
  # Independent choices, not one draw reused.
  noises = got["eps"].reshape(-1), got["posterior_noise"].reshape(-1)
  assert abs(np.corrcoef(*noises)[0, 1]) < 0.01


def losses_of(config, batch, num_devices=1):
  devices = jax.devices()[:num_devices]
  objective = Experiment(config).objective(devices)
  run = parallel.pmap(lambda p, b, k: loss_module.batch_losses(p, objective, k, b)[0], devices)
  params = parallel.replicate(noisy_params(config), devices)
  return np.asarray(run(params, batch, KEY)).reshape(-1)


def digits_batch(size=16, devices=1):
  batch = Experiment(tiny_config()).source("train").gather(np.arange(size), np.zeros(size, bool))
  return {name: rows.reshape(devices, -1, *rows.shape[1:]) for name, rows in batch.items()}


def test_dropped_labels_do_not_matter_and_kept_ones_do():
  batch = digits_batch()
  other = batch | {"label": (batch["label"] + 1) % 10}
  always = tiny_config(model__class_dropout_rate=1.0)
  never = tiny_config(model__class_dropout_rate=0.0)
  np.testing.assert_array_equal(losses_of(always, batch), losses_of(always, other))
  assert (losses_of(never, batch) != losses_of(never, other)).all()


def test_latents_are_drawn_from_their_distribution():
  config, batch = tiny_config(), digits_batch()
  noise = noise_of_step(config, 1)["posterior_noise"][None]
  std = np.linspace(0.1, 2, 16, dtype=np.float32)[None, :, None, None, None]
  std = np.broadcast_to(std, noise.shape)
  got = losses_of(config, batch | {"std": std})
  expected = losses_of(config, batch | {"image": batch["image"] + std * noise})
  np.testing.assert_allclose(got, expected, rtol=1e-6)
  assert (got != losses_of(config, batch)).all()


def test_unconditional_training_ignores_labels():
  config = tiny_config("method=full", data__num_classes=0)
  losses, _ = run_steps(config, 1, 2)
  assert np.isfinite(losses).all()


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_learned_variance_trains_by_the_bound_alone(prediction):
  """The bound must not reach the mean: prediction gradients stay as without it."""
  config = tiny_config(
    "method=full", model__learn_sigma=True, diffusion__prediction=prediction, seed=3
  )
  objective = Experiment(config).objective(jax.devices()[:1])
  x_0 = jnp.asarray(digits_batch()["image"][0])
  chosen = loss_module.draw_step_noise(KEY, jnp.arange(16), (8, 8, 1), objective)

  # Stands for the model: its output is the parameters.
  model = mock.Mock(
    spec=dit.DiT,
    shape=objective.model.shape,
    plan=objective.model.plan,
    apply=lambda variables, *_: variables["params"],
  )
  fake = dataclasses.replace(objective, model=model)
  output = jax.random.normal(KEY, (16, 8, 8, 2))

  def loss(out):
    return loss_module.example_losses(out, fake, x_0, None, chosen).sum()

  grad = jax.grad(loss)(output)
  signal = np.sqrt(objective.alphas_cumprod)[chosen.t][:, None, None, None]
  sigma = np.sqrt(1 - objective.alphas_cumprod)[chosen.t][:, None, None, None]
  target = chosen.eps if prediction == "epsilon" else signal * chosen.eps - sigma * x_0
  np.testing.assert_allclose(
    grad[..., :1], 2 * (output[..., :1] - target) / 64, rtol=1e-3, atol=1e-5
  )
  assert (jnp.abs(grad[..., 1:]) > 0).any()


def test_min_snr_reweights_each_example():
  batch = digits_batch()
  uniform = losses_of(tiny_config(), batch)
  weighted = losses_of(tiny_config(diffusion__loss_weighting="min_snr"), batch)
  t = noise_of_step(tiny_config(), 1)["t"]
  alpha_bar = Experiment(tiny_config()).alphas_cumprod[t]
  snr = alpha_bar / (1 - alpha_bar)
  np.testing.assert_allclose(weighted, uniform * np.minimum(snr, 5) / (snr + 1), rtol=1e-4)


@functools.cache
def step_of_rate(rate):
  """A step on two devices, compiled once."""
  constant = jnp.float32(rate)
  return make_step(tiny_config("method=full"), jax.devices()[:2], learning_rate=lambda *_: constant)


@pytest.mark.parametrize("quantity", [None, *NON_FINITE_QUANTITIES])
def test_a_step_reports_the_first_quantity_that_is_not_finite(quantity):
  """The loss of a step does not show the parameters it leaves behind."""
  config, devices = tiny_config("method=full"), jax.devices()[:2]
  params = noisy_params(config)
  if quantity in ("loss", "gradient"):
    # Of a prediction of 1e30 the square is infinite; of one of 1e18 only the gradient's norm.
    linear = dict(params["final_layer"]["linear"])
    linear["kernel"] *= 1e30 if quantity == "loss" else 1e18
    params = params | {"final_layer": params["final_layer"] | {"linear": linear}}
  step = step_of_rate(jnp.inf if quantity == "update" else 1e-3)
  state = make_state(config, devices, params)
  batch = digits_batch(devices=2)
  if quantity == "batch":
    batch["image"][1, 3] = np.nan  # the second device's
  _, window = step(state, batch, KEY)
  expected = 1 + NON_FINITE_QUANTITIES.index(quantity) if quantity else 0
  assert parallel.read(window.non_finite) == expected


def test_golden_one_step_metrics():
  """Three steps of each arm, to the digits float32 keeps across machines.

  Regenerate tests/golden/one_step.json (print `got` below) only for a change
  that is meant to alter the numbers of training: the initialization, the
  randomness, the loss, the optimizer or the rank plan. Never to quiet a change
  that should not have touched them.
  """
  golden = json.loads((GOLDEN / "one_step.json").read_text())
  got = {}
  for arm in ("full", "static", "adaptive"):
    config = tiny_config(f"method={arm}", optimizer__warmup_steps=0, **tiny.DEEPER)
    losses, state = run_steps(config, 1, 3, noisy_params(config))
    norm = float(optax.tree.norm(state.ema_params))
    got[arm] = [*losses, norm]
  for arm, numbers in got.items():
    np.testing.assert_allclose(numbers, golden[arm], rtol=2e-5, err_msg=json.dumps(got))
