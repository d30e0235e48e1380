import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrdit.diffusion import process, solvers
from lrdit.experiment import Experiment
from lrdit.model import dit
from lrdit.model.low_rank import RankSelection
from lrdit.sampling import sampler
from tests import tiny
from tests.trained import noisy_params

DEVICES = jax.devices()[:1]


def tiny_config(arg="", **overrides):
  """A config of three ranks."""
  return tiny.tiny_config(arg, **({"rank__num_buckets": 3} | overrides))


def balanced(index):
  return sampler.balanced_labels(index, 10)


def sample(config, num_samples, label_rule=balanced, num_devices=1):
  made = Experiment(config).sampler(jax.devices()[:num_devices])
  batches = list(made.sample(noisy_params(config), label_rule, num_samples))
  return np.concatenate(batches), made


def masked_trajectory(config, num_samples, is_guided=()):
  """The whole trajectory with the unsliced model and a mask, step by step."""
  model, table = Experiment(config).model(), Experiment(config).solver_table
  params, plan = noisy_params(config), model.plan
  index = jnp.arange(num_samples, dtype=jnp.uint32)
  y = jnp.asarray(sampler.balanced_labels(np.arange(num_samples), 10))
  x = sampler._initial_noise(index, config.sampling.seed, (8, 8, 1))
  x_0_last = jnp.zeros_like(x)

  @jax.jit
  def apply(x, t, y):
    bucket = jnp.asarray(plan.bucket_of_timestep)[t]
    selection = RankSelection(plan.num_buckets - 1, jnp.full(num_samples, bucket))
    return model.apply({"params": params}, x, jnp.full(num_samples, t), y, selection)

  for i, t in enumerate(table.t):
    output = apply(x, t, y)
    if is_guided and is_guided[i]:
      null = apply(x, t, jnp.full_like(y, 10))
      output = null + config.sampling.guidance_scale * (output - null)
    x_0, eps = process.predict_x_0_eps(
      config.diffusion.prediction, output, x, table.signal[i], table.noise[i]
    )
    x_prev = table.on_x_t[i] * x + table.on_x_0[i] * x_0 + table.on_eps[i] * eps
    x, x_0_last = x_prev + table.on_x_0_last[i] * x_0_last, x_0
  return np.asarray(x)


@pytest.mark.gpu
@pytest.mark.parametrize(
  ("schedule", "solver"),
  [
    ("logistic_decreasing", "ddim"),
    ("midpeak", "dpm++"),
    pytest.param("logistic_decreasing", "dpm++", marks=pytest.mark.slow),
    pytest.param("midpeak", "ddim", marks=pytest.mark.slow),
  ],
)
def test_sliced_trajectory_is_the_masked_one(schedule, solver):
  config = tiny_config(
    sampling__solver=solver,
    rank__schedule=schedule,
    sampling__num_steps=20,
    sampling__clip_x_0=False,
  )
  expected = masked_trajectory(config, 4)
  got, made = sample(config, 4)
  assert {program.bucket for program in made.run_program} == set(range(3))
  assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_a_sample_does_not_depend_on_its_company(solver):
  settings = dict(sampling__solver=solver, sampling__eta=0.5 if solver == "ddim" else 0.0)
  settings |= {"rank__num_buckets": 2}
  config = tiny_config(**settings)
  ten, _ = sample(config, 10)
  assert ten.shape == (10, 8, 8, 1)
  seven, _ = sample(config, 7)
  np.testing.assert_array_equal(seven, ten[:7])
  larger, _ = sample(tiny_config(**settings, sampling__batch_size=8), 10)
  np.testing.assert_allclose(larger, ten, atol=2e-5)
  spread, _ = sample(config, 10, num_devices=4)
  np.testing.assert_allclose(spread, ten, atol=2e-5)
  assert len(np.unique(ten.reshape(10, -1), axis=0)) == 10


@pytest.mark.parametrize("schedule", ["logistic_decreasing", "midpeak"])
def test_a_path_ends_at_the_sample_and_compiles_nothing_more(schedule):
  config = tiny_config(rank__schedule=schedule, sampling__num_steps=20)
  ten, made = sample(config, 10)
  steps = [0, 3, 7, 8, 15, 19]

  def predictions(steps):
    path = sampler.SamplePath(steps)
    rows = made.sample_rows(noisy_params(config), balanced, range(0, 8, 4), slice(4), path)
    for (_, got), expected in zip(rows, (ten[:4], ten[4:8]), strict=True):
      np.testing.assert_array_equal(got, expected)
    return np.stack(path.x_0)

  path = predictions(steps)
  assert path.shape == (6, 8, 8, 1)
  np.testing.assert_allclose(path[-1], ten[0], atol=2e-5)  # the last step of ddim returns x_0
  whole = predictions(range(20))
  np.testing.assert_array_equal(path, whole[steps])
  assert len(np.unique(whole.reshape(20, -1), axis=0)) == 20
  assert [run._cache_size() for run in made.run_program.values()] == [1, 1, 1]


