"""The full arm's training step and forward pass against an equal DiT in PyTorch at its best.

python -m tests.benchmarks.torch_benchmark --torch_python=PATH [--variant=S/2] [--rounds=10]
  [--dtype=bfloat16]

PATH is the Python of an environment with torch, which lrdit does not need; the default is this one.
PyTorch is timed eager and compiled, under each allocator of `allocators`, and lrdit is compared
with the fastest of these, for each quantity by itself. Whatever is left out is named with its
cause.

All run on the CPU in float32, or with products in bfloat16 (PyTorch by its autocast). Each
allocator has a process of its own, with as many threads as each takes by itself. They take turns:
only one computes at a time, and each round goes once through all. All are held in memory at once.
"""

import argparse
import ctypes.util
import functools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lrdit.benchmark import measure, ratios
from lrdit.model import dit
from lrdit.runtime import malloc
from lrdit.runtime.text import format_table

ROOT = pathlib.Path(__file__).parents[2]
QUANTITIES = {"peak": "matrix products", "step": "training step", "forward": "forward pass"}
OURS, THEIRS = "lrdit", "PyTorch"
JEMALLOC = "jemalloc"

# Of each round, by quantity and who took them: lrdit, or PyTorch in one of its ways.
Seconds = Mapping[tuple[str, str], Sequence[float]]


