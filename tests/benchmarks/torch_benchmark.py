"""The full arm's training step and forward pass against an equal DiT in PyTorch.

python -m tests.benchmarks.torch_benchmark --torch_python=PATH [--variant=S/2] [--rounds=10]

PATH is the Python of an environment with torch, which lrdit does not need; the
default is this one. Both sides run on the CPU in float32, in processes of their
own, with as many threads as each takes by itself, and take turns: only one
computes at a time, and each round goes once through both.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any

from lrdit.model import dit
from lrdit.runtime import malloc

ROOT = pathlib.Path(__file__).parents[2]
# What a round times: the forward pass twice, as it is short.
ROUND = ("peak", "step", "forward", "forward")


class Side:
  """A worker process and the seconds it has reported.

  Attributes:
    about: "name", "num_parameters" and, from lrdit, "flops" of each task.
    seconds: by task, in order of time.
  """

  def __init__(self, command: list[str], **environment: str):
    """Start the worker, which gets ready meanwhile."""
    self._process = subprocess.Popen(
      command,
      cwd=ROOT,
      env=os.environ | environment,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self.about: dict[str, Any] = {}
    self.seconds: dict[str, list[float]] = {task: [] for task in ROUND}

  def _read(self) -> str:
    line = self._process.stdout.readline()
    if not line:
      raise SystemExit(f"error: {' '.join(self._process.args[:3])} ended: see its message above")
    return line

  def wait_ready(self) -> None:
    """Read how the worker describes itself."""
    self.about = json.loads(self._read())

  def time(self, task: str) -> None:
    """Have the worker do a task, and keep its seconds."""
    self._process.stdin.write(task + "\n")
    self._process.stdin.flush()
    self.seconds[task].append(float(self._read()))

  def close(self) -> None:
    """End the worker."""
    self._process.stdin.close()
    self._process.wait()
    self._process.stdout.close()


def start(args: argparse.Namespace) -> tuple[Side, Side]:
  """Start lrdit's and PyTorch's sides; return them once they are ready and equally large."""
  sizes = dit.decode_variant(args.variant)
  common = [
    f"--{name}={getattr(args, name)}"
    for name in ("image_size", "channels", "num_classes", "batch_size")
  ]
  ours = Side(
    [sys.executable, "-m", "tests.benchmarks.lrdit_worker", f"--variant={args.variant}"] + common,
    JAX_PLATFORMS="cpu",
    GLIBC_TUNABLES=malloc.KEEP_FREED,  # as main.py has it
  )
  ours.wait_ready()
  worker = str(pathlib.Path(__file__).with_name("torch_worker.py"))
  theirs = Side([args.torch_python, worker, *(f"--{k}={v}" for k, v in sizes.items()), *common])
  theirs.wait_ready()
  for side in (ours, theirs):
    print(f"{side.about['name']}: {side.about['num_parameters']:,} parameters")
  if ours.about["num_parameters"] != theirs.about["num_parameters"]:
    raise SystemExit("error: the two models are not equal")
  return ours, theirs


def print_report(ours: Side, theirs: Side) -> None:
  """Print medians, minima, rates and the ratio of medians, lrdit's over PyTorch's."""
  for task in dict.fromkeys(ROUND):
    medians = [statistics.median(side.seconds[task]) for side in (ours, theirs)]
    for side, median in zip((ours, theirs), medians, strict=True):
      rate = ours.about["flops"][task] / median / 1e9
      least = min(side.seconds[task])
      print(
        f"{task:8} {side.about['name']:24} median {median:.4f} s  min {least:.4f} s  "
        f"{rate:.0f} GFLOP/s"
      )
    print(f"{task:8} lrdit / PyTorch {medians[0] / medians[1]:.3f}")


def main() -> None:
  """Run the benchmark of a command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--torch_python", default=sys.executable)
  parser.add_argument("--variant", default="S/2")
  parser.add_argument("--image_size", type=int, default=32)
  parser.add_argument("--channels", type=int, default=3, choices=[1, 3])
  parser.add_argument("--num_classes", type=int, default=10)
  parser.add_argument("--batch_size", type=int, default=16)
  parser.add_argument("--rounds", type=int, default=10)
  args = parser.parse_args()
  ours, theirs = start(args)
  for number in range(args.rounds):
    for task in ROUND:
      # Each side goes first in every other round.
      for side in (ours, theirs)[:: 1 if number % 2 == 0 else -1]:
        side.time(task)
  print_report(ours, theirs)
  ours.close()
  theirs.close()


if __name__ == "__main__":
  main()
