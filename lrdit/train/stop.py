"""Requests to stop a run, which training checks before every step."""

import signal
from typing import Any

from lrdit.runtime import cluster


class StopRequest:
  """Turns a single process's first SIGTERM or SIGINT into a flag; a second one kills."""

  def __init__(self):
    self.signal_name: str | None = None
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> "StopRequest":
    for number in (signal.SIGTERM, signal.SIGINT):
      self._previous[number] = signal.signal(number, self._on_signal)
    return self

  def _on_signal(self, number: int, _frame: Any) -> None:
    self.signal_name = signal.Signals(number).name
    signal.signal(number, signal.SIG_DFL)

  def __exit__(self, *_exception: Any) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def is_due(self) -> bool:
    """Return whether to stop."""
    return self.signal_name is not None


class SharedStopRequest(StopRequest):
  """Turns a SIGTERM in any of several processes into a flag that all see at the same step.

  jax watches for SIGTERM in all of them. SIGINT ends a process, and with it the others.
  """

  def __init__(self):
    super().__init__()
    self._steps_asked = 0  # jax counts from the start of the process

  def __enter__(self) -> "SharedStopRequest":
    return self

  def is_due(self) -> bool:
    """Return whether to stop; call it before every step."""
    if cluster.is_preempted(self._steps_asked):
      self.signal_name = "SIGTERM"
    self._steps_asked += 1
    return self.signal_name is not None


def watch_for_stop() -> StopRequest:
  """Return the request to enter, for one process or for several."""
  return StopRequest() if cluster.num_processes() == 1 else SharedStopRequest()
