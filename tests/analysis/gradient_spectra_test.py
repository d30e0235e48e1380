import dataclasses
import functools
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrdit.analysis import gradient_batches, gradient_spectra, spectra
from lrdit.analysis.unit_cache import UnitCache
from lrdit.experiment import Experiment
from lrdit.model import dit, low_rank
from lrdit.rank import plan as rank_schedule
from lrdit.runtime.errors import UserError
from lrdit.train import loss as loss_module
from tests.tiny import DEEPER, load_digits, tiny_config
from tests.trained import noisy_params_of

BOUNDARIES = (0, 300, 650, 1000)
BATCH_SIZES = (3, 8)
SEED = 5
SETTINGS = dict(
  boundaries=BOUNDARIES, batch_sizes=BATCH_SIZES, subspace_rank=3, microbatch=4, seed=SEED
)


@functools.cache
def make_objective(arm="adaptive", **overrides):
  fields = DEEPER | {
    "diffusion__loss_weighting": "min_snr",
    "rank__compute": "masked",
    "training__batch_size": 8,
    "rank__dense_layers": ("patch_embed", "final_layer/linear"),
  }
  config = tiny_config(f"method={arm}", **fields | overrides)
  return Experiment(config).objective(jax.devices()[:1]).without_augmentation()


def make_examples(size=8):
  return gradient_batches.sample_examples(load_digits("train"), size, 10, SEED)


def make_batch(objective, t, examples=None, condition="data"):
  examples = examples or make_examples(len(t))
  return gradient_batches.condition_batch(condition, objective, examples, t)


def of_mixed_timesteps(size=8):
  """From nearly clean to nearly noise, of all buckets."""
  return np.linspace(10, 990, size).astype(np.int64)


def make_gradients(objective, microbatch=4):
  return gradient_spectra.KernelGradients(
    objective.model, noisy_params_of(objective.model), microbatch
  )


def add_rows(gradients, batch, rows):
  sums = gradients.add(gradients.zeros(), batch, np.asarray(rows))
  return {name: np.asarray(values) for name, values in sums.items()}


def trainings_losses(params, objective, t, examples):
  """(N,) losses of training for the same noise and timesteps, every label kept."""
  draws = loss_module.StepNoise(
    t=jnp.asarray(t, jnp.int32),
    eps=jnp.asarray(examples.eps),
    drop=jnp.zeros(len(t), bool),
    posterior_noise=jnp.zeros(examples.eps.shape),
  )
  x_0, y = jnp.asarray(examples.x_0), jnp.asarray(examples.y)
  return loss_module.example_losses(params, objective, x_0, y, draws)


def gradients_by_perturbation(objective, t, examples):
  """Of training's summed loss, by dense kernels added to the model's own layers, at 0."""

  def loss(added):
    def intercept(call, args, kwargs, context):
      y = call(*args, **kwargs)
      is_layer = isinstance(context.module, (low_rank.Dense, low_rank.LowRankDense))
      if is_layer and context.method_name == "__call__":
        return y + args[0] @ added["/".join(context.module.path)]
      return y

    with nn.intercept_methods(intercept):
      return trainings_losses(noisy_params_of(objective.model), objective, t, examples).sum()

  shapes = dit.layer_shapes(objective.model.shape)
  return jax.jit(jax.grad(loss))({name: jnp.zeros(dims) for name, dims in shapes.items()})


def assert_trees_close(got, expected, tolerance=1e-5):
  assert got.keys() == expected.keys()
  for name in got:
    largest = np.abs(expected[name]).max()
    assert largest > 0
    np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=tolerance * largest)


def test_gradients_are_of_added_dense_kernels_under_trainings_loss():
  """Each example has the rank of its own bucket, which the model's mask gives it."""
  objective = make_objective(diffusion__prediction="epsilon")
  t, examples = of_mixed_timesteps(), make_examples()
  buckets = objective.model.plan.bucket_of_timestep[t]
  assert set(buckets) == {0, 1, 2}
  got = add_rows(make_gradients(objective), make_batch(objective, t, examples), np.arange(8))
  assert_trees_close(got, gradients_by_perturbation(objective, t, examples), 2e-5)


def test_gradients_of_the_full_arm_are_its_kernels_own():
  objective, t, examples = make_objective("full"), of_mixed_timesteps(), make_examples()

  def loss(params):
    return trainings_losses(params, objective, t, examples).sum()

  grads = jax.jit(jax.grad(loss))(noisy_params_of(objective.model))
  expected = {
    name: functools.reduce(lambda tree, part: tree[part], [*name.split("/"), "kernel"], grads)
    for name in dit.layer_shapes(objective.model.shape)
  }
  got = add_rows(make_gradients(objective), make_batch(objective, t, examples), np.arange(8))
  assert_trees_close(got, expected)


