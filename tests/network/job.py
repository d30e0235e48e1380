"""A training on several hosts: started, disturbed, and started again."""

import re
import subprocess
import time

from tests import scripts, tiny
from tests.network.hosts import address

# What is traced and compiled fastest: each start of each process does that anew.
ARG = "method=full"
FIELDS = dict(model__depth=1, training__num_steps=60, checkpoint__every_steps=2)
FLAGS = [f"--config.{name.replace('__', '.')}={value}" for name, value in FIELDS.items()]
TIMEOUT = 1800  # of a start, on a busy machine


class Job(scripts.Processes):
  """One start of a training, with a process on each host; all are killed at the end."""

  def __init__(self, network, workdir, number):
    """Start the processes; `number` counts the starts, each of which has a port of its own."""
    hosts = range(network.num_hosts)
    self._metrics = workdir / "metrics.jsonl"
    self.logs = [workdir.with_name(f"{workdir.name}.{number}.{i}.log") for i in hosts]
    super().__init__()
    for i, log in enumerate(self.logs):
      shared = f"--coordinator={address(0)}:{9000 + number}", f"--num_processes={len(hosts)}"
      command = tiny.command(workdir, *FLAGS, *shared, f"--process_id={i}", arg=ARG)
      environment = tiny.environment(1, PJRT_NPROC="1")
      with log.open("w") as file:
        self.processes.append(
          subprocess.Popen(network.command(i, command), env=environment, stdout=file, stderr=file)
        )

  def steps(self):
    """How many steps have been logged."""
    return self._metrics.read_text().count("\n") if self._metrics.exists() else 0

  def resumed_from(self):
    """The step of the checkpoint that was read; 0 for none."""
    found = re.search(r"resuming from the checkpoint of step (\d+)", self.logs[0].read_text())
    return int(found[1]) if found else 0

  def wait_for_own_steps(self, count):
    """Wait until this start has made so many steps."""
    own = re.compile(r"^process 0: step ", re.MULTILINE)
    done = self.wait_for(lambda: len(own.findall(self.logs[0].read_text())) >= count, TIMEOUT)
    assert done, self.text()

  def wait_for(self, condition, timeout):
    """Return whether a condition holds in time; all processes must run on."""
    deadline = time.monotonic() + timeout
    while not condition():
      assert all(p.poll() is None for p in self.processes), self.text()
      if time.monotonic() > deadline:
        return False
      time.sleep(0.02)
    return True

  def wait_for_ends(self, hosts, timeout):
    """Return whether all of these hosts' processes have ended in time."""
    deadline = time.monotonic() + timeout
    while None in [self.processes[i].poll() for i in hosts]:
      if time.monotonic() > deadline:
        return False
      time.sleep(0.02)
    return True

  def sizes(self):
    """The sizes of the logs, to be given to `said` later."""
    return [log.stat().st_size for log in self.logs]

  def said(self, host, sizes):
    """The lines that a host has logged since, but for those of its steps."""
    lines = self.logs[host].read_bytes()[sizes[host] :].decode().splitlines()
    return [line for line in lines if not line.startswith("process 0: step ")]

  def text(self):
    return "\n".join(f"== {log.name}\n{log.read_text()[-5000:]}" for log in self.logs)
