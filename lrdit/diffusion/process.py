"""Gaussian diffusion in discrete time: noise schedules, targets, loss weights, posterior, bound.

  q(x_t | x_0) = N(signal[t] x_0, noise[t]^2),  x_t = signal[t] x_0 + noise[t] eps,
  signal = sqrt(alphas_cumprod), noise = sqrt(1 - alphas_cumprod), t in [0, T),
  eps = (x_t - signal x_0) / noise, v = signal eps - noise x_0, SNR = signal^2 / noise^2.

Every coefficient is computed on the host in float64, where 1 - alphas_cumprod keeps its digits,
and rounded once. Compiled code only forms linear combinations of images.

Axes: B batch, S solver steps, T timesteps, then image axes.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lrdit.runtime.errors import UserError

# Host checks in float64 and compiled steps run the same lines.
AnyArray = np.ndarray | np.floating | float | Array

NOISE_SCHEDULES = ("squaredcos_cap_v2", "linear")
PREDICTIONS = ("epsilon", "v")
LOSS_WEIGHTINGS = ("uniform", "min_snr")

MAX_BETA = 0.999
MIN_SNR_GAMMA = 5.0
LINEAR_BETAS = (1e-4, 0.02)  # at T = 1000; scaled by 1000 / T as in ADM


def make_betas(noise_schedule: str, num_train_timesteps: int) -> Float[np.ndarray, " T"]:
  """Return the variances beta_t, (T,) float64.

  `squaredcos_cap_v2` is Nichol and Dhariwal 2021, eq. 17, capped at 0.999; `linear` is Ho et al.
  2020, section 4, scaled to T.

  Raises:
    UserError: the schedule is unknown.
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
  """Return the product of 1 - beta up to and including t, (T,) float64."""
  return np.cumprod(1 - make_betas(noise_schedule, num_train_timesteps))


def q_sample(x_0: AnyArray, eps: AnyArray, signal: AnyArray, noise: AnyArray) -> AnyArray:
  """Return x_t (Ho et al. 2020, eq. 4); the coefficients broadcast against x_0."""
  return signal * x_0 + noise * eps


def velocity(x_0: AnyArray, eps: AnyArray, signal: AnyArray, noise: AnyArray) -> AnyArray:
  """Return v (Salimans and Ho 2022, appendix D)."""
  return signal * eps - noise * x_0


def training_target(
  prediction: str, x_0: AnyArray, eps: AnyArray, signal: AnyArray, noise: AnyArray
) -> AnyArray:
  """Return what the model regresses on, for `prediction` in `PREDICTIONS`."""
  return eps if prediction == "epsilon" else velocity(x_0, eps, signal, noise)


def predict_x_0_eps(
  prediction: str, output: AnyArray, x_t: AnyArray, signal: AnyArray, noise: AnyArray
) -> tuple[AnyArray, AnyArray]:
  """Return the (x_0, eps) that the model's output at x_t implies."""
  if prediction == "epsilon":
    return (x_t - noise * output) / signal, output
  return signal * x_t - noise * output, signal * output + noise * x_t


def loss_weights(
  loss_weighting: str,
  prediction: str,
  alphas_cumprod: Float[np.ndarray, " T"],
  min_snr_gamma: float = MIN_SNR_GAMMA,
) -> Float[np.ndarray, " T"]:
  """Return the weight of an example's squared error at each timestep, (T,) float64.

  `min_snr` (Hang et al. 2023, arXiv:2303.09556) weights the error of x_0 by min(SNR, gamma): that
  is min(SNR, gamma) / SNR for an epsilon target, and / (SNR + 1) for a v target.

  Args:
    loss_weighting: one of `LOSS_WEIGHTINGS`.
    prediction: one of `PREDICTIONS`.
    alphas_cumprod: (T,).
    min_snr_gamma: gamma, above 0.
  """
  if loss_weighting == "uniform":
    return np.ones_like(alphas_cumprod)
  snr = alphas_cumprod / (1 - alphas_cumprod)
  return np.minimum(snr, min_snr_gamma) / (snr if prediction == "epsilon" else snr + 1)


@dataclasses.dataclass(frozen=True)
class Posterior:
  """q(x_prev | x_t, x_0) = N(on_x_0 x_0 + on_x_t x_t, variance) (Ho et al. 2020, eq. 7).

  It holds for any stride between x_t and x_prev.

  Attributes:
    on_x_0, on_x_t: (S,) float64 coefficients of the mean.
    variance: (S,) the posterior's ("small") variance, 0 where x_prev is x_0.
    beta: (S,) the forward variance of the same stride ("large").
  """

  on_x_0: Float[np.ndarray, " S"]
  on_x_t: Float[np.ndarray, " S"]
  variance: Float[np.ndarray, " S"]
  beta: Float[np.ndarray, " S"]

  @property
  def log_variance_range(self) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]]:
    """Bounds of a learned log-variance (Nichol and Dhariwal 2021, eq. 15).

    A variance of 0 has no logarithm: beta / 100 stands in for it.
    """
    low = np.where(self.variance > 0, self.variance, 1e-2 * self.beta)
    return np.log(low), np.log(self.beta)


def posterior(
  alpha_bar: Float[np.ndarray, " S"], alpha_bar_prev: Float[np.ndarray, " S"]
) -> Posterior:
  """Return the posterior between two noise levels, both (S,) float64."""
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
  """Return the L_vlb term of each example in bits per dimension, (B,) float32.

  It is KL(true || model), and -log p(x_0 | x_1) at the last step, t = 0 (Nichol and Dhariwal 2021,
  section 3.1). Deviation: the last step uses the density of the Gaussian instead of a discretised
  one, because latents have no bins.

  Args:
    true_mean, log_true_variance: of the posterior.
    mean, log_variance: of the model.
    x_0: clean images.
    is_last: whether t = 0.
  """
  squared = jnp.exp(-log_variance)
  ratio = jnp.exp(log_true_variance - log_variance)
  kl = 0.5 * (log_variance - log_true_variance - 1 + ratio + (true_mean - mean) ** 2 * squared)
  nll = 0.5 * (math.log(2 * math.pi) + log_variance + (x_0 - mean) ** 2 * squared)
  return jnp.where(is_last, nll, kl).mean(axis=(1, 2, 3)) / math.log(2.0)
