"""A process watched from outside: what it has done, and what it holds while it works."""

import os
import pathlib
import subprocess
import time
from collections.abc import Callable, Sequence

from tests import tiny

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
TEXT_SHOWN = 4000  # characters of a failed command's output


def read_process(pid: int) -> dict[str, float]:
  """Return what a process holds: "rss" in bytes, open "files", "threads", and its "cpu" seconds.

  Raises:
    OSError: the process has ended.
  """
  directory = pathlib.Path("/proc") / str(pid)
  fields = dict(
    line.split(":", 1) for line in (directory / "status").read_text().splitlines() if ":" in line
  )
  if "VmRSS" not in fields:
    raise ProcessLookupError(f"process {pid} has ended")
  times = (directory / "stat").read_text().rpartition(")")[2].split()
  return {
    "rss": int(fields["VmRSS"].split()[0]) * 1024,
    "files": len(os.listdir(directory / "fd")),
    "threads": int(fields["Threads"]),
    "cpu": (int(times[11]) + int(times[12])) / CLOCK_TICKS,
  }


def watch(
  command: Sequence[str],
  environment: dict[str, str],
  log: pathlib.Path,
  done: Callable[[], int],
  interval: float,
) -> dict[str, list[float]]:
  """Run a command to its end, or until Ctrl-C; return the series of `read_process`, by name.

  The series have the further names "time", in seconds since the start, and "done", the units of
  work that `done` counts.

  Raises:
    RuntimeError: the command failed.
  """
  names = ("time", "done", "rss", "files", "threads", "cpu")
  series: dict[str, list[float]] = {name: [] for name in names}
  start = time.monotonic()
  with log.open("w") as file:
    process = subprocess.Popen(command, cwd=tiny.ROOT, env=environment, stdout=file, stderr=file)
  try:
    while process.poll() is None:
      try:
        found = read_process(process.pid)
      except OSError:
        break
      found |= {"time": time.monotonic() - start, "done": done()}
      for name in names:
        series[name].append(found[name])
      time.sleep(interval)
    status = process.wait()
  except KeyboardInterrupt:  # what was seen so far is worth a verdict
    status = 0
  finally:
    process.kill()
    process.wait()
  if status:
    raise RuntimeError(f"{' '.join(command)} ended with {status}:\n{log.read_text()[-TEXT_SHOWN:]}")
  return series
