"""Compare the time of each part of a training step on a CPU with the least that it could take.

python -m tests.benchmarks.floors [--variant=S/2] [--image_size=32] [--batch_size=16] [--rank=R]
  [--dtype=bfloat16] [--rounds=10]

A part is computed alone, forward and backward. Its floor is the larger of two times: its FLOPs at
the rate of large square products, and the bytes of its inputs, outputs and their gradients, each
once, at the rate of an elementwise pass over memory. Both rates are measured in the same rounds.
With --rank the layers are pairs of factors of that rank.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from lrdit.runtime import malloc

if __name__ == "__main__":
  malloc.restart_tuned()

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lrdit.benchmark.arms import MatmulPeak, seconds_of
from lrdit.benchmark.measure import interleave
from lrdit.model import dit, flops
from lrdit.model.low_rank import Dense, LowRankDense
from lrdit.train.optimizer import update_ema

MEMORY_PASS_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class Part:
  """Something that a training step does `count` times."""

  name: str
  count: int
  run: Callable[[], Any]  # does it once
  macs: int  # of all its products
  num_bytes: int  # that it must move


def both_passes(
  name: str, count: int, function: Callable[..., jax.Array], arguments: Sequence[Any], macs: int = 0
) -> Part:
  """Return a function's forward pass, of `macs`, and the gradients of all its arguments."""
  output = jax.eval_shape(function, *arguments)
  cotangent = random_array(*output.shape)

  @jax.jit
  def run(arguments, cotangent):
    value, pull_back = jax.vjp(function, *arguments)
    return value, pull_back(cotangent)

  inputs = sum(x.nbytes for x in jax.tree.leaves(list(arguments)))
  # Forward: inputs and output. Backward: inputs again, the output's gradient, the inputs'.
  num_bytes = 3 * inputs + 2 * cotangent.nbytes
  return Part(name, count, lambda: run(arguments, cotangent), 3 * macs, num_bytes)


def random_array(*shape: int) -> jax.Array:
  """Return standard normal float32."""
  return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def kernel_size(dim_in: int, dim_out: int, rank: int | None) -> int:
  """Return the number of parameters of a kernel, or of its factors where they have fewer."""
  dense = dim_in * dim_out
  return min(dense, rank * (dim_in + dim_out)) if rank else dense


def layer_part(
  name: str, count: int, rows: int, dims: tuple[int, int], rank: int | None, dtype: Any
) -> Part:
  """Return a dense layer, or its factors where a rank saves parameters."""
  dim_in, dim_out = dims
  size = kernel_size(dim_in, dim_out, rank)
  layer = Dense(dim_out, dtype) if size == dim_in * dim_out else LowRankDense(dim_out, rank, dtype)
  x = random_array(rows, dim_in)
  params = jax.jit(layer.init)(jax.random.key(0), x)
  return both_passes(name, count, layer.apply, (params, x), rows * size)


def block_parts(shape: dit.DiTShape, batch_size: int, rank: int | None, dtype: Any) -> list[Part]:
  """Return the parts of all blocks."""
  d, n, depth = shape.hidden_size, shape.num_tokens, shape.depth
  rows, hidden = batch_size * n, dit.MLP_RATIO * d
  dims = {name.removeprefix("blocks_0/"): s for name, s in dit.layer_shapes(shape).items()}
  names = ("adaln", "attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")
  parts = [
    layer_part(name, depth, batch_size if name == "adaln" else rows, dims[name], rank, dtype)
    for name in names
  ]
  x, vector = random_array(batch_size, n, d), random_array(batch_size, d)

  def normalized(x, shift, scale):
    return dit.modulate(dit.layer_norm(x), shift, scale)

  def attention(qkv):
    return dit.plain_attention(qkv, shape.num_heads, dtype)

  def gelu(x):
    return nn.gelu(x, approximate=True)

  def gated(x, gate, branch):
    return x + gate[:, None] * branch

  qkv, wide = random_array(batch_size, n, 3 * d), random_array(batch_size, n, hidden)
  return [
    *parts,
    both_passes("attention", depth, attention, (qkv,), 2 * batch_size * n**2 * d),
    both_passes("norm and modulation", 2 * depth, normalized, (x, vector, vector)),
    both_passes("GELU", depth, gelu, (wide,)),
    both_passes("gate and residual", 2 * depth, gated, (x, vector, x)),
  ]


def update_part(num_parameters: int) -> Part:
  """Return AdamW's update with the moving average."""
  state = tuple(random_array(num_parameters) for _ in range(5))

  @jax.jit
  def update(p, ema, m, v, g):
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    p = p - 1e-3 * (m / (jnp.sqrt(jnp.abs(v)) + 1e-8) + 0.01 * p)
    return p, update_ema(ema, p, jnp.int32(1000), 0.999), m, v

  num_bytes = (5 + 4) * state[0].nbytes
  return Part("update and moving average", 1, lambda: update(*state), 0, num_bytes)


def floor(part: Part, flops_rate: float, bytes_rate: float) -> float:
  """Return the least seconds of a part at rates per second."""
  return max(flops.FLOPS_PER_MAC * part.macs / flops_rate, part.num_bytes / bytes_rate)


def measure(parts: Sequence[Part], rounds: int, dtype: Any) -> str:
  """Time all parts in turn; return both rates, and a table of the parts, the largest gap first."""
  peak = MatmulPeak(None, dtype, jax.devices()[:1])
  memory = random_array(MEMORY_PASS_BYTES // 4)
  add_one = jax.jit(lambda x: x + 1)
  tasks = {"peak": peak.time, "memory": lambda _: seconds_of(lambda: add_one(memory))[0]}
  tasks |= {part.name: lambda _, part=part: seconds_of(part.run)[0] for part in parts}
  for task in tasks.values():
    task(0)  # an untimed warm-up
  times: dict[str, list[float]] = {}
  interleave(tasks, rounds, times.update)
  seconds = {name: statistics.median(values) for name, values in times.items()}
  rates = peak.flops / seconds["peak"], 2 * memory.nbytes / seconds["memory"]
  rows = [(p.name, p.count * floor(p, *rates), p.count * seconds[p.name]) for p in parts]
  rows.sort(key=lambda row: row[1] - row[2])
  rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
  lines = [
    f"products {rates[0] / 1e9:.0f} GFLOP/s, memory {rates[1] / 1e9:.1f} GB/s, medians",
    "| part of a step | floor, ms | measured, ms | floor / measured |",
    "|---|---|---|---|",
  ]
  lines += [f"| {n} | {1e3 * f:.0f} | {1e3 * s:.0f} | {f / s:.2f} |" for n, f, s in rows]
  return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
  """Measure the parts, and print the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--variant", default="S/2")
  parser.add_argument("--image_size", type=int, default=32)
  parser.add_argument("--batch_size", type=int, default=16)
  parser.add_argument("--rank", type=int)
  parser.add_argument("--rounds", type=int, default=10)
  parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
  args = parser.parse_args(argv)
  dtype = getattr(jnp, args.dtype)
  sizes = dit.decode_variant(args.variant)
  shape = dit.DiTShape(image_size=args.image_size, channels=3, num_classes=10, **sizes)
  num_parameters = 0
  for name, (dim_in, dim_out) in dit.layer_shapes(shape).items():
    rank = args.rank if name.startswith("blocks_") else None
    num_parameters += kernel_size(dim_in, dim_out, rank) + dim_out
  parts = [*block_parts(shape, args.batch_size, args.rank, dtype), update_part(num_parameters)]
  print(measure(parts, args.rounds, dtype))


if __name__ == "__main__":
  main()
