"""Gaussian diffusion in discrete time: schedules, targets, losses, solvers.

x_t = signal[t] x_0 + noise[t] eps with signal = sqrt(alphas_cumprod) and
noise = sqrt(1 - alphas_cumprod), t in [0, T). Every coefficient is computed on
the host in float64, where 1 - alphas_cumprod keeps its digits, and rounded
once; compiled code only forms linear combinations of images.

Axes: B batch, S solver steps, then image axes.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lrdit.errors import UserError

# Host checks in float64 and compiled steps run the same lines.
AnyArray = np.ndarray | np.floating | float | Array

NOISE_SCHEDULES = ("squaredcos_cap_v2", "linear")
PREDICTIONS = ("epsilon", "v")
LOSS_WEIGHTINGS = ("uniform", "min_snr")
SOLVERS = ("ddim", "ddpm", "dpm++")

MAX_BETA = 0.999
MIN_SNR_GAMMA = 5.0
# Of the first step of dpm++: least half-log-SNR, and by how much it may enlarge an error.
MIN_HALF_LOG_SNR = -5.1
MAX_FIRST_ERROR = 5.0
LINEAR_BETAS = (1e-4, 0.02)  # at T = 1000; scaled by 1000 / T as in ADM


def make_betas(noise_schedule: str, num_train_timesteps: int) -> Float[np.ndarray, " T"]:
  """(T,) float64 variances beta_t.

  `squaredcos_cap_v2`: Nichol and Dhariwal 2021, eq. 17, capped at 0.999;
  `linear`: Ho et al. 2020, section 4, scaled to T.
  """
  steps = num_train_timesteps
  if noise_schedule == "linear":
    first, last = (beta * 1000 / steps for beta in LINEAR_BETAS)
    return np.minimum(np.linspace(first, last, steps), MAX_BETA)
  if noise_schedule == "squaredcos_cap_v2":
    alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], MAX_BETA)
  raise UserError(
    f"diffusion.noise_schedule={noise_schedule!r} is unknown: "
    f"use one of {', '.join(NOISE_SCHEDULES)}"
  )


def make_alphas_cumprod(noise_schedule: str, num_train_timesteps: int) -> Float[np.ndarray, " T"]:
  """(T,) float64, product of 1 - beta up to and including t."""
  return np.cumprod(1 - make_betas(noise_schedule, num_train_timesteps))


def q_sample(x_0: AnyArray, eps: AnyArray, signal: AnyArray, noise: AnyArray) -> AnyArray:
  """x_t of Ho et al. 2020, eq. 4; the coefficients broadcast against x_0."""
  return signal * x_0 + noise * eps


def velocity(x_0: AnyArray, eps: AnyArray, signal: AnyArray, noise: AnyArray) -> AnyArray:
  """v of Salimans and Ho 2022, appendix D."""
  return signal * eps - noise * x_0


def training_target(
  prediction: str, x_0: AnyArray, eps: AnyArray, signal: AnyArray, noise: AnyArray
) -> AnyArray:
  """What the model regresses on, for `prediction` in `PREDICTIONS`."""
  return eps if prediction == "epsilon" else velocity(x_0, eps, signal, noise)


def predict_x_0_eps(
  prediction: str, output: AnyArray, x_t: AnyArray, signal: AnyArray, noise: AnyArray
) -> tuple[AnyArray, AnyArray]:
  """(x_0, eps) implied by the model's output at x_t."""
  if prediction == "epsilon":
    return (x_t - noise * output) / signal, output
  return signal * x_t - noise * output, signal * output + noise * x_t


def loss_weights(
  loss_weighting: str, prediction: str, alphas_cumprod: Float[np.ndarray, " T"]
) -> Float[np.ndarray, " T"]:
  """(T,) float64 weight of an example's squared error at each timestep.

  `min_snr`: Hang et al. 2023 (arXiv:2303.09556) with gamma = 5: min(SNR, gamma)
  on the x_0 error, so / SNR for an epsilon target and / (SNR + 1) for v.
  """
  if loss_weighting == "uniform":
    return np.ones_like(alphas_cumprod)
  snr = alphas_cumprod / (1 - alphas_cumprod)
  return np.minimum(snr, MIN_SNR_GAMMA) / (snr if prediction == "epsilon" else snr + 1)


