"""Compare the CPU time of a training step in several processes with that in one, on this machine.

python -m tests.benchmarks.processes_benchmark [--sides=1x2,2x1] [--variant=S/2] [--rounds=10]

A side PxN is P processes of N virtual CPU devices each. All sides have the same number of devices
and the same global batch, and train the same model from the same state. They take turns: only one
computes at a time, and each round goes once through all. CPU time is the user and system time of
all threads of all processes of a side. The processes of a side share --threads evenly, as under
`launch/multihost_local.sh`; with --threads=0 each starts as many as there are cores.

All sides are held in memory at once.
"""

import argparse
import contextlib
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from lrdit.runtime import malloc

ROOT = pathlib.Path(__file__).parents[2]
# Sides whose losses differ by more did not do the same work.
LOSS_TOLERANCE = 1e-4


def free_port() -> int:
  """Return a port of this machine at which nothing listens."""
  with socket.socket() as sock:
    sock.bind(("127.0.0.1", 0))
    return sock.getsockname()[1]


class Side:
  """The processes of one side, and what they have reported.

  Attributes:
    name: "PxN".
    reports: of each round, each process' own (see `processes_worker.Worker.run`).
  """

  def __init__(self, name: str, flags: Sequence[str], threads: int):
    """Start the processes and wait until they have compiled and run their first steps.

    Args:
      name: "PxN".
      flags: of `processes_worker`.
      threads: XLA's in each process, at least one for each device; 0: as many as cores.
    """
    self.name = name
    num_processes, num_devices = map(int, name.split("x"))
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(num_devices)}
    environment["GLIBC_TUNABLES"] = malloc.KEEP_FREED
    if threads:
      environment["PJRT_NPROC"] = str(threads)
    self.reports: list[list[dict[str, Any]]] = []
    coordinator = f"127.0.0.1:{free_port()}"
    self._processes = [
      subprocess.Popen(
        [
          *(sys.executable, "-m", "tests.benchmarks.processes_worker", *flags),
          *(f"--coordinator={coordinator}", f"--num_processes={num_processes}"),
          f"--process_id={number}",
        ],
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
      )
      for number in range(num_processes)
    ]
    expected = {"num_processes": num_processes, "num_devices": num_processes * num_devices}
    for about in self._read():
      if about != expected:
        raise SystemExit(f"error: side {name} has {about}: check JAX_NUM_CPU_DEVICES")

  def _read(self) -> list[Any]:
    # gloo writes lines of its own to standard output.
    streams = [process.stdout for process in self._processes]
    lines = [next((line for line in stream if line.startswith("{")), "") for stream in streams]
    if not all(lines):
      raise SystemExit(f"error: a process of side {self.name} ended: see its message above")
    return [json.loads(line) for line in lines]

  def run(self, num_steps: int) -> None:
    """Have all processes train so many steps, and keep what they report."""
    with contextlib.suppress(BrokenPipeError):  # a process has ended: reading finds out
      for process in self._processes:
        process.stdin.write(f"{num_steps}\n")
        process.stdin.flush()
    self.reports.append(self._read())

  def close(self) -> None:
    """End the processes."""
    for process in self._processes:
      process.stdin.close()
    for process in self._processes:
      process.wait()
      process.stdout.close()

  def kill(self) -> None:
    """Kill the processes."""
    for process in self._processes:
      process.kill()
      process.wait()
      process.stdout.close()


def summarize(reports: Sequence[Sequence[dict[str, Any]]], num_steps: int) -> dict[str, Any]:
  """Return what a side took, its processes together.

  Args:
    reports: by round and process.
    num_steps: steps of a round.

  Returns:
    seconds per step in each round: "cpu", "system" (part of it) and "wall" (of the
    slowest process); "idle": CPU seconds per second that the side waited for its
    turn; "memory": GiB, the most that each process has held; "loss": mean since the start.
  """
  every = [report for of_round in reports for report in of_round]
  idle_cpu, idle_wall = (sum(report[key] for report in every) for key in ("idle_cpu", "idle_wall"))
  return {
    "cpu": [sum(sum(r["cpu"]) for r in each) / num_steps for each in reports],
    "system": [sum(r["cpu"][1] for r in each) / num_steps for each in reports],
    "wall": [max(r["wall"] for r in each) / num_steps for each in reports],
    "idle": len(reports[0]) * idle_cpu / idle_wall,
    "memory": sum(report["memory"] for report in reports[-1]),
    "loss": reports[-1][0]["loss"],
  }


