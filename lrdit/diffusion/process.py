"""Gaussian diffusion in discrete time: noise schedules, targets, loss weights, posterior, bound.

  q(x_t | x_0) = N(signal[t] x_0, noise[t]^2),  x_t = signal[t] x_0 + noise[t] eps,
  signal = sqrt(alphas_cumprod), noise = sqrt(1 - alphas_cumprod), t in [0, T),
  eps = (x_t - signal x_0) / noise, v = signal eps - noise x_0, SNR = signal^2 / noise^2.

Coefficients are computed on the host in float64, where 1 - alphas_cumprod keeps its digits, and
rounded once. Compiled code only forms linear combinations of images.

Axes: B batch, S solver steps, T timesteps, then image axes.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

# Host checks in float64 and compiled steps share this code.
AnyArray = np.ndarray | np.floating | float | Array

PREDICTIONS = ("epsilon", "v")
LOSS_WEIGHTINGS = ("uniform", "min_snr")
# Lower bounds of a learned variance at t = 0, where the posterior's is 0: 0.01 beta_0, or the
# posterior's variance at t = 1 as in the published code of Nichol and Dhariwal 2021 and of DiT.
VARIANCE_FLOORS = ("beta", "posterior")

MAX_BETA = 0.999
LINEAR_BETAS = (1e-4, 0.02)  # at T = 1000; scaled by 1000 / T as in ADM


def _cosine_betas(steps: int) -> Float[np.ndarray, " T"]:
  """Return the betas of Nichol and Dhariwal 2021, eq. 17."""
  alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
  return 1 - alpha_bar[1:] / alpha_bar[:-1]


def _linear_betas(steps: int) -> Float[np.ndarray, " T"]:
  """Return the betas of Ho et al. 2020, section 4."""
  first, last = (beta * 1000 / steps for beta in LINEAR_BETAS)
  return np.linspace(first, last, steps)


NOISE_SCHEDULES = {"squaredcos_cap_v2": _cosine_betas, "linear": _linear_betas}


def make_alphas_cumprod(noise_schedule: str, num_train_timesteps: int) -> Float[np.ndarray, " T"]:
  """Return the product of 1 - beta up to and including t, (T,) float64."""
  betas = NOISE_SCHEDULES[noise_schedule](num_train_timesteps)
  return np.cumprod(1 - np.minimum(betas, MAX_BETA))


def q_sample(x_0: AnyArray, eps: AnyArray, signal: AnyArray, noise: AnyArray) -> AnyArray:
  """Return x_t (Ho et al. 2020, eq. 4); the coefficients broadcast against x_0."""
  return signal * x_0 + noise * eps


def velocity(x_0: AnyArray, eps: AnyArray, signal: AnyArray, noise: AnyArray) -> AnyArray:
  """Return v (Salimans and Ho 2022, appendix D)."""
  return signal * eps - noise * x_0


def training_target(
  prediction: str, x_0: AnyArray, eps: AnyArray, signal: AnyArray, noise: AnyArray
) -> AnyArray:
  """Return the model's regression target."""
  return eps if prediction == "epsilon" else velocity(x_0, eps, signal, noise)


def predict_x_0_eps(
  prediction: str, output: AnyArray, x_t: AnyArray, signal: AnyArray, noise: AnyArray
) -> tuple[AnyArray, AnyArray]:
  """Return the (x_0, eps) that the model's output implies."""
  if prediction == "epsilon":
    return (x_t - noise * output) / signal, output
  return signal * x_t - noise * output, signal * output + noise * x_t


def loss_weights(
  loss_weighting: str,
  prediction: str,
  alphas_cumprod: Float[np.ndarray, " T"],
  min_snr_gamma: float = 5.0,
) -> Float[np.ndarray, " T"]:
  """Return the weight of an example's squared error at each timestep, (T,) float64.

  `min_snr` (Hang et al. 2023, arXiv:2303.09556) weights the error of x_0 by min(SNR, gamma). The
  weight is min(SNR, gamma) / SNR for an epsilon target and min(SNR, gamma) / (SNR + 1) for v.
  """
  if loss_weighting == "uniform":
    return np.ones_like(alphas_cumprod)
  snr = alphas_cumprod / (1 - alphas_cumprod)
  return np.minimum(snr, min_snr_gamma) / (snr if prediction == "epsilon" else snr + 1)


@dataclasses.dataclass(frozen=True)
class Posterior:
  """q(x_prev | x_t, x_0) = N(on_x_0 x_0 + on_x_t x_t, variance) (Ho et al. 2020, eq. 7).

  Attributes:
    variance: the posterior's ("small") variance, 0 where x_prev is x_0.
    beta: the forward ("large") variance of the same stride, which may span several timesteps.
  """

  on_x_0: Float[np.ndarray, " S"]
  on_x_t: Float[np.ndarray, " S"]
  variance: Float[np.ndarray, " S"]
  beta: Float[np.ndarray, " S"]

  def log_variance_range(
    self, variance_floor: str = "beta"
  ) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]]:
    """Return the bounds of a learned log-variance (Nichol and Dhariwal 2021, eq. 15).

    A variance of 0 has no logarithm: `variance_floor` is one of `VARIANCE_FLOORS`.
    """
    positive = self.variance > 0
    floor = 1e-2 * self.beta
    if variance_floor == "posterior":  # the variance rises with t
      floor = np.min(self.variance, where=positive, initial=1.0)
    return np.log(np.where(positive, self.variance, floor)), np.log(self.beta)


def posterior(
  alpha_bar: Float[np.ndarray, " S"], alpha_bar_prev: Float[np.ndarray, " S"]
) -> Posterior:
  """Return the posterior between two noise levels."""
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

  The term is KL(posterior || model), or -log p(x_0 | x_1) at the last step, t = 0 (Nichol and
  Dhariwal 2021, section 3.1). Deviation: the last step uses the density of the Gaussian instead of
  a discretised one, because latents have no bins.
  """
  squared = jnp.exp(-log_variance)
  ratio = jnp.exp(log_true_variance - log_variance)
  kl = 0.5 * (log_variance - log_true_variance - 1 + ratio + (true_mean - mean) ** 2 * squared)
  nll = 0.5 * (math.log(2 * math.pi) + log_variance + (x_0 - mean) ** 2 * squared)
  return jnp.where(is_last, nll, kl).mean(axis=(1, 2, 3)) / math.log(2.0)
