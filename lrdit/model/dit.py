"""Diffusion transformer with adaLN-Zero (Peebles and Xie 2023, arXiv:2212.09748).

The model is the published one, layer for layer. `layer_shapes` names its dense layers, and the rank
plan names those that are factorized (see `low_rank`). A `RankSelection` passes through every layer
and sets the active rank.

Axes: B batch, H W image, C channels, N tokens, P patch values, D width, d head width.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from lrdit.model.low_rank import RankSelection, make_dense
from lrdit.model.materialize import materialize_gradient
from lrdit.model.matmul import matmul
from lrdit.rank.plan import LayerRanks, RankPlan
from lrdit.runtime.errors import UserError

FREQUENCY_DIM = 256
MLP_RATIO = 4
LAYER_NORM_EPSILON = 1e-6
POSITION_PARTS = 4  # of the position embedding, which divide the width

# name: (hidden_size, depth, num_heads) from table 1 of the paper. "T" is for 8x8 digits, and "XS"
# for photographs on a CPU.
SIZES = {
  "T": (128, 4, 4),
  "XS": (192, 6, 6),
  "S": (384, 12, 6),
  "B": (768, 12, 12),
  "L": (1024, 24, 16),
  "XL": (1152, 28, 16),
}


def decode_variant(variant: str) -> dict[str, int]:
  """Return the hidden_size, depth, num_heads and patch_size of "S/2" (or "DiT-S/2")."""
  size, _, patch = variant.removeprefix("DiT-").partition("/")
  if size not in SIZES or not patch.isdecimal() or int(patch) == 0:
    raise UserError(
      f"variant={variant!r} is unknown: use SIZE/PATCH with SIZE one of "
      f"{', '.join(SIZES)}, for example S/2"
    )
  hidden_size, depth, num_heads = SIZES[size]
  return dict(hidden_size=hidden_size, depth=depth, num_heads=num_heads, patch_size=int(patch))


@dataclasses.dataclass(frozen=True)
class DiTShape:
  """The sizes that fix the shapes of a DiT's parameters.

  Attributes:
    image_size: height and width of the input, in pixels or latent pixels.
    num_classes: 0 makes the model unconditional.
    learn_sigma: doubles the output channels; the second half is for the variance.
  """

  image_size: int
  channels: int
  num_classes: int
  hidden_size: int
  depth: int
  num_heads: int
  patch_size: int
  learn_sigma: bool = False

  @property
  def num_tokens(self) -> int:
    """The number of tokens N."""
    return (self.image_size // self.patch_size) ** 2

  @property
  def head_size(self) -> int:
    """The width of an attention head."""
    return self.hidden_size // self.num_heads

  @property
  def out_channels(self) -> int:
    """The number of output channels, C or 2 C."""
    return self.channels * (2 if self.learn_sigma else 1)


def layer_shapes(shape: DiTShape) -> dict[str, tuple[int, int]]:
  """Return (D_in, D_out) of every dense layer by name, in order of use."""
  d, patch_area = shape.hidden_size, shape.patch_size**2
  shapes = {
    "patch_embed": (patch_area * shape.channels, d),
    "t_embedder/fc1": (FREQUENCY_DIM, d),
    "t_embedder/fc2": (d, d),
  }
  for i in range(shape.depth):
    shapes |= {
      f"blocks_{i}/adaln": (d, 6 * d),
      f"blocks_{i}/attn/qkv": (d, 3 * d),
      f"blocks_{i}/attn/proj": (d, d),
      f"blocks_{i}/mlp/fc1": (d, MLP_RATIO * d),
      f"blocks_{i}/mlp/fc2": (MLP_RATIO * d, d),
    }
  return shapes | {
    "final_layer/adaln": (d, 2 * d),
    "final_layer/linear": (d, patch_area * shape.out_channels),
  }


def timestep_embedding(t: Int[Array, " B"], shift: int = 0) -> Float[Array, "B 256"]:
  """Return sinusoidal features of t, (B, 256) float32, cosines first.

  Frequency i is 10000^(-i / (128 - shift)); the published models have a shift of 0, and diffusers
  computes with 1.
  """
  half = FREQUENCY_DIM // 2
  frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - shift))
  angles = t.astype(jnp.float32)[:, None] * frequencies
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def position_embedding(hidden_size: int, grid_size: int) -> Float[np.ndarray, "N D"]:
  """Return the fixed 2-D sin-cos embedding, (grid_size**2, hidden_size) float32.

  The first half encodes the column and the second half the row, as in the published code.
  """
  quarter = hidden_size // POSITION_PARTS
  omega = 1.0 / 10000.0 ** (np.arange(quarter, dtype=np.float64) / quarter)
  angles = np.arange(grid_size, dtype=np.float64)[:, None] * omega
  axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
  column = np.tile(axis, (grid_size, 1))
  row = np.repeat(axis, grid_size, axis=0)
  return np.concatenate([column, row], axis=1).astype(np.float32)


def patchify(x: Float[Array, "B H W C"], patch_size: int) -> Float[Array, "B N P"]:
  """Cut (B, H, W, C) images into (B, N, patch_size**2 C) tokens in row-major order."""
  b, h, w, c = x.shape
  p = patch_size
  x = x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(
  tokens: Float[Array, "B N P"], patch_size: int, channels: int
) -> Float[Array, "B H W C"]:
  """Invert `patchify`."""
  b, n, _ = tokens.shape
  p, grid = patch_size, math.isqrt(n)
  x = tokens.reshape(b, grid, grid, p, p, channels).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, grid * p, grid * p, channels)


def layer_norm(x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
  """Normalise the last axis in float32, without scale or bias."""
  x32 = x.astype(jnp.float32)
  mean = x32.mean(-1, keepdims=True)
  centered = x32 - mean
  variance = jnp.square(centered).mean(-1, keepdims=True)
  return (centered * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON)).astype(x.dtype)


def modulate(
  x: Float[Array, "B N D"], shift: Float[Array, "B D"], scale: Float[Array, "B D"]
) -> Float[Array, "B N D"]:
  """Return x (1 + scale) + shift."""
  return x * (1 + scale[:, None]) + shift[:, None]


# Takes qkv (B, N, 3 D), num_heads and the dtype of the products' operands.
AttentionFunction = Callable[[Float[Array, "B N three_D"], int, Any], Float[Array, "B N D"]]


def choose_attention(
  devices: Sequence[jax.Device], dtype: Any, head_width: int
) -> AttentionFunction:
  """Return the fastest attention function for the devices.

  This is `fused_attention` where cuDNN's kernel supports forward and backward passes: bfloat16,
  NVIDIA GPUs of compute capability 8.0 or more, and d a multiple of 8 up to 128.
  """
  fits = dtype == jnp.bfloat16 and head_width % 8 == 0 and head_width <= 128
  has_kernel = devices and all(
    "cuda" in d.client.platform_version.lower() and int(d.compute_capability.split(".")[0]) >= 8
    for d in devices
  )
  return fused_attention if fits and has_kernel else plain_attention


def choose_activation_dtype(devices: Sequence[jax.Device], dtype: Any) -> Any:
  """Return the fastest dtype of activations for products in `dtype` on the devices.

  This is float32 on a CPU, or without devices: there XLA computes anything but products by
  converting bfloat16 to float32 and back.
  """
  on_cpu = all(d.platform == "cpu" for d in devices)
  return jnp.float32 if on_cpu else dtype


def fused_attention(
  qkv: Float[Array, "B N three_D"], num_heads: int, dtype: Any = None
) -> Float[Array, "B N D"]:
  """Compute attention with cuDNN's kernel, which stores no (N, N) array."""
  b, n, _ = qkv.shape
  q, k, v = jnp.moveaxis(qkv.astype(dtype or qkv.dtype).reshape(b, n, 3, num_heads, -1), 2, 0)
  out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
  return out.reshape(b, n, -1).astype(qkv.dtype)


