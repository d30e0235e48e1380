"""Solvers of the reverse process, as tables of coefficients with one row per step.

  x_prev = on_x_t x_t + on_x_0 x_0 + on_eps eps + on_x_0_last x_0_last + on_noise z,

where x_0 and eps are predictions at x_t, x_0_last is the prediction at the step before, and z is
fresh Gaussian noise. To add a solver, add a function of its coefficients to `SOLVERS`.

Axes: S solver steps, T timesteps.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from lrdit.diffusion.process import posterior
from lrdit.runtime.errors import UserError

# Limits of the first step of dpm++: the half-log-SNR, and the factor by which an error grows.
MIN_HALF_LOG_SNR = -5.1
MAX_FIRST_ERROR = 5.0


@dataclasses.dataclass(frozen=True)
class SolverTable:
  """A solver's steps, as (S,) float64 arrays.

  Attributes:
    t: int32 timesteps, descending.
    signal, noise: coefficients of x_0 and eps in x_t.
    log_variance_low, log_variance_high: range of a learned log-variance.
    takes_learned_variance: whether a learned variance replaces `on_noise`.
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
    """Return the float64 columns by name, rounded once."""
    return {
      field.name: getattr(self, field.name).astype(np.float32)
      for field in dataclasses.fields(self)
      if field.name not in ("t", "takes_learned_variance")
    }

  @property
  def is_stochastic(self) -> bool:
    """Whether any step adds noise."""
    return bool(np.any(self.on_noise > 0))


def _ddim(alpha_bar, alpha_bar_prev, eta):
  """Song et al. 2021 (arXiv:2010.02502), eq. 12, with the sigma of eq. 16."""
  variance = eta**2 * posterior(alpha_bar, alpha_bar_prev).variance
  return dict(
    on_x_0=alpha_bar_prev**0.5,
    on_eps=np.maximum(1 - alpha_bar_prev - variance, 0) ** 0.5,
    on_noise=variance**0.5,
  )


def _ddpm(alpha_bar, alpha_bar_prev, _eta):
  """Ho et al. 2020, algorithm 2, with the posterior's variance."""
  q = posterior(alpha_bar, alpha_bar_prev)
  return dict(on_x_0=q.on_x_0, on_x_t=q.on_x_t, on_noise=q.variance**0.5)


def _dpmpp_2m(alpha_bar, alpha_bar_prev, _eta):
  """Lu et al. 2022 (arXiv:2211.01095), algorithm 2 (2M).

  The first step, which has no history, and the last, which returns x_0, are of first order.
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


# Each function takes (alpha_bar, alpha_bar_prev, eta) and returns the nonzero coefficients.
SOLVERS = {"ddim": _ddim, "ddpm": _ddpm, "dpm++": _dpmpp_2m}


def solver_timesteps(
  solver: str, alphas_cumprod: Float[np.ndarray, " T"], num_steps: int, prediction: str
) -> Int[np.ndarray, " S"]:
  """Return the timesteps that a solver visits, (S,) int32 descending.

  Every solver starts in the last tenth of the timesteps, where x_t is mostly noise: on the cosine
  schedule the signal at 9/10 T is 0.16.

  As in diffusers, `dpm++` spaces its timesteps evenly from `_first_timestep` down ("linspace"), and
  the others from 0 up ("leading"). There are two deviations from "leading". Below 10 steps it would
  start far from the noise, so all timesteps are moved up until the first is 9/10 T. If S does not
  divide T, diffusers truncates the stride (S = 501 starts at 500), and here the timesteps cover the
  whole range.
  """
  total = len(alphas_cumprod)
  if solver != "dpm++":
    t = np.arange(num_steps)[::-1] * total // num_steps
    return (t + max(0, 9 * total // 10 - t[0])).astype(np.int32)
  first = _first_timestep(alphas_cumprod, num_steps, prediction)
  # S + 1 points without 0, or all timesteps up to the first if there are only S of them.
  grid = np.linspace(0, first, min(num_steps + 1, first + 1))
  return np.round(grid)[::-1][:num_steps].astype(np.int32)


def _first_timestep(
  alphas_cumprod: Float[np.ndarray, " T"], num_steps: int, prediction: str
) -> int:
  """Return the noisiest timestep from which `dpm++` can start.

  With an epsilon model the first step computes x_0 = (x_t - noise eps) / signal, so an error of eps
  grows by the factor noise_prev (exp(h) - 1), where h is the step in half-log-SNR. At t = T - 1 of
  the cosine schedule it is several thousand. So the first timestep, within the last tenth, has

  - a half-log-SNR of at least `MIN_HALF_LOG_SNR`, like diffusers' `lambda_min_clipped` and
    k-diffusion's 1 / sigma_max;
  - with an epsilon model, a factor of at most `MAX_FIRST_ERROR` if any timestep has that.
    Deviation: diffusers has no such bound, and needs some 50 steps.

  If S is nearly T, it is the lowest timestep that leaves S timesteps.
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


def solver_table(
  solver: str,
  alphas_cumprod: Float[np.ndarray, " T"],
  num_steps: int,
  eta: float = 0.0,
  prediction: str = "epsilon",
) -> SolverTable:
  """Return the coefficients of every step of a solver.

  Args:
    num_steps: S in [1, T].
    eta: share of the ancestral noise that `ddim` adds, in [0, 1].
    prediction: decides where `dpm++` starts.
  """
  total = len(alphas_cumprod)
  if not 1 <= num_steps <= total:
    raise UserError(
      f"sampling.num_steps={num_steps} must lie in [1, {total}] (diffusion.num_train_timesteps)"
    )
  t = solver_timesteps(solver, alphas_cumprod, num_steps, prediction)
  alpha_bar = alphas_cumprod[t]
  alpha_bar_prev = np.append(alpha_bar[1:], 1.0)
  names = ("on_x_t", "on_x_0", "on_eps", "on_x_0_last", "on_noise")
  coefficients = dict.fromkeys(names, np.zeros(num_steps))
  coefficients |= SOLVERS[solver](alpha_bar, alpha_bar_prev, eta)
  low, high = posterior(alpha_bar, alpha_bar_prev).log_variance_range()  # no noise at t = 0
  return SolverTable(
    t=t,
    signal=alpha_bar**0.5,
    noise=(1 - alpha_bar) ** 0.5,
    log_variance_low=low,
    log_variance_high=high,
    takes_learned_variance=solver == "ddpm",
    **coefficients,
  )