class Side:
  """A worker process.

  Attributes:
    library: lrdit or PyTorch.
    allocator: the name of its memory allocator.
    about: "name", "num_parameters", "tasks" and, from lrdit, "flops" of each quantity.
  """

  def __init__(
    self, library: str, allocator: str, command: Sequence[str], environment: Mapping[str, str]
  ):
    """Start the worker, and wait until it is ready and has described itself."""
    self.library, self.allocator = library, allocator
    self._process = subprocess.Popen(
      command,
      cwd=ROOT,
      env=os.environ | environment,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self.about: dict[str, Any] = json.loads(self._read())

  def _read(self) -> str:
    line = self._process.stdout.readline()
    if not line:
      raise SystemExit(f"error: {' '.join(self._process.args[:3])} ended: see its message above")
    return line

  def tasks(self) -> dict[tuple[str, str], measure.Task]:
    """Return what can be timed, by quantity and who does it."""
    found = {}
    for task in self.about["tasks"]:
      quantity, *ways = task.split(", ")
      way = ", ".join([*ways, self.allocator]) if self.library == THEIRS else ""
      found[quantity, f"{self.library} {way}".strip()] = functools.partial(self.time, task)
    return found

  def time(self, task: str, _round: int) -> float:
    """Have the worker do a task, and return its seconds."""
    self._process.stdin.write(task + "\n")
    self._process.stdin.flush()
    return float(self._read())

  def close(self) -> None:
    """End the worker."""
    self._process.stdin.close()
    self._process.wait()
    self._process.stdout.close()


def find_jemalloc(given: str) -> str | None:
  """Return the library to preload: the given file, or what the system has, if anything."""
  if not given:
    return ctypes.util.find_library(JEMALLOC)
  path = pathlib.Path(given).resolve()
  if not path.is_file():
    raise SystemExit(f"error: --jemalloc={given} is no file: name libjemalloc.so.2")
  return str(path)


def allocators(jemalloc: str | None) -> dict[str, dict[str, str]]:
  """Return the environment of each allocator that PyTorch is timed under, by name."""
  found = {"glibc": {}, "glibc as lrdit has it": {"GLIBC_TUNABLES": malloc.KEEP_FREED}}
  if jemalloc:
    keep_freed = "dirty_decay_ms:-1,muzzy_decay_ms:-1"
    found[JEMALLOC] = {"LD_PRELOAD": jemalloc, "MALLOC_CONF": keep_freed}
  return found


def start(args: argparse.Namespace) -> list[Side]:
  """Start lrdit's side and one of PyTorch for each allocator; return them once all are ready."""
  sizes = dit.decode_variant(args.variant)
  common = [
    f"--{name}={getattr(args, name)}"
    for name in ("image_size", "channels", "num_classes", "batch_size", "dtype")
  ]
  ours = [sys.executable, "-m", "tests.benchmarks.lrdit_worker", f"--variant={args.variant}"]
  environment = {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": malloc.KEEP_FREED}  # as main.py has it
  sides = [Side(OURS, "glibc", [*ours, *common], environment)]
  worker = str(pathlib.Path(__file__).with_name("torch_worker.py"))
  theirs = [args.torch_python, worker, *(f"--{k}={v}" for k, v in sizes.items()), *common]
  for name, environment in allocators(find_jemalloc(args.jemalloc)).items():
    side = Side(THEIRS, name, theirs, environment)
    if side.about["num_parameters"] != sides[0].about["num_parameters"]:
      raise SystemExit("error: the two models are not equal")
    if side.about["is_jemalloc"] != (name == JEMALLOC):
      raise SystemExit(f"error: PyTorch does not run under {name}: check LD_PRELOAD and --jemalloc")
    sides.append(side)
  return sides


def describe(args: argparse.Namespace, sides: Sequence[Side]) -> str:
  """Return what was timed, where, and what was left out."""
  ours, theirs = sides[0].about, sides[1].about
  size = f"{args.image_size}x{args.image_size}x{args.channels}"
  settings = f"{args.dtype}, {size}, batch {args.batch_size}; {args.rounds} rounds"
  lines = [
    f"DiT-{args.variant}, full, {ours['num_parameters']:,} parameters, {settings}",
    f"{ratios.cpu_model()}, {os.cpu_count()} cores, {platform.platform()}",
    f"{ours['name']}; {theirs['name']}",
  ]
  lines += [f"left out under {s.allocator}: {why}" for s in sides if (why := s.about["left_out"])]
  if JEMALLOC not in {side.allocator for side in sides}:
    lines.append("left out: jemalloc, which this system does not have: see --jemalloc")
  return "\n".join(lines)


def summarize(seconds: Seconds, flops: Mapping[str, int]) -> dict[str, dict[str, dict[str, Any]]]:
  """Return by quantity and who took them, fastest first, what the seconds come to.

  Returns:
    "median", "min" and "rate" (FLOP/s, of the median); "share" of the highest peak that the same
    library reached; "ratio" of lrdit's median to this one's.
  """
  found: dict[str, dict[str, dict[str, Any]]] = {quantity: {} for quantity in QUANTITIES}
  for (quantity, who), each in seconds.items():
    median = statistics.median(each)
    rate = flops[quantity] / median
    found[quantity][who] = {"median": median, "min": min(each), "rate": rate}
  peaks: dict[str, float] = {}
  for who, entry in found["peak"].items():
    library = who.split()[0]
    peaks[library] = max(entry["rate"], peaks.get(library, 0.0))
  for quantity, entries in found.items():
    for who, entry in entries.items():
      entry["share"] = entry["rate"] / peaks[who.split()[0]]
      entry["ratio"] = entries[OURS]["median"] / entry["median"]
    found[quantity] = dict(sorted(entries.items(), key=lambda item: item[1]["median"]))
  return found


COLUMNS = {
  "median s": lambda e: f"{e['median']:.4f}",
  "min s": lambda e: f"{e['min']:.4f}",
  "GFLOP/s": lambda e: f"{e['rate'] / 1e9:.0f}",
  "of own peak": lambda e: f"{100 * e['share']:.0f} %",
  "lrdit / this": lambda e: f"{e['ratio']:.3f}",
}


def format_report(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
  """Return a table of each quantity, and lrdit over the fastest of PyTorch."""
  lines = []
  for quantity, title in QUANTITIES.items():
    entries = found[quantity]
    lines += [format_table(title, COLUMNS, entries), ""]
  for quantity, title in QUANTITIES.items():
    ours = found[quantity][OURS]
    best, theirs = next((who, e) for who, e in found[quantity].items() if who != OURS)
    at_equal_peaks = theirs["share"] / ours["share"]
    lines.append(
      f"{title}: lrdit / {best} {theirs['ratio']:.3f}, {at_equal_peaks:.3f} at equal peaks"
    )
  return "\n".join(lines)


def main() -> None:
  """Run the benchmark of a command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--torch_python", default=sys.executable)
  parser.add_argument("--jemalloc", default="", help="libjemalloc.so.2, if not the system's")
  parser.add_argument("--variant", default="S/2")
  parser.add_argument("--image_size", type=int, default=32)
  parser.add_argument("--channels", type=int, default=3, choices=[1, 3])
  parser.add_argument("--num_classes", type=int, default=10)
  parser.add_argument("--batch_size", type=int, default=16)
  parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
  parser.add_argument("--rounds", type=int, default=10)
  args = parser.parse_args()
  sides = start(args)
  print(describe(args, sides), flush=True)
  tasks = {key: task for side in sides for key, task in side.tasks().items()}
  tasks = {key: tasks[key] for quantity in QUANTITIES for key in tasks if key[0] == quantity}
  seconds: dict[Any, list[float]] = {}
  measure.interleave(tasks, args.rounds, seconds.update)
  print("", format_report(summarize(seconds, sides[0].about["flops"])), sep="\n")
  for side in sides:
    side.close()


if __name__ == "__main__":
  main()
