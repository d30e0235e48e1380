import signal

import pytest

from tests import scripts
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
