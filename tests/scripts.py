"""Starts the scripts under launch/ from a copy of the checkout, with a stand-in for main.py."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

from tests import tiny

LAUNCH = tiny.ROOT / "launch"
TIMEOUT = 300  # of each command

# Records that it was started, then does what the test says.
STAND_IN = r"""
import json, os, pathlib, signal, sys, time

flags = dict(flag[2:].split("=", 1) for flag in sys.argv[1:])
process = int(flags.get("process_id", 0))
records = pathlib.Path(os.environ["RECORDS"])
start = len(list(records.glob(f"{process}.*")))
record = {"pid": os.getpid(), "argv": sys.argv[1:], "environment": dict(os.environ)}
(records / f"new.{process}").write_text(json.dumps(record))
(records / f"new.{process}").rename(records / f"{process}.{start:03d}")


def wait_for(path):
  while not (records / path).exists():
    time.sleep(0.01)


def stop_on_sigterm(*_):  # as a training does; a second signal kills
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  time.sleep(0.2)
  print("saved", flush=True)
  os._exit(75)


def work(handler=None):
  if handler:
    signal.signal(signal.SIGTERM, handler)
  (records / f"ready.{process}").touch()
  time.sleep(60)


exec(os.environ["BEHAVIOUR"])
"""


def copy_checkout(root, *names):
  """Copy some files and directories, in which the tests' environment is used."""
  root.mkdir()
  for name in names:
    source = tiny.ROOT / name
    if source.is_dir():
      shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    else:
      shutil.copy(source, root)
  if "launch" in names:
    (root / "launch" / "setup.sh").write_text(f"set -euo pipefail\nroot={root}\n")
  return root


class StandIn:
  """A checkout whose main.py only records its starts and behaves as told."""

  def __init__(self, directory):
    self.root = copy_checkout(directory / "checkout", "configs", "launch")
    (self.root / "main.py").write_text(STAND_IN)
    self.records = directory / "records"
    self.records.mkdir()

  def start(self, command, behavior="", path=(), **environment):
    """Start a command next to the checkout."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "JAX_"))}
    for_main = {"RECORDS": str(self.records), "BEHAVIOUR": behavior}
    return start(command, self.root.parent, clean | for_main | environment, path)

  def run(self, *args, **environment):
    return finish(self.start(*args, **environment), timeout=40)

  def wait_for_work(self, count, process):
    """Return once so many processes of a started command are at work."""
    ready = [self.records / f"ready.{i}" for i in range(count)]
    wait_until(lambda: all(path.exists() for path in ready), process, timeout=40)

  def starts(self, process=0):
    """Return what was recorded by each start of a process."""
    return [json.loads(p.read_text()) for p in sorted(self.records.glob(f"{process}.[0-9]*"))]

  def assert_all_have_ended(self):
    pids = [json.loads(p.read_text())["pid"] for p in self.records.glob("*.[0-9][0-9]*")]
    assert pids
    wait_until(lambda: not any(map(is_running, pids)), timeout=40)


def is_running(pid):
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except (FileNotFoundError, ProcessLookupError):
    return False


def start(command, cwd, environment, path=()):
  """Start a command in a process group of its own.

  Args:
    command: its words.
    cwd: where it is started.
    environment: its whole environment but for PATH.
    path: directories in which programs are looked for first.
  """
  directories = [*map(str, path), os.path.dirname(sys.executable), os.environ["PATH"]]
  return subprocess.Popen(
    [str(word) for word in command],
    cwd=cwd,
    env=environment | {"PATH": ":".join(directories)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )


def finish(process, timeout=TIMEOUT):
  """Return (exit status, standard output, standard error)."""
  try:
    stdout, stderr = process.communicate(timeout=timeout)
  except subprocess.TimeoutExpired:
    os.killpg(process.pid, signal.SIGKILL)
    raise
  return process.returncode, stdout, stderr


def wait_until(condition, process=None, timeout=TIMEOUT):
  """Return once a condition holds; fail if the process ends before."""
  deadline = time.monotonic() + timeout
  while not condition():
    if (process and process.poll() is not None) or time.monotonic() > deadline:
      if process and process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
      raise AssertionError(process.communicate() if process else "not in time")
    time.sleep(0.01)


class Processes:
  """Started processes, which are killed at the end."""

  def __init__(self):
    self.processes = []

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.processes:
      process.kill()
      process.wait()


def free_port():
  with socket.socket() as sock:
    sock.bind(("127.0.0.1", 0))
    return sock.getsockname()[1]


def has_lines(path, count=1):
  return path.exists() and path.read_text().count("\n") >= count


def times(directory):
  """Return when each file below a directory was last written."""
  return {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


def assert_wrong_argument(done, words):
  """Assert that a script ended with one line that names the mistake."""
  status, stdout, stderr = done
  assert (status, stdout) == (2, "")
  (error,) = stderr.splitlines()
  assert error.startswith("error: ")
  assert words in error