def test_padding_counts_for_nothing_and_rows_add_up():
  """Five rows in microbatches of 4 are padded, those of 1 never."""
  objective = make_objective()
  batch = make_batch(objective, of_mixed_timesteps())
  kept = batch["weight"].copy()
  got = add_rows(make_gradients(objective), batch, [7, 1, 2, 0, 5])
  one_by_one = make_gradients(objective, 1)
  parts = [add_rows(one_by_one, batch, [row]) for row in (0, 1, 2, 5, 7)]
  assert_trees_close(got, {name: sum(part[name] for part in parts) for name in got})
  np.testing.assert_array_equal(batch["weight"], kept)


def test_measures_are_of_nested_prefixes():
  objective, examples = make_objective(), make_examples(9)
  t = of_mixed_timesteps(9)
  batch, gradients = make_batch(objective, t, examples), make_gradients(objective)
  record, arrays = gradient_spectra.measure_unit(gradients, batch, (3, 7, 9), 3)
  for i, rows in enumerate((range(3), range(7), range(9))):
    for name, gradient in add_rows(gradients, batch, rows).items():
      expected = spectra.measures(spectra.singular_values(gradient))
      assert record[name][i] == pytest.approx(expected, rel=1e-3)
  # Nine halves into four and five.
  for part, rows in (("all", range(9)), ("first", range(4)), ("second", range(4, 9))):
    for name, gradient in add_rows(gradients, batch, rows).items():
      u, _, vt = np.linalg.svd(gradient.astype(np.float64))
      for side, basis in (("left", u), ("right", vt.T)):
        got = arrays[f"{part}/{side}/{name}"]
        share, _ = gradient_spectra.overlap(got, basis[:, : got.shape[1]])
        assert share == pytest.approx(1, abs=1e-4)


def test_leading_subspaces_are_those_of_the_svd():
  rng = np.random.default_rng(0)
  u, v = (np.linalg.qr(rng.normal(size=(size, 6)))[0] for size in (40, 25))
  matrix = (u * [9, 4, 1, 1e-2, 1e-4, 1e-12]) @ v.T
  for m, (a, b) in ((matrix, (u, v)), (matrix.T, (v, u))):
    left, right = gradient_spectra.leading_subspaces(m, 4)
    # Vectors up to their sign, in order.
    np.testing.assert_allclose(np.abs(left.T @ a[:, :4]), np.eye(4), atol=1e-9)
    np.testing.assert_allclose(np.abs(right.T @ b[:, :4]), np.eye(4), atol=1e-9)
  # What float32 does not resolve is no direction.
  assert [q.shape for q in gradient_spectra.leading_subspaces(matrix, 6)] == [(40, 5), (25, 5)]
  assert gradient_spectra.leading_subspaces(np.zeros((4, 3)), 2)[0].shape == (4, 0)


def test_overlap_of_known_subspaces():
  eye, angle = np.eye(5), np.radians(30)
  a = eye[:, :2]
  b = np.stack([eye[0], np.cos(angle) * eye[1] + np.sin(angle) * eye[2]], axis=1)
  assert gradient_spectra.overlap(a, a) == pytest.approx((1, 0), abs=1e-5)
  assert gradient_spectra.overlap(a, b) == pytest.approx(((1 + 0.75) / 2, 30))
  assert gradient_spectra.overlap(a, eye[:, 3:]) == pytest.approx((0, 90))
  assert gradient_spectra.overlap(a, b[:, :1]) == pytest.approx((1, 0), abs=1e-5)
  assert gradient_spectra.overlap(a, a[:, :0]) == (None, None)


@pytest.mark.parametrize("size", [8, 12, 100])
def test_beginnings_of_the_order_are_spread(size):
  order = gradient_batches.spread_order(size)
  assert sorted(order) == list(range(size))
  for beginning in range(2, size + 1):
    parts = np.sort(order[:beginning])
    gaps = np.diff([*parts, parts[0] + size])
    assert gaps.max() <= 2 * size / beginning + 1
  assert gradient_batches.spread_order(8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]


def test_timesteps_are_stratified_in_their_group():
  t = gradient_batches.group_timesteps((0, 7, 400, 1000), 50, SEED)
  order = gradient_batches.spread_order(50)
  for row, (low, high) in zip(t, ((0, 7), (7, 400), (400, 1000)), strict=True):
    assert low <= row.min() and row.max() < high
    np.testing.assert_allclose((row - low) / (high - low), order / 50, atol=1 / 50 + 1 / 7)
  assert set(t[0]) == set(range(7))
  many = gradient_batches.group_timesteps((0, 4), 40_000, SEED)[0]
  assert np.bincount(many).tolist() == [10_000] * 4


