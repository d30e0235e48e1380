"""How a process learns from jax that it has lost the others, and ends in one line.

jax's threads send and await heartbeats, and notice at once that the first process has closed its
connections. They would then abort the process with a stack trace. `jax.distributed.initialize` has
no argument for a callback in place of that, but the function below it has. gloo, which sums
gradients on CPUs, throws in a thread of its own if another process leaves in the middle of a sum.
"""

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxlib import _jax

from lrdit.runtime.errors import end_process, others_are_gone

# The main thread may know more, such as a mistake that all report, or an address.
SETTLE_SECONDS = 5

WORD = ctypes.sizeof(ctypes.c_void_p)
# Uncaught C++ exceptions of these types mean that others are gone: a mangled name, and a prefix.
FAILED_CAST, OF_GLOO = b"St8bad_cast", b"N4gloo"

_kept: list[Any] = []  # C calls these for as long as the process runs


def _end(process_id: int) -> None:
  time.sleep(SETTLE_SECONDS)
  end_process(others_are_gone("jax has lost contact"), False, f"process {process_id}: ")


@contextlib.contextmanager
def reported() -> Iterator[None]:
  """Have the jax client that is made in this context end the process when it loses the others."""
  make = getattr(_jax, "get_distributed_runtime_client", None)
  if make is None:  # another version: jax ends the process, in more lines
    yield
    return

  def make_client(address: str, node_id: int, **settings: Any) -> Any:
    _call_on_uncaught(lambda: _end(node_id))
    settings["missed_heartbeat_callback"] = lambda _: _end(node_id)
    return make(address, node_id, **settings)

  _jax.get_distributed_runtime_client = make_client
  try:
    yield
  finally:
    _jax.get_distributed_runtime_client = make


def _call_on_uncaught(end: Callable[[], None]) -> None:
  """Call `end`, which must not return, where C++ would abort because others are gone."""
  # Up to jaxlib 0.12, the callback's argument, an absl::Status, has no counterpart in Python. The
  # bad_cast that this raises in jax's thread calls the terminate handler, which is this one.
  try:
    library = ctypes.CDLL("libstdc++.so.6")
    set_handler = library["_ZSt13set_terminatePFvvE"]
    exception_type = library["__cxa_current_exception_type"]
  except (OSError, AttributeError):  # another C++ library: jax ends the process, in more lines
    return
  handler_type = ctypes.CFUNCTYPE(None)
  set_handler.argtypes, set_handler.restype = [handler_type], handler_type
  exception_type.restype = ctypes.c_void_p

  def on_terminate() -> None:
    found = exception_type()  # a std::type_info, whose second word is its name
    name = ctypes.cast(found + WORD, ctypes.POINTER(ctypes.c_char_p))[0] if found else None
    if name == FAILED_CAST or (name and name.startswith(OF_GLOO)):
      end()
    before()

  handler = handler_type(on_terminate)
  before = set_handler(handler)
  _kept.append(handler)
