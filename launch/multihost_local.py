"""Run several processes on this machine's CPU as they would run on several hosts: to try it out.

Usage: bash launch/multihost_local.sh N --config=FILE --workdir=DIR [main.py flags ...]

N           number of processes; each line they write begins with [its number]
DEVICES     virtual CPU devices of each process (default 1)
RESTARTS    how often all are started again after one has failed (default 3)
GRACE       seconds that the others have to end after SIGTERM, before they are killed (default 60)
PJRT_NPROC  XLA's threads in each process (default an even share of the cores)

If one process fails, all end; then all start again and resume, unless one ended with status 1 or 2,
a mistake. SIGTERM and Ctrl-C are passed on as SIGTERM: training saves and exits with 75, sampling
and evaluation exit with 143; rerun the same command to continue. A second Ctrl-C kills all.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import typing

from arms import ROOT, fail

STOPPED, MISTAKES = 75, (1, 2)
POLL_SECONDS, SETTLE_SECONDS = 0.1, 2  # the latter for the others to report why they end


def number(name: str, text: str, least: int) -> int:
  """Return a whole number that the user gave; fail unless it is one."""
  if not text.isdecimal() or int(text) < least:
    fail(f"{name}={text} is not a whole number from {least}")
  return int(text)


def copy_lines(source: typing.TextIO, sink: typing.TextIO, label: str) -> None:
  """Copy lines, each with a label before it."""
  for line in source:
    sink.write(label + line)
    sink.flush()


class Job:
  """One start of all processes."""

  def __init__(self, count: int, flags: list[str]):
    with socket.socket() as server:
      server.bind(("localhost", 0))
      flags = [*flags, f"--coordinator=localhost:{server.getsockname()[1]}"]
    # The kernel kills them if this script is killed.
    main = ["setpriv", "--pdeathsig", "KILL", sys.executable, str(ROOT / "main.py"), *flags]
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    self.processes, self._readers = [], []
    for i in range(count):
      command = [*main, f"--num_processes={count}", f"--process_id={i}"]
      # In a process group of its own, it gets no Ctrl-C of the terminal.
      process = subprocess.Popen(command, **pipes, text=True, errors="replace", process_group=0)
      self.processes.append(process)
      for pair in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
        self._readers.append(threading.Thread(target=copy_lines, args=(*pair, f"[{i}] ")))
        self._readers[-1].start()

  def send(self, kind: int) -> None:
    """Send a signal to those that have not ended."""
    for process in self.processes:
      process.send_signal(kind)

  def wait(self, signals: list[int], grace: int) -> list[int]:
    """End all once one fails or a signal comes; return the failures' statuses, causes first."""
    terminate_at = kill_at = float("inf")
    while None in (statuses := [process.poll() for process in self.processes]):
      now = time.monotonic()
      if signals:
        terminate_at = 0
      elif any(statuses):
        terminate_at = min(terminate_at, now + SETTLE_SECONDS)
      if kill_at == float("inf") and now >= terminate_at:
        self.send(signal.SIGTERM)
        kill_at = now + grace
      if now >= kill_at or signal.SIGINT in signals[1:]:
        self.send(signal.SIGKILL)
      time.sleep(POLL_SECONDS)
    for reader in self._readers:
      reader.join()
    failures = [128 - status if status < 0 else status for status in statuses if status]
    return sorted(failures, key=lambda status: (status not in MISTAKES, status == STOPPED))


def main(arguments: list[str]) -> int:
  """Start all processes, and again after a failure; return the exit status."""
  if {"-h", "--help"} & set(arguments):
    print(__doc__.strip())
    return 0
  count, flags = number("N", (arguments or [""])[0], 1), arguments[1:]
  if own := [f for f in flags if f.startswith(("--coordinator", "--num_proc", "--process_id"))]:
    fail(f"{own[0]}: this script sets it")
  given = os.environ
  devices = number("DEVICES", given.get("DEVICES") or given.get("JAX_NUM_CPU_DEVICES") or "1", 1)
  restarts = number("RESTARTS", given.get("RESTARTS") or "3", 0)
  grace = number("GRACE", given.get("GRACE") or "60", 0)
  given.update(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES=str(devices))
  # With as many threads as cores in each process they would take the cores from each other.
  given.setdefault("PJRT_NPROC", str(max(1, os.cpu_count() // count)))
  signals: list[int] = []
  for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(kind, lambda kind, _: signals.append(kind))
  for restart in range(restarts + 1):
    failures = Job(count, flags).wait(signals, grace)
    if not failures or signals or failures[0] in MISTAKES:
      break
    starts = f"start {restart + 1} of {restarts + 1}"
    print(f"== ended with status {failures[0]} ({starts})", file=sys.stderr)
  return failures[0] if failures else 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
