"""The processes of one command, which can be killed, and a disk that they work on."""

import os
import pathlib
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence

from lrdit.runtime import cluster
from tests import tiny

TIMEOUT = 3600.0  # seconds of a command, on a busy machine
END_SECONDS = 60.0  # within which the others of a job end after one is killed
POLL_SECONDS = 0.002
NOT_MET = "waiting for the other processes"  # up to `START_SECONDS`, for one killed on its way


def environment(output: pathlib.Path) -> dict[str, str]:
  """Return that of a command, with a cache of compiled programs that all commands share."""
  cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(output / "cache"))
  return tiny.environment(1, JAX_COMPILATION_CACHE_DIR=cache)


def in_processes(command: list[str], count: int) -> list[list[str]]:
  """Return the command lines of the processes of one job."""
  if count == 1:
    return [command]
  with socket.socket() as opened:
    opened.bind(("127.0.0.1", 0))
    port = opened.getsockname()[1]
  shared = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
  return [[*command, *shared, f"--process_id={i}"] for i in range(count)]


class Job:
  """Started processes, which are killed at the end of the context; their output is in a file."""

  def __init__(self, commands: Sequence[list[str]], environment: dict[str, str], log: pathlib.Path):
    """Start one process for each command line."""
    self._log = log
    options = dict(cwd=tiny.ROOT, env=environment, stderr=subprocess.STDOUT)
    with log.open("wb") as file:
      self.processes = [subprocess.Popen(line, stdout=file, **options) for line in commands]

  def __enter__(self) -> "Job":
    return self

  def __exit__(self, *_: object) -> None:
    for process in self.processes:
      process.kill()
      process.wait()

  @property
  def text(self) -> str:
    """What the processes have printed."""
    return self._log.read_text(errors="replace")

  @property
  def has_ended(self) -> bool:
    """Whether one of the processes has ended."""
    return any(process.poll() is not None for process in self.processes)

  def wait_until(self, condition: Callable[[], bool]) -> None:
    """Return once a condition holds or a process has ended."""
    deadline = time.monotonic() + TIMEOUT
    while not condition() and not self.has_ended:
      assert time.monotonic() < deadline, f"not in time:\n{self.text}"
      time.sleep(POLL_SECONDS)

  def sleep(self, seconds: float) -> None:
    """Wait for so long, or until a process has ended."""
    deadline = time.monotonic() + seconds
    self.wait_until(lambda: time.monotonic() >= deadline)

  def wait(self, timeout: float = TIMEOUT) -> list[int]:
    """Return the exit status of every process."""
    deadline = time.monotonic() + timeout
    try:
      return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]
    except subprocess.TimeoutExpired as error:
      raise AssertionError(f"it goes on after {timeout:.0f} s:\n{self.text[-2000:]}") from error

  def kill(self, number: int) -> None:
    """Kill one process; raise an AssertionError unless the others end as they should."""
    self.processes[number].send_signal(signal.SIGKILL)
    try:
      statuses = self.wait(END_SECONDS)
    except AssertionError:
      if NOT_MET not in self.text.rstrip().rpartition("\n")[2]:
        raise
      statuses = self.wait(cluster.START_SECONDS)
    own = statuses.pop(number)
    assert own in (-signal.SIGKILL, 0), f"status {own}:\n{self.text[-2000:]}"
    assert set(statuses) <= {75, -signal.SIGABRT, 0}, f"{statuses}:\n{self.text[-2000:]}"