@dataclasses.dataclass(frozen=True)
class Posterior:
  """q(x_prev | x_t, x_0) = N(on_x_0 x_0 + on_x_t x_t, variance), (S,) float64.

  Ho et al. 2020, eq. 7, for any stride.

  Attributes:
    on_x_0, on_x_t: coefficients of the mean.
    variance: the posterior's ("small") variance, 0 where x_prev is x_0.
    beta: the forward variance of the same stride ("large").
  """

  on_x_0: Float[np.ndarray, " S"]
  on_x_t: Float[np.ndarray, " S"]
  variance: Float[np.ndarray, " S"]
  beta: Float[np.ndarray, " S"]

  @property
  def log_variance_range(self) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]]:
    """Bounds of a learned log-variance (Nichol and Dhariwal 2021, eq. 15).

    Where the variance is 0 a hundredth of beta stands in, so that its
    logarithm exists.
    """
    low = np.where(self.variance > 0, self.variance, 1e-2 * self.beta)
    return np.log(low), np.log(self.beta)


def posterior(
  alpha_bar: Float[np.ndarray, " S"], alpha_bar_prev: Float[np.ndarray, " S"]
) -> Posterior:
  """The posterior between two noise levels, both (S,) float64."""
  alpha = alpha_bar / alpha_bar_prev
  return Posterior(
    on_x_0=alpha_bar_prev**0.5 * (1 - alpha) / (1 - alpha_bar),
    on_x_t=alpha**0.5 * (1 - alpha_bar_prev) / (1 - alpha_bar),
    variance=(1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha),
    beta=1 - alpha,
  )


def variational_bound(
  true_mean: Float[Array, "B H W C"],
  log_true_variance: Float[Array, "B 1 1 1"],
  mean: Float[Array, "B H W C"],
  log_variance: Float[Array, "B H W C"],
  x_0: Float[Array, "B H W C"],
  is_last: Bool[Array, "B 1 1 1"],
) -> Float[Array, " B"]:
  """L_vlb term of each example in bits per dimension.

  Nichol and Dhariwal 2021, section 3.1. Deviation: the last step (t = 0) uses
  the Gaussian negative log-likelihood of x_0 instead of a discretised one,
  which exists for latents as well as for pixels.

  Args:
    true_mean, mean, log_variance, x_0: (B, H, W, C).
    log_true_variance: (B, 1, 1, 1).
    is_last: (B, 1, 1, 1) bool, t = 0.

  Returns:
    (B,) float32.
  """
  squared = jnp.exp(-log_variance)
  ratio = jnp.exp(log_true_variance - log_variance)
  kl = 0.5 * (log_variance - log_true_variance - 1 + ratio + (true_mean - mean) ** 2 * squared)
  nll = 0.5 * (math.log(2 * math.pi) + log_variance + (x_0 - mean) ** 2 * squared)
  return jnp.where(is_last, nll, kl).mean(axis=(1, 2, 3)) / math.log(2.0)


