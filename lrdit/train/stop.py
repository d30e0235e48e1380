"""Requests to stop a run, which training checks before every step."""

import signal
from typing import Any

from lrdit.runtime import cluster


class StopRequest:
  """Turns SIGTERM and SIGINT into a flag that training checks before every step.

  In a single process the first signal sets the flag; a second one kills. With several processes,
  jax shares a SIGTERM to any of them so that all see the flag at the same step; SIGINT ends a
  process, and with it the others.
  """

  def __init__(self):
    self.signal_name: str | None = None
    self._previous: dict[int, Any] = {}
    self._steps_asked = 0  # jax counts from the start of the process

  def __enter__(self) -> "StopRequest":
    is_alone = cluster.num_processes() == 1
    for number in (signal.SIGTERM, signal.SIGINT) if is_alone else ():
      self._previous[number] = signal.signal(number, self._on_signal)
    return self

  def _on_signal(self, number: int, _frame: Any) -> None:
    self.signal_name = signal.Signals(number).name
    signal.signal(number, signal.SIG_DFL)

  def __exit__(self, *_exception: Any) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def is_due(self) -> bool:
    """Return whether to stop; call it before every step."""
    if cluster.num_processes() > 1:
      if cluster.is_preempted(self._steps_asked):
        self.signal_name = "SIGTERM"
      self._steps_asked += 1
    return self.signal_name is not None
