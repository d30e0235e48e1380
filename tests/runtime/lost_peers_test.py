import signal
import subprocess
import sys

import pytest

from tests import scripts, tiny
from tests.network.meeting import Meeting


@pytest.mark.parametrize(
  ("victim", "kind"),
  [
    (0, signal.SIGKILL),
    (1, signal.SIGSTOP),
    pytest.param(0, signal.SIGSTOP, marks=pytest.mark.slow),
    pytest.param(1, signal.SIGKILL, marks=pytest.mark.slow),
  ],
)
def test_a_process_that_loses_another_ends_in_one_line(victim, kind):
  """It has neither jax's stack trace nor status 134."""
  with Meeting(f"localhost:{scripts.free_port()}") as meeting:
    meeting.processes[victim].send_signal(kind)
    meeting.assert_ends_in_one_line(1 - victim)
    if kind == signal.SIGSTOP:  # when it goes on, it finds that the other has ended
      meeting.processes[victim].send_signal(signal.SIGCONT)
      meeting.assert_ends_in_one_line(victim)


# Throws an exception of a C++ type that it makes up, which nothing catches.
THROW = """
import ctypes, sys
from lrdit.runtime import lost_peers
lost_peers.SETTLE_SECONDS = 0
lost_peers._call_on_uncaught(lambda: lost_peers._end(3))
class TypeInfo(ctypes.Structure):
  _fields_ = [("vtable", ctypes.c_void_p), ("name", ctypes.c_char_p)]
library = ctypes.CDLL("libstdc++.so.6")
table = ctypes.c_void_p.in_dll(library, "_ZTVN10__cxxabiv117__class_type_infoE")
info = TypeInfo(ctypes.addressof(table) + 2 * lost_peers.WORD, sys.argv[1].encode())
allocate = library["__cxa_allocate_exception"]
allocate.restype = ctypes.c_void_p
library["__cxa_throw"](ctypes.c_void_p(allocate(8)), ctypes.byref(info), None)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GNU's C++ library")
@pytest.mark.parametrize(
  ("kind", "status"),
  [
    ("St8bad_cast", 75),
    ("N4gloo13EnforceNotMetE", 75),
    ("N4gloo11IoExceptionE", 75),
    ("St9bad_alloc", -signal.SIGABRT),
  ],
)
def test_exceptions_of_threads_that_have_lost_another_process_are_one_line(kind, status):
  words = [sys.executable, "-c", THROW, kind]
  env = tiny.environment(1)
  done = subprocess.run(words, cwd=tiny.ROOT, env=env, capture_output=True, text=True, check=False)
  assert done.returncode == status, done.stderr
  lines = done.stderr.splitlines()
  is_told = len(lines) == 1 and lines[0].startswith("process 3: error: another process has ended")
  assert is_told == (status == 75), lines