def plain_attention(
  qkv: Float[Array, "B N three_D"], num_heads: int, dtype: Any = None
) -> Float[Array, "B N D"]:
  """Compute attention as two batched products, with heads merged into the batch.

  The softmax divides after the values are summed, and float32's q is scaled before its product,
  which takes fewer passes over (N, N) arrays. Scores and sums are always float32: rounding a score
  s to bfloat16 would change its weight by a factor of up to exp(2**-9 |s|).
  """
  b, n, _ = qkv.shape

  def merge_heads(x: Float[Array, "B N D"]) -> Float[Array, "Bh N d"]:
    return x.reshape(b, n, num_heads, -1).transpose(0, 2, 1, 3).reshape(b * num_heads, n, -1)

  dtype = dtype or qkv.dtype
  q, k, v = map(merge_heads, jnp.split(qkv.astype(jnp.float32), 3, axis=-1))
  scale = q.shape[-1] ** -0.5
  # A q that was rounded to bfloat16 before must not be rounded again.
  q_scale, score_scale = (scale, 1) if qkv.dtype == jnp.float32 else (1, scale)
  scores = matmul(q * q_scale, k.mT, dtype)
  highest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
  weights = jnp.exp((scores - highest) * score_scale)
  values = matmul(weights, v, dtype)
  out = (values / weights.sum(-1, keepdims=True)).astype(qkv.dtype)
  return out.reshape(b, num_heads, n, -1).transpose(0, 2, 1, 3).reshape(b, n, -1)


