import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrdit.diffusion import process, solvers
from lrdit.runtime.errors import UserError
from tests.tiny import GOLDEN

pytestmark = pytest.mark.floats


@pytest.fixture(scope="module")
def golden():
  with np.load(GOLDEN / "diffusion.npz") as arrays:
    return {name: arrays[name] for name in arrays}


COSINE = process.make_alphas_cumprod("squaredcos_cap_v2", 1000)


def assert_close(got, expected):
  """Compare to 1e-6 of the array's scale, as the reference rounds its tables to float32."""
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_noise_schedules(golden):
  linear = process.make_alphas_cumprod("linear", 1000)
  assert COSINE.dtype == linear.dtype == np.float64
  assert_close(COSINE, golden["alphas_cumprod"])
  assert_close(linear, golden["alphas_cumprod_linear"])


def combine(table, i, x_t, x_0, eps, x_0_last=0.0, z=0.0):
  """Compute the documented linear combination in float64."""
  return (
    table.on_x_t[i] * x_t
    + table.on_x_0[i] * x_0
    + table.on_eps[i] * eps
    + table.on_x_0_last[i] * x_0_last
    + table.on_noise[i] * z
  )


def solve(table, prediction, model, x):
  x_0_last = np.zeros_like(x)
  for i, t in enumerate(table.t):
    x_0, eps = process.predict_x_0_eps(prediction, model(x, t), x, table.signal[i], table.noise[i])
    x, x_0_last = combine(table, i, x, x_0, eps, x_0_last), x_0
  return x


@pytest.mark.parametrize("num_steps", [10, 50, 100])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_ddim_end_points(golden, num_steps, prediction):
  name = f"ddim_{num_steps}_{'epsilon' if prediction == 'epsilon' else 'v_prediction'}"
  table = solvers.solver_table("ddim", COSINE, num_steps)
  np.testing.assert_array_equal(table.t, golden[f"{name}_timesteps"])

  def model(x, t):
    return 0.3 * x + 0.5 * np.sin(0.1 * golden["eps_flat_index"] + 0.01 * t)

  assert_close(solve(table, prediction, model, golden["x_T"]), golden[f"{name}_x0"])


def test_forward_process_and_velocity(golden):
  # This uses the reference's own float32 table, which is checked above.
  alpha_bar = golden["alphas_cumprod"].astype(np.float64)
  alpha_bar = alpha_bar[golden["add_noise_t"]].reshape(-1, 1, 1, 1)
  signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
  x_0, eps = golden["x_T"], golden["noise"]
  assert_close(process.q_sample(x_0, eps, signal, noise), golden["add_noise"])
  assert_close(process.velocity(x_0, eps, signal, noise), golden["velocity"])


def test_ancestral_step(golden):
  x = golden["x_T"]
  output = 0.3 * x + 0.5 * np.sin(0.1 * golden["eps_flat_index"] + 0.01 * 400)
  table = solvers.solver_table("ddpm", golden["alphas_cumprod"].astype(np.float64), 1000)
  i = int(np.flatnonzero(table.t == 400)[0])
  x_0, eps = process.predict_x_0_eps("epsilon", output, x, table.signal[i], table.noise[i])
  assert_close(combine(table, i, x, x_0, eps), golden["ddpm_mean_t400"])
  assert_close(table.on_noise[i] ** 2, golden["ddpm_var_t400"])


@pytest.mark.parametrize("prediction", process.PREDICTIONS)
def test_targets_invert_to_the_image_and_noise(prediction):
  rng = np.random.default_rng(0)
  x_0, eps = rng.normal(size=(2, 4, 8, 8, 3))
  for alpha_bar in COSINE[[0, 300, 900]]:
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    x_t = process.q_sample(x_0, eps, signal, noise)
    target = process.training_target(prediction, x_0, eps, signal, noise)
    got = process.predict_x_0_eps(prediction, target, x_t, signal, noise)
    np.testing.assert_allclose(got, (x_0, eps), rtol=1e-9, atol=1e-9)


def gaussian_eps(std):
  """Return the exact epsilon model of data N(0, std^2)."""

  def model(x, t):
    alpha_bar = COSINE[t]
    return (1 - alpha_bar) ** 0.5 * x / (alpha_bar * std**2 + 1 - alpha_bar)

  return model