def test_shuffled_timesteps_are_the_pooled_ones():
  t = gradient_batches.group_timesteps(BOUNDARIES, 64, SEED)
  shuffled = gradient_batches.shuffle_timesteps(t, SEED)
  np.testing.assert_array_equal(np.sort(shuffled, axis=0), np.sort(t, axis=0))
  # Every group has about a third of each range, by choices that differ between examples.
  counts = [np.histogram(row, BOUNDARIES)[0] for row in shuffled]
  assert np.min(counts) > 10
  assert len(np.unique(np.argsort(shuffled, axis=0), axis=1).T) == 6


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_noise_null_changes_the_target_alone(prediction):
  objective = make_objective(diffusion__prediction=prediction)
  examples = make_examples(1000)
  t = gradient_batches.group_timesteps((0, 100, 900, 1000), 1000, SEED)
  for group in range(3):
    data, noise = (
      gradient_batches.condition_batch(condition, objective, examples, t[group])
      for condition in ("data", "noise")
    )
    assert data.keys() == noise.keys() == {"x_t", "t", "target", "weight", "y"}
    for name in data.keys() - {"target"}:
      np.testing.assert_array_equal(data[name], noise[name])
    got, real = noise["target"], data["target"]
    assert got.std() == pytest.approx(real.std(), rel=0.02)
    for other in (real, data["x_t"], examples.x_0, examples.eps):
      assert abs(np.corrcoef(got.ravel(), other.ravel())[0, 1]) < 0.02


def test_the_residual_null_passes_noise_back_in_place_of_each_error():
  """By one vector-Jacobian product of the model, at the size that the error really has."""
  objective, examples = make_objective(), make_examples()
  plan, t = objective.model.plan, np.full(8, 400)
  batch = make_batch(objective, t, examples, "residual")
  np.testing.assert_array_equal(batch["target"], make_batch(objective, t)["target"])
  got = add_rows(make_gradients(objective), batch, np.arange(8))
  bucket = int(plan.bucket_of_timestep[400])
  dense = gradient_spectra.dense_params(noisy_params_of(objective.model), plan, bucket)
  model = dataclasses.replace(objective.model, plan=rank_schedule.dense_plan(1000))

  def predict(params):
    selection = low_rank.RankSelection()
    inputs = (jnp.asarray(batch[name]) for name in ("x_t", "t", "y"))
    return model.apply({"params": params}, *inputs, selection)

  output, pull_back = jax.vjp(predict, dense)
  size = np.sqrt(np.square(output - batch["target"]).mean(axis=(1, 2, 3), keepdims=True))
  weight = batch["weight"][:, None, None, None] * 2 / output[0].size
  (gradient,) = pull_back(weight * size * examples.target_noise)
  for name in ("blocks_1/attn/qkv", "blocks_0/mlp/fc2", "final_layer/linear"):
    expected = functools.reduce(
      lambda tree, part: tree[part], [*name.split("/"), "kernel"], gradient
    )
    assert_trees_close({name: got[name]}, {name: np.asarray(expected)})


def test_conditions_share_examples_of_which_prefixes_do_not_depend_on_their_number():
  few, many = make_examples(5), make_examples(9)
  for field in ("x_0", "y", "eps", "target_noise"):
    np.testing.assert_array_equal(getattr(few, field), getattr(many, field)[:5])
  assert len(np.unique(np.concatenate([many.eps, many.target_noise]))) == 2 * many.eps.size
  with pytest.raises(UserError, match="1498"):
    make_examples(1499)


def test_latents_are_sampled_from_their_distribution():
  source = load_digits("train")

  class Latents(type(source)):
    def gather(self, index, flip):
      batch = super().gather(index, flip)
      return batch | {"std": np.full_like(batch["image"], 0.5)}

  fields = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}
  sampled = gradient_batches.sample_examples(Latents(**fields), 200, 10, SEED)
  images = make_examples(200)
  noise = (sampled.x_0 - images.x_0).ravel() / 0.5
  assert (noise.mean(), noise.std()) == pytest.approx((0, 1), abs=0.03)
  assert abs(np.corrcoef(noise, images.eps.ravel())[0, 1]) < 0.03


def analyze(cache, objective, **changes):
  source = load_digits("train")
  params = jax.device_get(noisy_params_of(objective.model))
  settings = SETTINGS | changes
  return gradient_spectra.analyze_gradients(objective, params, source, **settings, cache=cache)


@pytest.fixture(scope="module")
def analysis(tmp_path_factory):
  """A whole analysis and its units."""
  cache = UnitCache(tmp_path_factory.mktemp("gradients") / "cache", {})
  return analyze(cache, make_objective()), cache


