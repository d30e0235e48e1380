"""The PyTorch side of `torch_benchmark`: an equal DiT on the CPU, eager and compiled.

Needs PyTorch 2.4 or newer and nothing else, so that it runs in an environment of its own. Prints
what it is as one line of JSON, then for every line on standard input, one of its "tasks", the
seconds that this takes.
"""

import argparse
import copy
import ctypes
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional

FREQUENCY_DIM = 256
MLP_RATIO = 4
LAYER_NORM_EPSILON = 1e-6
MATMUL_SIZE, MATMUL_COUNT = 2048, 5  # as in lrdit.benchmark.arms


def layer_norm(x: torch.Tensor) -> torch.Tensor:
  """LayerNorm without scale or bias over the last axis."""
  return functional.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPSILON)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
  """x (1 + scale) + shift; x (B, N, D), shift and scale (B, D)."""
  return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
  """adaLN-Zero block on PyTorch's fused attention."""

  def __init__(self, width: int, num_heads: int):
    super().__init__()
    self.num_heads = num_heads
    self.adaln = nn.Linear(width, 6 * width)
    self.qkv = nn.Linear(width, 3 * width)
    self.proj = nn.Linear(width, width)
    self.fc1 = nn.Linear(width, MLP_RATIO * width)
    self.fc2 = nn.Linear(MLP_RATIO * width, width)

  def attention(self, x: torch.Tensor) -> torch.Tensor:
    """(B, N, D) to (B, N, D)."""
    b, n, d = x.shape
    q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    y = functional.scaled_dot_product_attention(q, k, v)
    return self.proj(y.transpose(1, 2).reshape(b, n, d))

  def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """x (B, N, D) and silu(conditioning) c (B, D) to (B, N, D)."""
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaln(c).chunk(6, 1)
    x = x + gate_a[:, None] * self.attention(modulate(layer_norm(x), shift_a, scale_a))
    hidden = self.fc1(modulate(layer_norm(x), shift_m, scale_m))
    return x + gate_m[:, None] * self.fc2(functional.gelu(hidden, approximate="tanh"))


