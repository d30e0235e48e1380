"""Two processes of a job that have met and compute nothing: cheaper than a training."""

import subprocess
import sys

from tests import tiny

# It joins as main.py does, but for the collectives, which compile, and for shorter waits.
PROCESS = """
import sys, time
from lrdit.runtime import cluster, lost_peers, progress
cluster.HEARTBEAT_SECONDS, lost_peers.SETTLE_SECONDS = 4, 0
cluster._open_connections = lambda: None
progress.start_logging(debug=False, who=f"process {sys.argv[2]}: ", is_first=True)
cluster.connect(cluster.Cluster(sys.argv[1], 2, int(sys.argv[2])), shares_sigterm=True)
print("met", flush=True)
time.sleep(60)
"""


class Meeting:
  """The processes, which are killed at the end."""

  def __init__(self, coordinator, wrap=lambda i, command: command):
    """Start them; `wrap` turns the command line of process i into another."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    self.processes = [
      subprocess.Popen(
        wrap(i, [sys.executable, "-c", PROCESS, coordinator, str(i)]),
        cwd=tiny.ROOT,
        env=tiny.environment(1),
        **pipes,
      )
      for i in range(2)
    ]

  def __enter__(self):
    assert [process.stdout.readline() for process in self.processes] == ["met\n"] * 2
    return self

  def __exit__(self, *_):
    for process in self.processes:
      process.kill()
      process.communicate()

  def assert_ends_in_one_line(self, i):
    """Assert that a process soon says that it has lost the other, and nothing else."""
    _, stderr = self.processes[i].communicate(timeout=60)
    said = [line for line in stderr.splitlines() if "waiting for the other" not in line]  # if slow
    assert (self.processes[i].returncode, len(said)) == (75, 1), stderr
    assert said[0].startswith(f"process {i}: error: another process has ended or does not answer (")
