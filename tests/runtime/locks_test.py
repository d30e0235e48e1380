"""Who writes a directory: among processes, and after their death."""

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest

from lrdit.runtime.errors import UserError
from lrdit.runtime.locks import lock_path, owned
from tests import tiny

HOLD = """
import pathlib, sys
from lrdit.runtime.locks import owned
with owned(pathlib.Path(sys.argv[1]), "train"):
  print("held", flush=True)
  sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
  """Another process that trains in the directory."""
  process = subprocess.Popen(
    [sys.executable, "-c", HOLD, str(tmp_path)],
    cwd=tiny.ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.communicate()


def test_a_second_process_is_told_which_has_the_directory(tmp_path, holder, told):
  who = re.escape(f"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()} since ")
  with pytest.raises(UserError, match=who):
    owned(tmp_path, "train").__enter__()
  with owned(tmp_path, "sample"):  # another use
    pass
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  with owned(tmp_path, "train"):
    assert f"was left by process {holder.pid} on" in told.text
    with pytest.raises(UserError, match=f"process {os.getpid()} on"):
      owned(tmp_path, "train").__enter__()
  assert not list(tmp_path.iterdir())


def test_an_error_gives_the_directory_back(tmp_path):
  with pytest.raises(ZeroDivisionError), owned(tmp_path, "train"):
    raise ZeroDivisionError
  with owned(tmp_path, "train"):
    pass


@pytest.mark.parametrize("content", ["", "{", "7", '{"host": 3}'])
def test_a_lock_that_says_nothing_is_a_lock(tmp_path, content):
  with owned(tmp_path, "train"):
    lock_path(tmp_path, "train").write_text(content)
    with pytest.raises(UserError, match="in use by "):
      owned(tmp_path, "train").__enter__()


def test_one_that_waits_comes_next(tmp_path, told):
  order = []

  def wait():
    with owned(tmp_path, "classifier", wait=True):
      order.append("waiting")

  with owned(tmp_path, "classifier"):
    thread = threading.Thread(target=wait)
    thread.start()
    while "waiting for it" not in told.text:
      thread.join(0.01)
    order.append("first")
  thread.join()
  assert order == ["first", "waiting"]
  assert not list(tmp_path.iterdir())


def test_a_file_that_was_removed_meanwhile_is_no_lock(tmp_path, monkeypatch):
  path, lock = lock_path(tmp_path, "train"), fcntl.flock

  def removed_first(file, operation):
    monkeypatch.setattr(fcntl, "flock", lock)
    path.unlink()
    lock(file, operation)

  monkeypatch.setattr(fcntl, "flock", removed_first)
  with owned(tmp_path, "train"), pytest.raises(UserError):
    owned(tmp_path, "train").__enter__()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, told):
  def refuse(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(fcntl, "flock", refuse)
  with owned(tmp_path, "train"):
    assert "cannot be locked (No locks available): start nothing twice" in told.text