@dataclasses.dataclass(frozen=True)
class SolverTable:
  """A solver as linear combinations, one row per step; (S,) float64 arrays.

  x_prev = on_x_t x_t + on_x_0 x_0 + on_eps eps + on_x_0_last x_0_last
           + on_noise z, where x_0 and eps are the model's predictions at x_t,
  x_0_last its x_0 at the step before and z fresh Gaussian noise.

  Attributes:
    t: int32 timesteps, descending.
    signal, noise: noise level of x_t.
    log_variance_low, log_variance_high: range of a learned log-variance.
    on_x_t, on_x_0, on_eps, on_x_0_last, on_noise: the coefficients.
    takes_learned_variance: the solver's noise is the posterior's, so a learned
      variance replaces `on_noise`.
  """

  t: Int[np.ndarray, " S"]
  signal: Float[np.ndarray, " S"]
  noise: Float[np.ndarray, " S"]
  log_variance_low: Float[np.ndarray, " S"]
  log_variance_high: Float[np.ndarray, " S"]
  on_x_t: Float[np.ndarray, " S"]
  on_x_0: Float[np.ndarray, " S"]
  on_eps: Float[np.ndarray, " S"]
  on_x_0_last: Float[np.ndarray, " S"]
  on_noise: Float[np.ndarray, " S"]
  takes_learned_variance: bool

  def float32_columns(self) -> dict[str, Float[np.ndarray, " S"]]:
    """The coefficients by name, rounded once."""
    return {
      field.name: getattr(self, field.name).astype(np.float32)
      for field in dataclasses.fields(self)
      if field.name not in ("t", "takes_learned_variance")
    }

  @property
  def is_stochastic(self) -> bool:
    """Whether any step adds noise."""
    return bool(np.any(self.on_noise > 0))