def block_runs(plan: RankPlan, depth: int) -> list[tuple[int, int]]:
  """Return (first block, number of blocks) for each run of blocks with equal ranks."""

  def ranks(i: int) -> dict[str, LayerRanks]:
    prefix = f"blocks_{i}/"
    return {n.removeprefix(prefix): r for n, r in plan.layers if n.startswith(prefix)}

  starts = [i for i in range(depth) if i == 0 or ranks(i) != ranks(i - 1)]
  return [(a, b - a) for a, b in itertools.pairwise([*starts, depth])]


class TimestepEmbedder(nn.Module):
  """Two-layer MLP on the sinusoidal features of t."""

  hidden_size: int
  plan: RankPlan
  dtype: Any
  activation_dtype: Any
  frequency_shift: int

  @nn.compact
  def __call__(self, t: Int[Array, " B"], selection: RankSelection) -> Float[Array, "B D"]:
    """Embed the timesteps."""
    init = nn.initializers.normal(0.02)
    x = timestep_embedding(t, self.frequency_shift).astype(self.activation_dtype)
    x = make_dense(self, "fc1", self.hidden_size, init)(x, selection)
    return make_dense(self, "fc2", self.hidden_size, init)(nn.silu(x), selection)


class Attention(nn.Module):
  """Self-attention with its two projections."""

  num_heads: int
  plan: RankPlan
  dtype: Any
  attention: AttentionFunction

  @nn.compact
  def __call__(self, x: Float[Array, "B N D"], selection: RankSelection) -> Float[Array, "B N D"]:
    """Mix the tokens of each example."""
    d = x.shape[-1]
    qkv = make_dense(self, "qkv", 3 * d)(x, selection)
    return make_dense(self, "proj", d)(self.attention(qkv, self.num_heads, self.dtype), selection)


class Mlp(nn.Module):
  """Two layers with a tanh-approximated GELU between them."""

  plan: RankPlan
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "B N D"], selection: RankSelection) -> Float[Array, "B N D"]:
    """Transform each token."""
    d = x.shape[-1]
    y = nn.gelu(make_dense(self, "fc1", MLP_RATIO * d)(x, selection), approximate=True)
    return make_dense(self, "fc2", d)(y, selection)


class Block(nn.Module):
  """adaLN-Zero block, which starts as the identity."""

  num_heads: int
  plan: RankPlan
  dtype: Any
  attention: AttentionFunction

  @nn.compact
  def __call__(
    self, x: Float[Array, "B N D"], c: Float[Array, "B D"], selection: RankSelection
  ) -> Float[Array, "B N D"]:
    """Apply both branches to x, given c = silu(conditioning)."""
    modulation = make_dense(self, "adaln", 6 * x.shape[-1], nn.initializers.zeros)(c, selection)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6, axis=-1)
    attn = Attention(self.num_heads, self.plan, self.dtype, self.attention, name="attn")
    x = x + gate_a[:, None] * attn(modulate(layer_norm(x), shift_a, scale_a), selection)
    mlp = Mlp(self.plan, self.dtype, name="mlp")
    return x + gate_m[:, None] * mlp(modulate(layer_norm(x), shift_m, scale_m), selection)


class FinalLayer(nn.Module):
  """Modulated norm and zero-initialized projection to patches."""

  features: int
  plan: RankPlan
  dtype: Any

  @nn.compact
  def __call__(
    self, x: Float[Array, "B N D"], c: Float[Array, "B D"], selection: RankSelection
  ) -> Float[Array, "B N P"]:
    """Project the tokens x to patch values, given c = silu(conditioning)."""
    zeros = nn.initializers.zeros
    modulation = make_dense(self, "adaln", 2 * x.shape[-1], zeros)(c, selection)
    shift, scale = jnp.split(modulation, 2, axis=-1)
    x = modulate(layer_norm(x), shift, scale)
    return make_dense(self, "linear", self.features, zeros)(x, selection)