class DiT(nn.Module):
  """The published model; its fixed position embedding is a buffer."""

  def __init__(self, args: argparse.Namespace):
    super().__init__()
    width, self.patch = args.hidden_size, args.patch_size
    self.grid, self.channels = args.image_size // args.patch_size, args.channels
    self.patch_embed = nn.Conv2d(args.channels, width, self.patch, self.patch)
    self.register_buffer("position", 0.02 * torch.randn(1, self.grid**2, width))
    self.fc1, self.fc2 = nn.Linear(FREQUENCY_DIM, width), nn.Linear(width, width)
    self.labels = nn.Embedding(args.num_classes + 1, width)
    self.blocks = nn.ModuleList(Block(width, args.num_heads) for _ in range(args.depth))
    self.adaln = nn.Linear(width, 2 * width)
    self.linear = nn.Linear(width, self.patch**2 * args.channels)

  def conditioning(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(B,) timesteps and labels to (B, D)."""
    half = FREQUENCY_DIM // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half) / half)
    angles = t[:, None].float() * frequencies
    features = torch.cat([angles.cos(), angles.sin()], -1)
    return functional.silu(self.fc2(functional.silu(self.fc1(features))) + self.labels(y))

  def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W), (B,), (B,) to (B, C, H, W)."""
    x, c = self.patch_embed(x).flatten(2).transpose(1, 2) + self.position, self.conditioning(t, y)
    for block in self.blocks:
      x = block(x, c)
    shift, scale = self.adaln(c).chunk(2, 1)
    x = self.linear(modulate(layer_norm(x), shift, scale))
    x = x.reshape(-1, self.grid, self.grid, self.patch, self.patch, self.channels)
    size = self.grid * self.patch
    return torch.einsum("nhwpqc->nchpwq", x).reshape(-1, self.channels, size, size)


class Worker:
  """What is timed, one method each; all wait for their result."""

  def __init__(self, args: argparse.Namespace):
    self.batch, self.num_classes = args.batch_size, args.num_classes
    self.dtype = getattr(torch, args.dtype)
    self.model = DiT(args)
    self.average = copy.deepcopy(self.model).requires_grad_(False)
    self.optimizer = torch.optim.AdamW(
      self.model.parameters(), lr=1e-4, weight_decay=0.0, fused=True
    )
    self.x_0 = torch.randn(self.batch, args.channels, args.image_size, args.image_size)
    self.matrix = torch.randn(MATMUL_SIZE, MATMUL_SIZE).to(self.dtype)

  def _autocast(self) -> torch.autocast:
    """PyTorch's own choice of what it computes in bfloat16, products above all."""
    return torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16)

  def _draw(self) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(1000, (self.batch,)), torch.randint(self.num_classes, (self.batch,))

  def loss(
    self, x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor, eps: torch.Tensor
  ) -> torch.Tensor:
    """The mean squared error of the predicted noise."""
    with self._autocast():
      return (self.model(x_t, t, y) - eps).square().mean()

  def step(self, loss_of: Callable[..., torch.Tensor]) -> None:
    """Loss, gradient, clipping, AdamW and the moving average."""
    (t, y), eps, share = self._draw(), torch.randn_like(self.x_0), torch.rand(self.batch, 1, 1, 1)
    x_t = share.sqrt() * self.x_0 + (1 - share).sqrt() * eps
    loss = loss_of(x_t, t, y, eps)
    self.optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
    self.optimizer.step()
    with torch.no_grad():
      for mean, new in zip(self.average.parameters(), self.model.parameters(), strict=True):
        mean.lerp_(new, 1e-4)
    loss.item()

  def forward(self, model: Callable[..., torch.Tensor]) -> None:
    """The averaged model's output."""
    with torch.no_grad(), self._autocast():
      model(self.x_0, *self._draw())

  def peak(self) -> None:
    """Large matrix products."""
    for _ in range(MATMUL_COUNT):
      self.matrix @ self.matrix

  def eager_tasks(self) -> dict[str, Callable[[], None]]:
    """What is timed without a compiler."""
    return {
      "peak": self.peak,
      "step, eager": functools.partial(self.step, self.loss),
      "forward, eager": functools.partial(self.forward, self.average),
    }

  def compiled_tasks(self) -> dict[str, Callable[[], None]]:
    """What is timed of `torch.compile`; "frozen" has the parameters as constants."""
    compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False)
    frozen = compiled(self.average, options={"freezing": True})
    return {
      "step, compiled": functools.partial(self.step, compiled(self.loss)),
      "forward, compiled": functools.partial(self.forward, compiled(self.average)),
      "forward, compiled and frozen": functools.partial(self.forward, frozen),
    }


def warm_up(tasks: Mapping[str, Callable[[], None]]) -> None:
  """Do each task twice: first calls compile and allocate."""
  for task in tasks.values():
    task()
    task()


def main() -> None:
  """Serves requests until standard input ends."""
  parser = argparse.ArgumentParser(description=__doc__)
  for name in ("hidden_size", "depth", "num_heads", "patch_size", "image_size"):
    parser.add_argument(f"--{name}", type=int, required=True)
  for name in ("channels", "num_classes", "batch_size"):
    parser.add_argument(f"--{name}", type=int, required=True)
  parser.add_argument("--dtype", required=True)
  worker, left_out = Worker(parser.parse_args()), ""
  tasks = worker.eager_tasks()
  warm_up(tasks)
  try:
    compiled = worker.compiled_tasks()
    warm_up(compiled)
    tasks |= compiled
  except Exception as error:  # no C++ compiler, a Python that it does not support, or anything else
    left_out = f"torch.compile: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
  about = {
    "name": f"PyTorch {torch.__version__}",
    "num_parameters": sum(p.numel() for p in worker.model.parameters()),
    "tasks": list(tasks),
    "left_out": left_out,
    "is_jemalloc": hasattr(ctypes.CDLL(None), "mallctl"),  # which jemalloc alone exports
  }
  print(json.dumps(about), flush=True)
  for line in sys.stdin:
    start = time.perf_counter()
    tasks[line.strip()]()
    print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
  main()
