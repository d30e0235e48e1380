"""Hosts of their own on this machine: network namespaces that veth pairs join to one switch."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile

from tests import tiny

PROGRAMS = ("ip", "mount", "nsenter", "setpriv", "unshare")
# As root, without a user namespace: some machines grant that one and not the others.
IS_ROOT = os.geteuid() == 0
MAKE_USER = [] if IS_ROOT else ["--user", "--map-root-user"]
JOIN_USER = [] if IS_ROOT else ["--user", "--preserve-credentials"]
SPACES = ["--net", "--uts", "--mount"]


def address(host):
  return f"10.77.0.{host + 1}"


def missing():
  """Why this machine has no such hosts, or ""."""
  if absent := [name for name in PROGRAMS if not shutil.which(name)]:
    return f"{' and '.join(absent)} are not installed"
  try:
    with Network(2):
      return ""
  except OSError as error:
    return f"this machine grants no network namespaces: {error}"


class Network:
  """Hosts 0 to N - 1 and their switch, which end with this object or its process."""

  def __init__(self, num_hosts, seed=0):
    self._opened = contextlib.ExitStack()
    self._seed, self.num_hosts = seed, num_hosts
    self.faults = {"delay": 0.0, "loss": 0.0, "cut": []}

  def __enter__(self):
    with contextlib.ExitStack() as opened:
      names = opened.enter_context(tempfile.NamedTemporaryFile("w"))
      lines = ["127.0.0.1 localhost"]
      lines += [f"{address(i)} host{i}" for i in range(self.num_hosts)]
      names.write("\n".join(lines) + "\n")
      names.flush()
      switch = [sys.executable, "-m", "tests.network.switch"]
      self._switch = opened.enter_context(self._begin(["unshare", *MAKE_USER, "--net", *switch]))
      self._hosts = [opened.enter_context(self._host(names.name, i)) for i in range(self.num_hosts)]
      for i, host in enumerate(self._hosts):
        self._join(i, host.pid)
      self._tell([[f"port{i}" for i in range(self.num_hosts)], self._seed])
      self._opened = opened.pop_all()
    return self

  def __exit__(self, *exception):
    self._opened.__exit__(*exception)

  @staticmethod
  @contextlib.contextmanager
  def _begin(command):
    """Yield a process that has said that it is in its namespaces."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen(command, cwd=tiny.ROOT, text=True, **pipes)
    try:
      if process.stdout.readline() != "ready\n":
        raise OSError(process.communicate()[1].strip())
      yield process
    finally:
      process.kill()
      process.communicate()

  def _host(self, names, i):
    """Hold the namespaces of a host, which has a name of its own."""
    # Else all of them would have this machine's name, and take its address for theirs.
    script = f"mount --bind {names} /etc/hosts && hostname host{i} && ip link set lo up"
    script += " && echo ready && exec cat"
    return self._begin(self.inside_switch(["unshare", *SPACES, "sh", "-c", script]))

  def inside_switch(self, command):
    return ["nsenter", f"--target={self._switch.pid}", *JOIN_USER, "--net", *command]

  def command(self, host, command):
    """Return the command line that runs a command on a host."""
    own = [f"--target={self._hosts[host].pid}", f"--wd={tiny.ROOT}"]
    ends_with_us = ["setpriv", "--pdeathsig", "KILL"]
    return ["nsenter", *own, *JOIN_USER, *SPACES, *ends_with_us, *command]

  def _join(self, i, pid):
    peer = ["type", "veth", "peer", "name", f"port{i}"]
    self._run(self.inside_switch(["ip", "link", "add", "eth0", "netns", str(pid), *peer]))
    self._run(self.inside_switch(["ip", "link", "set", f"port{i}", "up"]))
    # A frame for each segment, so that the loss is one of frames as they are on a wire.
    for words in (
      ["addr", "add", f"{address(i)}/24", "dev", "eth0"],
      ["link", "set", "eth0", "gso_max_segs", "1", "up"],
    ):
      self._run(self.command(i, ["ip", *words]))

  @staticmethod
  def _run(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
      raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")

  def _tell(self, value):
    self._switch.stdin.write(json.dumps(value) + "\n")
    self._switch.stdin.flush()
    answer = self._switch.stdout.readline()
    if not answer:
      raise OSError(self._switch.communicate()[1].strip())
    return json.loads(answer)

  def set(self, **faults):
    """Change delay, loss or the cut links; return the counts of frames so far."""
    self.faults |= faults
    return self._tell(self.faults)