def solver_timesteps(
  solver: str, alphas_cumprod: Float[np.ndarray, " T"], num_steps: int, prediction: str
) -> Int[np.ndarray, " S"]:
  """Return the (S,) int32 timesteps a solver visits, descending.

  All begin in the last tenth of the timesteps, whatever S, where x_t is mostly noise: the signal
  at 9/10 T is 0.16 on the cosine schedule.

  `ddim` and `ddpm` space them from 0 upwards ("leading"), as diffusers does. Deviations:
  below 10 steps "leading" starts far from the noise (one step at t = 0), so all timesteps
  are moved up until the first is 9/10 T. Where S does not divide T, diffusers truncates
  the stride and starts at 500 for S = 501; here they cover the whole range.

  `dpm++` spaces them evenly from `_first_timestep` down ("linspace"), as diffusers does.
  """
  total = len(alphas_cumprod)
  if solver != "dpm++":
    t = np.arange(num_steps)[::-1] * total // num_steps
    return (t + max(0, 9 * total // 10 - t[0])).astype(np.int32)
  first = _first_timestep(alphas_cumprod, num_steps, prediction)
  # S + 1 points, of which 0 is left out; all timesteps up to the first where that is S.
  grid = np.linspace(0, first, min(num_steps + 1, first + 1))
  return np.round(grid)[::-1][:num_steps].astype(np.int32)


def _first_timestep(
  alphas_cumprod: Float[np.ndarray, " T"], num_steps: int, prediction: str
) -> int:
  """Return the noisiest timestep from which `dpm++` can start.

  Of x_t = signal x_0 + noise eps the first step gets x_0 = (x_t - noise eps) / signal from
  an epsilon model, whose error thus grows by the factor noise_prev (exp(h) - 1), h being
  the step in half-log-SNR. At t = T - 1 of the cosine schedule it grows several thousand
  times. So, within the last tenth of the timesteps, the first one has

  - a half-log-SNR of at least `MIN_HALF_LOG_SNR`: diffusers' `lambda_min_clipped`, and 1 /
    sigma_max of k-diffusion;
  - with an epsilon model, a factor of at most `MAX_FIRST_ERROR`, if there is such a
    timestep. Deviation: diffusers has no such bound, and needs some 50 steps. An error in
    v does not grow.

  Where nearly all T timesteps are asked for, it is the lowest that leaves S of them.
  """
  total = len(alphas_cumprod)
  half_log_snr = 0.5 * (np.log(alphas_cumprod) - np.log1p(-alphas_cumprod))
  lowest = max(9 * total // 10, num_steps - 1)
  first = np.arange(lowest, total)
  first = first[(first == lowest) | (half_log_snr[first] >= MIN_HALF_LOG_SNR)]
  if prediction == "epsilon":
    alpha_bar_prev = alphas_cumprod[first * (num_steps - 1) // num_steps]
    if num_steps == 1:
      alpha_bar_prev = np.ones_like(alpha_bar_prev)
    error_of_x_0 = np.exp(-half_log_snr[first])
    error = alpha_bar_prev**0.5 * error_of_x_0 - (1 - alpha_bar_prev) ** 0.5
    first = first[(first == lowest) | (error <= MAX_FIRST_ERROR)]
  return int(first[-1])


def _ddim(alpha_bar, alpha_bar_prev, eta):
  """Song et al. 2021 (arXiv:2010.02502), eq. 12, with sigma of eq. 16."""
  variance = eta**2 * posterior(alpha_bar, alpha_bar_prev).variance
  return dict(
    on_x_0=alpha_bar_prev**0.5,
    on_eps=np.maximum(1 - alpha_bar_prev - variance, 0) ** 0.5,
    on_noise=variance**0.5,
  )


def _ddpm(alpha_bar, alpha_bar_prev):
  """Ho et al. 2020, algorithm 2, with the posterior's variance."""
  q = posterior(alpha_bar, alpha_bar_prev)
  return dict(on_x_0=q.on_x_0, on_x_t=q.on_x_t, on_noise=q.variance**0.5)


def _dpmpp_2m(alpha_bar, alpha_bar_prev):
  """Lu et al. 2022 (arXiv:2211.01095), algorithm 2 (2M).

  First order at the first step, which has no history, and at the last, where
  the log-SNR of the end point is infinite and the step returns x_0.
  """
  half_log_snr = 0.5 * (np.log(alpha_bar) - np.log1p(-alpha_bar))
  h = np.append(np.diff(half_log_snr), np.inf)
  correction = np.zeros_like(h)
  correction[1:-1] = 0.5 * h[1:-1] / h[:-2]
  on_d = alpha_bar_prev**0.5 * -np.expm1(-h)
  return dict(
    on_x_t=((1 - alpha_bar_prev) / (1 - alpha_bar)) ** 0.5,
    on_x_0=on_d * (1 + correction),
    on_x_0_last=-on_d * correction,
  )


def solver_table(
  solver: str,
  alphas_cumprod: Float[np.ndarray, " T"],
  num_steps: int,
  eta: float = 0.0,
  prediction: str = "epsilon",
) -> SolverTable:
  """Return the coefficients of every step of a solver.

  Args:
    solver: one of `SOLVERS`.
    alphas_cumprod: (T,) float64.
    num_steps: S in [1, T].
    eta: share of the ancestral noise that `ddim` adds, in [0, 1].
    prediction: one of `PREDICTIONS`: what the solver is for. It decides where `dpm++` starts.

  Raises:
    UserError: `num_steps` out of range or an unknown solver.
  """
  total = len(alphas_cumprod)
  if not 1 <= num_steps <= total:
    raise UserError(
      f"sampling.num_steps={num_steps} must lie in [1, {total}] (diffusion.num_train_timesteps)"
    )
  t = solver_timesteps(solver, alphas_cumprod, num_steps, prediction)
  alpha_bar = alphas_cumprod[t]
  alpha_bar_prev = np.append(alpha_bar[1:], 1.0)
  if solver == "ddim":
    coefficients = _ddim(alpha_bar, alpha_bar_prev, eta)
  elif solver == "ddpm":
    coefficients = _ddpm(alpha_bar, alpha_bar_prev)
  elif solver == "dpm++":
    coefficients = _dpmpp_2m(alpha_bar, alpha_bar_prev)
  else:
    raise UserError(f"sampling.solver={solver!r} is unknown: use one of {', '.join(SOLVERS)}")
  low, high = posterior(alpha_bar, alpha_bar_prev).log_variance_range
  names = ("on_x_t", "on_x_0", "on_eps", "on_x_0_last", "on_noise")
  zero = np.zeros(num_steps)
  return SolverTable(
    t=t,
    signal=alpha_bar**0.5,
    noise=(1 - alpha_bar) ** 0.5,
    log_variance_low=low,
    log_variance_high=high,
    takes_learned_variance=solver == "ddpm",
    **{name: coefficients.get(name, zero) for name in names},
  )
