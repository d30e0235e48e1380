"""Starts the scripts under launch/ from a copy of the checkout."""

import os
import shutil
import signal
import subprocess
import sys
import time

from tests import tiny

LAUNCH = tiny.ROOT / "launch"
TIMEOUT = 300  # of each command


def copy_checkout(root, *names):
  """A checkout of some files and directories, in which the tests' environment is used."""
  root.mkdir()
  for name in names:
    source = tiny.ROOT / name
    if source.is_dir():
      shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    else:
      shutil.copy(source, root)
  if "launch" in names:
    (root / "launch" / "setup.sh").write_text("")
  return root


def start(command, cwd, environment, path=()):
  """Starts a command in a process group of its own.

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
  """(exit status, standard output, standard error); nothing of it is left running."""
  try:
    stdout, stderr = process.communicate(timeout=timeout)
  except subprocess.TimeoutExpired:
    os.killpg(process.pid, signal.SIGKILL)
    raise
  return process.returncode, stdout, stderr


def wait_until(condition, process=None, timeout=TIMEOUT):
  """Returns once a condition holds; fails where the process ends before."""
  deadline = time.monotonic() + timeout
  while not condition():
    if (process and process.poll() is not None) or time.monotonic() > deadline:
      if process and process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
      raise AssertionError(process.communicate() if process else "not in time")
    time.sleep(0.01)


def has_lines(path, count=1):
  return path.exists() and path.read_text().count("\n") >= count


def times(directory):
  """When each file below a directory was last written."""
  return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


def assert_help(done, script):
  status, stdout, stderr = done
  assert (status, stderr) == (0, "")
  assert f"launch/{script}" in stdout
  assert "set -euo" not in stdout


def assert_wrong_argument(done, script, words):
  """Ended with one line that says what is wrong, and the usage."""
  status, stdout, stderr = done
  assert (status, stdout) == (2, "")
  error, usage = stderr.splitlines()
  assert error.startswith("error: ")
  assert words in error
  assert usage.startswith("Usage: ")
  assert f"launch/{script}" in usage