def ode_end_point(table, std, x):
  """Return x_0 of the probability-flow ODE, which scales x_T by the ratio of the marginal stds."""
  alpha_bar = COSINE[table.t[0]]
  return x * std / (alpha_bar * std**2 + 1 - alpha_bar) ** 0.5


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpm++", 2)])
def test_solvers_converge_at_their_order(solver, order):
  # The error is measured between two interior noise levels, without the last step's jump to x_0.
  x, std = np.ones(1), 0.5
  errors = []
  for num_steps in (20, 40, 80):
    table = solvers.solver_table(solver, COSINE, num_steps)
    inside = [i for i, t in enumerate(table.t) if 200 <= t <= 800]
    start, stop = inside[0], inside[-1]
    marginal = lambda t: (COSINE[t] * std**2 + 1 - COSINE[t]) ** 0.5  # noqa: E731
    state, x_0_last = marginal(table.t[start]) * x, None
    for i in range(start, stop):
      x_0, eps = process.predict_x_0_eps(
        "epsilon", gaussian_eps(std)(state, table.t[i]), state, table.signal[i], table.noise[i]
      )
      # Without history, the first step is exact up to the solver's order.
      last = x_0 if x_0_last is None else x_0_last
      state, x_0_last = combine(table, i, state, x_0, eps, last), x_0
    errors.append(abs(state[0] / marginal(table.t[stop]) - 1))
  observed = np.log2(errors[0] / errors[2]) / 2
  assert observed == pytest.approx(order, abs=0.45)


def test_solvers_reach_the_same_end_point():
  x, std = np.array([1.3]), 0.5
  ends = {}
  for solver, num_steps in (("ddim", 1000), ("dpm++", 50)):
    table = solvers.solver_table(solver, COSINE, num_steps)
    ends[solver] = solve(table, "epsilon", gaussian_eps(std), x)
    np.testing.assert_allclose(ends[solver], ode_end_point(table, std, x), rtol=0.03)


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_ancestral_noise_keeps_the_marginal_variance(solver):
  """With exact x_0 and eps, x_prev has variance signal^2 var(x_0) + noise^2."""
  table = solvers.solver_table(solver, COSINE, 100, eta=1.0)
  for i in range(99):
    # These are the coefficients of x_0 and eps after inserting x_t = signal x_0 + noise eps.
    on_x_0 = table.on_x_0[i] + table.on_x_t[i] * table.signal[i]
    on_eps = table.on_eps[i] + table.on_x_t[i] * table.noise[i]
    assert on_x_0 == pytest.approx(table.signal[i + 1], rel=1e-9)
    assert on_eps**2 + table.on_noise[i] ** 2 == pytest.approx(table.noise[i + 1] ** 2, rel=1e-9)
  assert table.on_noise[-1] == 0


def test_ddim_at_eta_one_is_the_ancestral_step():
  ddim = solvers.solver_table("ddim", COSINE, 50, eta=1.0)
  ddpm = solvers.solver_table("ddpm", COSINE, 50)
  np.testing.assert_allclose(ddim.on_noise, ddpm.on_noise, atol=1e-12)
  np.testing.assert_allclose(ddim.on_x_0, ddpm.on_x_0 + ddpm.on_x_t * ddim.signal, atol=1e-12)
  np.testing.assert_allclose(ddim.on_eps, ddpm.on_x_t * ddim.noise, atol=1e-12)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 1000])
def test_every_step_count_gives_finite_coefficients(solver, num_steps):
  table = solvers.solver_table(solver, COSINE, num_steps)
  assert len(table.t) == num_steps
  assert (np.diff(table.t) < 0).all()
  assert all(np.isfinite(column).all() for column in table.float32_columns().values())


@pytest.mark.parametrize("noise_schedule", process.NOISE_SCHEDULES)
@pytest.mark.parametrize("prediction", process.PREDICTIONS)
@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_any_step_count_starts_at_the_noisy_end(solver, prediction, noise_schedule):
  for total in (7, 1000):
    alphas_cumprod = process.make_alphas_cumprod(noise_schedule, total)
    counts = range(1, total + 1)
    if total > 7:  # every count at both ends, and some between
      counts = (*range(1, 60), 99, 250, 333, 500, 501, *range(890, 911), *range(985, 1001))
    for num_steps in counts:
      t = solvers.solver_timesteps(solver, alphas_cumprod, num_steps, prediction)
      assert t[0] >= 9 * total // 10
      assert (np.diff(t) < 0).all()
      assert t[-1] >= 0
      assert t[0] < total


@pytest.mark.parametrize(
  ("solver", "prediction", "num_steps", "expected"),
  [
    ("ddim", "v", 1, [900]),
    ("ddpm", "epsilon", 2, [900, 400]),
    ("ddim", "v", 4, [900, 650, 400, 150]),
    ("ddim", "epsilon", 5, [900, 700, 500, 300, 100]),
    # diffusers' DPMSolverMultistepScheduler with lambda_min_clipped=-5.1: linspace from 995.
    ("dpm++", "v", 1, [995]),
    ("dpm++", "v", 5, [995, 796, 597, 398, 199]),
    ("dpm++", "epsilon", 50, np.linspace(0, 995, 51).round()[:0:-1]),
    # An error of epsilon grows 5 times from 979 to 881; from 995 to 896 it would grow 26 times.
    ("dpm++", "epsilon", 10, [979, 881, 783, 685, 587, 490, 392, 294, 196, 98]),
  ],
)
def test_timesteps_of_few_steps(solver, prediction, num_steps, expected):
  t = solvers.solver_timesteps(solver, COSINE, num_steps, prediction)
  np.testing.assert_array_equal(t, expected)