def test_seed_label_and_steps_matter():
  base, _ = sample(tiny_config(), 4)
  for changed in (
    sample(tiny_config(sampling__seed=1), 4)[0],
    sample(tiny_config(), 4, label_rule=lambda index: np.full(len(index), 9, np.int32))[0],
    sample(tiny_config(sampling__num_steps=11), 4)[0],
  ):
    assert np.abs(changed - base).max() > 1e-3


@pytest.mark.parametrize("schedule", ["logistic_decreasing", "midpeak"])
def test_each_bucket_is_traced_once_whatever_the_number(schedule):
  config = tiny_config(rank__schedule=schedule, sampling__num_steps=20)
  made = Experiment(config).sampler(DEVICES)
  params = noisy_params(config)
  for num_samples in (3, 4, 9):
    got = np.concatenate(list(made.sample(params, balanced, num_samples)))
    assert len(got) == num_samples
  rest = [rows for _, rows in made.sample_rows(params, balanced, range(4, 9, 4), slice(4))]
  np.testing.assert_array_equal(np.concatenate(rest)[:5], got[4:])
  assert list(made.run_program) == [(0, False), (1, False), (2, False)]
  assert [run._cache_size() for run in made.run_program.values()] == [1, 1, 1]


def flops(config):
  made = Experiment(config).sampler(DEVICES)
  sliced = made.bucket_params(noisy_params(config))
  program, first, end = made.segments[0]
  x = jnp.zeros((4, 8, 8, 1))
  lowered = made.run_program[program].lower(
    sliced[program.bucket],
    (x, x),
    jnp.zeros(4, jnp.int32),
    jnp.arange(4),
    np.int32(first),
    np.int32(end),
  )
  return lowered.compile().cost_analysis()["flops"]


def test_guidance_costs_nothing_at_scale_one_and_twice_otherwise():
  one, two = flops(tiny_config()), flops(tiny_config(sampling__guidance_scale=2.0))
  unconditional = flops(tiny_config(data__num_classes=0))
  assert one == pytest.approx(unconditional, rel=0.02)
  assert two == pytest.approx(2 * one, rel=0.05)


GUIDED = dict(sampling__guidance_scale=3.0, sampling__num_steps=20, sampling__clip_x_0=False)


@pytest.mark.parametrize("solver", ["ddim", pytest.param("dpm++", marks=pytest.mark.slow)])
def test_guidance_in_an_interval_is_that_of_the_steps_within(solver):
  """Both ends lie within a bucket."""
  config = tiny_config(**GUIDED, sampling__solver=solver)
  alpha_bar = Experiment(config).alphas_cumprod[Experiment(config).solver_table.t]
  middle = np.sqrt(1 / alpha_bar[1:] - 1) * np.sqrt(1 / alpha_bar[:-1] - 1)
  low, high = np.sqrt(middle[[12, 3]]).tolist()  # between steps 12 and 13, 3 and 4
  is_guided = [4 <= i < 13 for i in range(20)]
  limits = dict(sampling__guidance_min_noise=low, sampling__guidance_max_noise=high)
  config = tiny_config(**GUIDED, sampling__solver=solver, **limits)
  got, made = sample(config, 4)
  assert len(made.segments) == 3 + 2  # two more than buckets
  expected = masked_trajectory(config, 4, is_guided)
  assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
  parts = sampler.SamplePath(range(20)).split(made.segments)
  assert [first for _, first, _ in parts] == list(range(20))
  assert [program.is_guided for program, _, _ in parts] == is_guided
  assert Experiment(config).num_passes.tolist() == [1 + guided for guided in is_guided]


def test_an_interval_of_all_or_no_noise_levels_is_full_or_no_guidance():
  def guided(**fields):
    fields = {f"sampling__{name}": value for name, value in fields.items()}
    return sample(tiny_config("method=static", **GUIDED | fields), 4)

  full, made = guided(num_steps=3)
  assert all(program.is_guided for program in made.run_program)
  everything, _ = guided(num_steps=3, guidance_min_noise=0.0, guidance_max_noise=1e9)
  np.testing.assert_array_equal(everything, full)
  empty, made = guided(num_steps=3, guidance_min_noise=0.5, guidance_max_noise=0.5)
  assert not any(program.is_guided for program in made.run_program)
  np.testing.assert_array_equal(empty, guided(num_steps=3, guidance_scale=1.0)[0])
  assert np.abs(full - empty).max() > 1e-3