def test_analysis_has_every_layer_group_and_condition(analysis):
  result, _ = analysis
  assert result["groups"][1] == {"t_first": 300, "t_last": 649}
  shapes = dit.layer_shapes(make_objective().model.shape)
  for condition in gradient_batches.CONDITIONS:
    ranks, overlaps = result["conditions"][condition], result["overlap"][condition]
    assert list(ranks["layers"]) == list(overlaps["layers"]) == list(shapes)
    for name, layer in ranks["layers"].items():
      assert (layer["dim_in"], layer["dim_out"]) == shapes[name]
      measured = layer["measures"][2][1]
      assert measured["stable_rank"] >= 1
      assert measured["normalised"]["energy_rank_90"] == measured["energy_rank_90"] / min(
        shapes[name]
      )
      table = overlaps["layers"][name]
      for side, dim in zip(("left", "right"), shapes[name], strict=True):
        assert table[f"random_{side}"] == min(3, *shapes[name]) / dim
        shares, degrees = np.array(table[side]), np.array(table[f"{side}_degrees"])
        assert shares.shape == degrees.shape == (3, 3)
        np.testing.assert_allclose(shares, shares.T, atol=1e-6)
        np.testing.assert_allclose(np.diag(shares), 1, atol=1e-5)
        np.testing.assert_allclose(np.diag(degrees), 0, atol=0.1)
      halves = [np.diag(table["cross_half"][side]) for side in ("left", "right")]
      np.testing.assert_allclose(table["split_half"], np.mean(halves, axis=0))
    assert set(ranks["kinds"]) == set(overlaps["kinds"]) == {"attention", "mlp", "adaln", "other"}
    mlp = [ranks["layers"][f"blocks_{i}/mlp/fc{j}"] for i in (0, 1) for j in (1, 2)]
    of_layers = [layer["measures"][0][1]["normalised"]["entropy_rank"] for layer in mlp]
    assert ranks["kinds"]["mlp"][0][1]["entropy_rank"] == pytest.approx(np.mean(of_layers))
  # Groups and conditions differ.
  cells = [
    result["conditions"][condition]["kinds"]["mlp"][group][1]["entropy_rank"]
    for condition in gradient_batches.CONDITIONS
    for group in range(3)
  ]
  assert len(set(cells)) == 12


def test_shuffled_and_noise_conditions_are_measured_as_defined(analysis):
  result, _ = analysis
  objective, examples = make_objective(), make_examples()
  sampled = gradient_batches.group_timesteps(BOUNDARIES, 8, SEED)
  shuffled = gradient_batches.shuffle_timesteps(sampled, SEED)
  gradients = make_gradients(objective)
  for condition, t in (("data", sampled), ("shuffled", shuffled), ("noise", sampled)):
    batch = make_batch(objective, t[2], examples, condition)
    gradient = add_rows(gradients, batch, np.arange(8))["blocks_1/attn/qkv"]
    layer = result["conditions"][condition]["layers"]["blocks_1/attn/qkv"]
    expected = spectra.stable_rank(spectra.singular_values(gradient))
    assert layer["measures"][2][1]["stable_rank"] == pytest.approx(expected, rel=1e-3)


def test_halves_are_compared_with_the_other_half(analysis):
  result, cache = analysis
  table = result["overlap"]["data"]["layers"]["blocks_1/mlp/fc1"]["cross_half"]
  (_, one), (_, two) = cache.load("data/0"), cache.load("data/2")
  for side in ("left", "right"):
    first, second = one[f"first/{side}/blocks_1/mlp/fc1"], two[f"second/{side}/blocks_1/mlp/fc1"]
    share, _ = gradient_spectra.overlap(first, second)
    assert 0 < share < 0.99
    assert table[side][0][2] == share


def test_finished_units_are_not_measured_again(analysis):
  result, cache = analysis
  lost = ("data/1", "noise/0")
  for unit in lost:
    cache._path(unit).unlink()
  with mock.patch.object(
    gradient_spectra, "measure_unit", wraps=gradient_spectra.measure_unit
  ) as measure:
    again = analyze(cache, make_objective())
  assert measure.call_count == len(lost)
  assert again == result


def test_layers_without_gradient_have_rank_and_overlap_of_nothing(tmp_path):
  """At initialization the model's output is zero, and all but the last layer's gradient."""
  objective = make_objective("full", data__num_classes=0)
  params = dit.init_params(objective.model, jax.random.key(0))
  result = gradient_spectra.analyze_gradients(
    objective, params, load_digits("train"), **SETTINGS, cache=UnitCache(tmp_path / "cache", {})
  )
  layer = result["conditions"]["data"]["layers"]["blocks_0/mlp/fc1"]
  assert layer["measures"][0][0]["entropy_rank"] == 0
  overlaps = result["overlap"]["data"]
  assert overlaps["kinds"]["mlp"]["left"] == [[None] * 3] * 3
  assert overlaps["layers"]["final_layer/linear"]["left"][0][0] == pytest.approx(1)