def spread(table, prediction, alphas_cumprod, clip, error):
  """Return the standard deviation of 4,000 samples of a model of N(0, 1) data.

  `error` is the standard deviation of independent noise in the model's outputs.
  """
  rng, errors = np.random.default_rng(0), np.random.default_rng(1)
  x, x_0_last = rng.normal(size=4000), np.zeros(4000)
  for i, t in enumerate(table.t):
    signal, noise = alphas_cumprod[t] ** 0.5, (1 - alphas_cumprod[t]) ** 0.5
    output = noise * x if prediction == "epsilon" else 0 * x
    output = output + error * errors.normal(size=len(x))
    x_0, eps = process.predict_x_0_eps(prediction, output, x, signal, noise)
    if clip:
      x_0 = np.clip(x_0, -1, 1)
      eps = (x - signal * x_0) / noise
    x, x_0_last = combine(table, i, x, x_0, eps, x_0_last, rng.normal(size=len(x))), x_0
  return x.std()


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("noise_schedule", process.NOISE_SCHEDULES)
@pytest.mark.parametrize("prediction", process.PREDICTIONS)
@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_a_model_error_hardly_changes_the_spread(solver, prediction, noise_schedule, clip):
  alphas_cumprod = process.make_alphas_cumprod(noise_schedule, 1000)
  ratios = {}
  for num_steps in (4, 5, 10, 20, 50, 250):
    table = solvers.solver_table(solver, alphas_cumprod, num_steps, prediction=prediction)
    args = (table, prediction, alphas_cumprod, clip)
    ratios[num_steps] = spread(*args, error=1e-2) / spread(*args, error=0)
  assert all(0.9 < ratio < 1.1 for ratio in ratios.values()), ratios


def test_learned_variance_ranges_from_the_posterior_to_beta():
  for num_steps in (10, 20, 1000):
    table = solvers.solver_table("ddpm", COSINE, num_steps)
    np.testing.assert_allclose(np.exp(table.log_variance_low[:-1]), table.on_noise[:-1] ** 2)
    assert (table.log_variance_low < table.log_variance_high).all()


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_impossible_step_counts_are_refused(num_steps):
  with pytest.raises(UserError, match="num_steps"):
    solvers.solver_table("ddim", COSINE, num_steps)


def test_min_snr_weights():
  snr = COSINE / (1 - COSINE)
  eps = process.loss_weights("min_snr", "epsilon", COSINE)
  v = process.loss_weights("min_snr", "v", COSINE)
  np.testing.assert_allclose(eps, np.minimum(snr, 5) / snr)
  # Both weight the x_0 error equally: |eps error|^2 = SNR |x_0 error|^2, and
  # |v error|^2 = (SNR + 1) |x_0 error|^2.
  np.testing.assert_allclose(eps * snr, v * (snr + 1))
  assert (process.loss_weights("uniform", "v", COSINE) == 1).all()
  other = process.loss_weights("min_snr", "epsilon", COSINE, min_snr_gamma=2.0)
  np.testing.assert_allclose(other, np.minimum(snr, 2) / snr)


def test_variational_bound_is_zero_for_the_true_posterior():
  x = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
  log_variance = jnp.full((3, 1, 1, 1), -2.0)
  args = dict(true_mean=x, log_true_variance=log_variance, x_0=x)
  not_last = jnp.zeros((3, 1, 1, 1), bool)
  exact = process.variational_bound(
    **args, mean=x, log_variance=log_variance + 0 * x, is_last=not_last
  )
  np.testing.assert_allclose(exact, 0, atol=1e-7)
  # KL(N(0, 1) || N(1, 1)) is 1/2 nat per element.
  off = process.variational_bound(
    true_mean=x,
    log_true_variance=0 * log_variance,
    x_0=x,
    mean=x + 1,
    log_variance=jnp.zeros_like(x),
    is_last=not_last,
  )
  np.testing.assert_allclose(off, 0.5 / np.log(2), rtol=1e-6)
  # At t = 0 it is the negative log-likelihood of a standard normal at its mean.
  last = process.variational_bound(
    **args, mean=x, log_variance=jnp.zeros_like(x), is_last=~not_last
  )
  np.testing.assert_allclose(last, 0.5 * np.log2(2 * np.pi), rtol=1e-6)


def test_the_floor_of_a_learned_variance_is_ours_or_the_published_one():
  alphas_cumprod = process.make_alphas_cumprod("squaredcos_cap_v2", 1000)
  q = process.posterior(alphas_cumprod, np.append(1.0, alphas_cumprod[:-1]))
  ours, published = (q.log_variance_range(floor)[0] for floor in process.VARIANCE_FLOORS)
  assert ours[0] == pytest.approx(-14.7, abs=0.01)
  assert published[0] == published[1] == pytest.approx(-10.73, abs=0.01)
  np.testing.assert_array_equal(ours[1:], published[1:])