def test_an_interval_includes_its_upper_end_alone():
  ones = np.ones(4)
  table = mock.Mock(
    spec=solvers.SolverTable, t=np.arange(4), signal=ones, noise=2.0 ** -np.arange(4)
  )

  def guided(low, high, scale=2.0, num_classes=10):
    return sampler.guided_steps(table, num_classes, scale, low, high).tolist()

  assert guided(None, None) == [True] * 4
  assert guided(0.25, 1.0) == [True, True, False, False]
  assert guided(None, 0.5) == guided(0.0, 0.5) == [False, True, True, True]
  assert guided(0.5, None) == [True, False, False, False]
  assert guided(2.0, 3.0) == guided(0.5, 0.5) == [False] * 4
  assert guided(None, None, scale=1.0) == guided(None, None, num_classes=0) == [False] * 4


def test_a_lower_bucket_computes_less():
  config = tiny_config(model__hidden_size=64)
  made = Experiment(config).sampler(DEVICES)
  shapes = {
    bucket: sum(p.size for p in jax.tree.leaves(params))
    for bucket, params in made.bucket_params(noisy_params(config)).items()
  }
  assert shapes[0] < shapes[1] < shapes[2]


def test_guidance_is_the_extrapolation_from_the_null_class():
  config = tiny_config()
  model = Experiment(config).model().clone(plan=Experiment(config).plan.at_bucket(2))
  params, x = noisy_params(config), jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
  y = jnp.array([1, 2, 3])

  def output(y, scale):
    return sampler.guided_output(model, params, x, jnp.int32(500), y, scale)

  conditional, null = output(y, 1.0), output(jnp.full(3, 10), 1.0)
  np.testing.assert_allclose(
    output(y, 3.0), null + 3.0 * (conditional - null), rtol=1e-4, atol=1e-5
  )


def test_guidance_may_be_of_the_first_channels_alone():
  """A stand-in model: its output is the label, in every channel."""
  shape = mock.Mock(channels=4, num_classes=9)

  def apply(_params, x, _t, y, _selection):
    return jnp.ones_like(x) * y[:, None, None, None]

  model = mock.Mock(spec=dit.DiT, shape=shape, apply=apply)
  x, y = jnp.zeros((1, 2, 2, 4)), jnp.array([1])
  for channels, expected in ((None, [-15] * 4), (3, [-15, -15, -15, 1])):
    got = sampler.guided_output(model, {}, x, jnp.int32(5), y, 3.0, channels)
    np.testing.assert_allclose(got[0, 0, 0], expected)


def test_a_sampler_guides_the_channels_that_the_config_names(monkeypatch):
  seen, guided = [], sampler.guided_output

  def note(*args):
    seen.append(args[-2:])
    return guided(*args)

  monkeypatch.setattr(sampler, "guided_output", note)
  fields = dict(sampling__guidance_scale=3.0, sampling__guidance_channels=1)
  sample(tiny_config("method=full", sampling__num_steps=1, **fields), 4)
  assert {*seen} == {(3.0, 1)}


def test_learned_variance_replaces_the_posterior_s():
  """At coordinate -1 (posterior) and +1 (beta) the step's noise is known."""
  config = tiny_config(model__learn_sigma=True, sampling__solver="ddpm")
  table = Experiment(config).solver_table
  settings = Experiment(config).sampler(DEVICES).settings
  x = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))

  def step(coordinate, table):
    fake = mock.Mock(
      spec=dit.DiT,
      shape=Experiment(config).shape,
      apply=lambda _, x_t, *__: jnp.concatenate([0 * x_t, jnp.full_like(x_t, coordinate)], axis=-1),
    )
    return sampler.solver_step(
      jnp.int32(3),
      (x, x),
      model=fake,
      params={},
      y=None,
      index=jnp.arange(4),
      table=table,
      settings=settings,
    )[0]

  silent = dataclasses.replace(table, on_noise=0 * table.on_noise)
  mean = step(-1.0, silent)
  small, large = step(-1.0, table) - mean, step(1.0, table) - mean
  z = sampler._noise(0, jnp.arange(4), 4, (8, 8, 1))
  np.testing.assert_allclose(small, table.on_noise[3] * z, rtol=1e-3, atol=1e-5)
  beta = np.exp(table.log_variance_high[3])
  np.testing.assert_allclose(large, beta**0.5 * z, rtol=1e-3, atol=1e-5)


def test_labels():
  assert sampler.balanced_labels(np.arange(12), 10).tolist() == [*range(10), 0, 1]
  labels = sampler.random_labels(0, np.arange(1000), 10)
  np.testing.assert_array_equal(labels[:10], sampler.random_labels(0, np.arange(10), 10))
  assert np.bincount(labels, minlength=10).min() > 60
  assert (labels != sampler.random_labels(1, np.arange(1000), 10)).any()


def test_samples_are_clipped_only_if_asked():
  config = dict(sampling__num_steps=3, diffusion__prediction="epsilon")
  clipped, _ = sample(tiny_config(**config), 4)
  free, _ = sample(tiny_config(**config, sampling__clip_x_0=False), 4)
  assert np.abs(clipped).max() <= 1.0
  assert np.abs(free).max() > 1.0
