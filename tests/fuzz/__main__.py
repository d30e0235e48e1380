"""Fuzz readers: `python -m tests.fuzz [TARGET ...] --inputs=20000 --seed=0`.

Each target runs in a process of its own, so that a crash is seen and attributed. The last lines
count the inputs and the findings; the exit status is 1 if there are any.
"""

import argparse
import collections
import importlib.util
import json
import os
import pathlib
import select
import subprocess
import sys
import tempfile
import time

SILENCE_SECONDS = 120  # of one input, on a busy machine, after which it hangs and uses no CPU
MAX_CRASHES = 20  # of one target


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
  parser.add_argument("targets", nargs="*", help="those to run; all by default")
  parser.add_argument("--inputs", type=int, default=20_000, help="for each target")
  parser.add_argument("--first", type=int, default=0, help="number of the first input")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--minutes", type=float, default=1e6, help="longest time for each target")
  parser.add_argument("--output", default="fuzz_findings", help="directory of the findings")
  parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
  return parser.parse_args()


def _targets() -> dict:
  from tests.fuzz import data_targets, run_targets

  return data_targets.TARGETS | run_targets.TARGETS


def _work(arguments: argparse.Namespace) -> None:
  """Run one target's inputs; print a line of JSON for each."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  import logging

  from tests.fuzz.case import Case

  logging.disable(logging.CRITICAL)
  (name,) = arguments.targets
  told = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)  # what libraries print is not ours
  with tempfile.TemporaryDirectory(prefix="fuzz") as directory:
    case = Case(name, _targets()[name], pathlib.Path(directory))
    print(json.dumps("ready"), file=told)
    for number in range(arguments.first, arguments.inputs):
      changed = case.changed(arguments.seed, number)
      verdict = case.run(changed)
      if verdict.fault:
        _keep(pathlib.Path(arguments.output, f"{name}-{number}"), changed, verdict.text)
      print(json.dumps([number, verdict.refused, verdict.fault]), file=told)


def _keep(path: pathlib.Path, changed: dict, text: str) -> None:
  """Write the changed files of a finding, and what came of it."""
  for name, data in changed.items():
    file = path / name.replace("/", "__")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data if data is not None else b"")
  path.mkdir(parents=True, exist_ok=True)
  (path / "fault.txt").write_text(text, errors="backslashreplace")


class _Worker:
  """A process that runs a target from one input on."""

  def __init__(self, arguments: argparse.Namespace, name: str, first: int):
    flags = [f"--{k}={getattr(arguments, k)}" for k in ("inputs", "seed", "output")]
    command = [sys.executable, "-m", "tests.fuzz", "--worker", name, f"--first={first}", *flags]
    self._log = tempfile.TemporaryFile()  # noqa: SIM115 closed with the worker
    self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log)
    self._rest = b""

  def lines(self) -> list | None:
    """Return the next lines, [] at the end, or None if it is silent for too long."""
    ready, _, _ = select.select([self.process.stdout], [], [], SILENCE_SECONDS)
    if not ready:
      return None
    data = os.read(self.process.stdout.fileno(), 1 << 16)
    *whole, self._rest = (self._rest + data).split(b"\n")
    return [json.loads(line) for line in whole] if data else []

  def end(self) -> tuple[int, str]:
    """End the process; return its status and the last lines of its log."""
    if self.process.poll() is None:
      try:
        self.process.wait(5)
      except subprocess.TimeoutExpired:
        self.process.kill()
    status = self.process.wait()
    self._log.seek(0)
    return status, self._log.read()[-2000:].decode(errors="replace")


def _fuzz(arguments: argparse.Namespace, name: str) -> int:
  """Run a target and report it; return the number of its kinds of findings."""
  deadline, first = None, arguments.first
  faults: dict[str, list[int]] = collections.defaultdict(list)
  refused = crashes = 0
  while first < arguments.inputs and crashes < MAX_CRASHES:
    worker, is_ready, late = _Worker(arguments, name, first), False, False
    while not late and (lines := worker.lines()):
      for line in lines:
        if line == "ready":
          is_ready, deadline = True, deadline or time.monotonic() + 60 * arguments.minutes
          continue
        number, is_refused, fault = line
        first, refused = number + 1, refused + is_refused
        if fault:
          faults[fault].append(number)
      late = deadline is not None and time.monotonic() > deadline
    if late:
      worker.process.kill()
    status, log = worker.end()
    if late or status == 0 or first >= arguments.inputs:
      break
    crashes += 1
    if not is_ready:
      print(f"{name}: the valid files are not read: {log}", flush=True)
      return 1
    what = "is silent" if lines is None else f"ends the process with status {status}"
    faults[what].append(first)
    _keep(pathlib.Path(arguments.output, f"{name}-{first}"), {}, log)
    first += 1
  count = first - arguments.first
  print(f"{name}: {count} inputs, {refused} refused, {len(faults)} kinds of findings", flush=True)
  for fault, numbers in faults.items():
    some = ", ".join(map(str, numbers[:4]))
    print(f"  {fault}: {len(numbers)} inputs, such as {some}", flush=True)
  return len(faults)


def main() -> int:
  """Run the command line."""
  arguments = _arguments()
  if arguments.worker:
    _work(arguments)
    return 0
  targets = _targets()
  if unknown := sorted(set(arguments.targets) - targets.keys()):
    print(f"unknown targets {', '.join(unknown)}: use some of {', '.join(targets)}")
    return 2
  found = 0
  for name in arguments.targets or targets:
    if importlib.util.find_spec(targets[name].needs) is None:
      print(f"{name}: not run, as {targets[name].needs} is not installed", flush=True)
      continue
    found += _fuzz(arguments, name)
  return 1 if found else 0


if __name__ == "__main__":
  sys.exit(main())