def ratios(seconds: Sequence[float], reference: Sequence[float]) -> str:
  """Return the median, least and greatest of the rounds' ratios."""
  each = [a / b for a, b in zip(seconds, reference, strict=True)]
  return f"{statistics.median(each):.3f} ({min(each):.3f} to {max(each):.3f})"


def format_table(summaries: dict[str, dict[str, Any]]) -> str:
  """Return a line of medians for each side; the first one is the reference."""
  reference = next(iter(summaries.values()))
  header = ["side", "CPU s/step", "least", "system", "wall s/step", "idle CPU", "GiB"]
  rows = [[*header, "CPU / first", "wall / first", "loss"]]
  for name, side in summaries.items():
    cpu, system, wall = (f"{statistics.median(side[key]):.3f}" for key in ("cpu", "system", "wall"))
    taken = [cpu, f"{min(side['cpu']):.3f}", system, wall]
    compared = [ratios(side[key], reference[key]) for key in ("cpu", "wall")]
    others = [f"{side['idle']:.4f}", f"{side['memory']:.1f}"]
    rows.append([name, *taken, *others, *compared, f"{side['loss']:.6f}"])
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def threads_of_process(side: str, threads: int) -> int:
  """Return each process's even share of the threads of a side "PxN", at least one; 0 of 0."""
  return max(1, threads // int(side.split("x")[0])) if threads else 0


def measure(args: argparse.Namespace, flags: Sequence[str]) -> dict[str, Any]:
  """Run all rounds; return `summarize` of every side, by name."""
  sides: list[Side] = []
  try:
    for name in args.sides:
      sides.append(Side(name, flags, threads_of_process(name, args.threads)))
    for number in range(args.rounds + 1):
      # Each side goes first in turn.
      first = number % len(sides)
      for side in sides[first:] + sides[:first]:
        side.run(args.steps)
    for side in sides:
      side.close()
  finally:
    for side in sides:
      side.kill()
  # Not the first round: while the others got ready, a side's memory may have been swept out.
  return {side.name: summarize(side.reports[1:], args.steps) for side in sides}


def num_devices_of(side: str) -> int:
  """Return the number of devices of a side "PxN"."""
  num_processes, num_devices = map(int, side.split("x"))
  return num_processes * num_devices


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Return the flags of a command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--sides", default="1x2,2x1", help="PxN,...; the first is the reference")
  parser.add_argument("--method", default="full")
  parser.add_argument("--variant", default="S/2")
  parser.add_argument("--image_size", type=int, default=32)
  parser.add_argument("--batch_size", type=int, default=16, help="global")
  parser.add_argument("--rounds", type=int, default=10)
  parser.add_argument("--steps", type=int, default=1, help="of each side in a round")
  parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of XLA in a side")
  args = parser.parse_args(argv)
  args.sides = args.sides.split(",")
  if len({num_devices_of(side) for side in args.sides}) != 1:
    parser.error("the sides must have the same number of devices")
  return args


def main(argv: Sequence[str] | None = None) -> None:
  """Measure all sides and print the table."""
  args = parse(argv)
  names = ("method", "variant", "image_size", "batch_size")
  flags = [f"--{name}={getattr(args, name)}" for name in names]
  summaries = measure(args, flags)
  threads = f"{args.threads} a side" if args.threads else "as many as cores in each process"
  print(
    f"DiT-{args.variant}, {args.method}, {args.image_size}x{args.image_size}x3, global batch "
    f"{args.batch_size}; {args.rounds} rounds of {args.steps} steps; {os.cpu_count()} cores; "
    f"threads: {threads}"
  )
  print(format_table(summaries))
  losses = [summary["loss"] for summary in summaries.values()]
  if max(losses) - min(losses) > LOSS_TOLERANCE * min(losses):
    raise SystemExit("error: the sides did not do the same work: their losses differ")


if __name__ == "__main__":
  main()