class DiT(nn.Module):
  """The diffusion transformer.

  Attributes:
    plan: the ranks; layers that it does not name are dense.
    dtype: of the products' operands, float32 or bfloat16; parameters are float32.
    activation_dtype: of everything else, from `choose_activation_dtype`.
    remat: recompute each block in the backward pass instead of storing its activations.
    scan_blocks: compile equal blocks once and loop over them; parameters do not change.
    attention: from `choose_attention`.
    frequency_shift: of `timestep_embedding`.
  """

  shape: DiTShape
  plan: RankPlan
  dtype: Any = jnp.float32
  activation_dtype: Any = jnp.float32
  remat: bool = False
  scan_blocks: bool = False
  attention: AttentionFunction = plain_attention
  frequency_shift: int = 0

  def setup(self):
    """Create the submodules, whose names are the parameters' paths."""
    s, common = self.shape, (self.plan, self.dtype)
    self.patch_embed = make_dense(self, "patch_embed", s.hidden_size)
    self.t_embedder = TimestepEmbedder(
      s.hidden_size, *common, self.activation_dtype, self.frequency_shift
    )
    if s.num_classes:
      init = nn.initializers.normal(0.02)
      self.y_embedder = nn.Embed(
        s.num_classes + 1, s.hidden_size, self.activation_dtype, embedding_init=init
      )
    block = nn.remat(Block) if self.remat else Block
    self.blocks = [block(s.num_heads, *common, self.attention) for _ in range(s.depth)]
    self.final_layer = FinalLayer(s.patch_size**2 * s.out_channels, *common)

  def __call__(
    self,
    x_t: Float[Array, "B H W C"],
    t: Int[Array, " B"],
    y: Int[Array, " B"] | None,
    selection: RankSelection,
  ) -> Float[Array, "B H W C_out"]:
    """Predict eps or v and, with learn_sigma, the variance's coordinate.

    Args:
      y: labels in [0, num_classes], where num_classes is the null class; None if unconditional.

    Returns:
      (B, H, W, C or 2 C) float32, exactly zero at initialization.
    """
    s = self.shape
    x = patchify(x_t, s.patch_size).astype(self.activation_dtype)
    x = self.patch_embed(x, selection)
    grid_size = s.image_size // s.patch_size
    x = x + jnp.asarray(position_embedding(s.hidden_size, grid_size), x.dtype)
    c = self.t_embedder(t, selection)
    if s.num_classes:
      c = c + self.y_embedder(y)
    c = nn.silu(c)
    scanned = self.scan_blocks and not self.is_initializing()
    for first, length in block_runs(self.plan, s.depth) if scanned else ((0, s.depth),):
      run = self._scan_run if scanned else self._apply_run
      x = run(x, c, selection, first, length)
    x = self.final_layer(x, c, selection)
    return unpatchify(x, s.patch_size, s.out_channels).astype(jnp.float32)

  def _apply_run(self, x, c, selection, first, length):
    for block in self.blocks[first : first + length]:
      x = block(materialize_gradient(x), c, selection)
    return x

  def _scan_run(self, x, c, selection, first, length):
    """Apply the first block repeatedly, over the stacked parameters of the run."""
    blocks = [self.variables["params"][f"blocks_{first + i}"] for i in range(length)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    detached = self.clone(parent=None)

    def step(x, params):
      variables = {"params": {f"blocks_{first}": params}}
      method = DiT._apply_run
      return detached.apply(variables, x, c, selection, first, 1, method=method), None

    return jax.lax.scan(step, x, stacked)[0]


def init_params(model: DiT, rng: Key[Array, ""]) -> dict[str, Any]:
  """Return fresh float32 parameters."""
  s = model.shape
  x_t = jnp.zeros((1, s.image_size, s.image_size, s.channels))
  t = jnp.zeros(1, jnp.int32)
  y = t if s.num_classes else None
  # Compiled because the many small products are far slower op by op.
  return jax.jit(lambda key: model.init(key, x_t, t, y, RankSelection())["params"])(rng)
