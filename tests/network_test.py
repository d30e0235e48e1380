"""Hosts of their own, in network namespaces: their links, and what a run does when they fail.

`python -m tests.network` runs the costly ones and prints a table.
"""

import json
import subprocess
import sys

import pytest

from tests.network import faults, hosts
from tests.network.meeting import Meeting

SERVER = """
import socket
with socket.socket(type=socket.SOCK_DGRAM) as opened:
  opened.bind(("", 9000))
  print("ready", flush=True)
  while True:
    opened.sendto(*opened.recvfrom(1000))
"""
# Sends datagrams, and prints the round trips of those that come back in order.
CLIENT = """
import json, socket, sys, time
trips = []
with socket.socket(type=socket.SOCK_DGRAM) as opened:
  opened.settimeout(float(sys.argv[2]))
  for i in range(int(sys.argv[1])):
    start = time.monotonic()
    opened.sendto(b"%d" % i, ("host1", 9000))
    try:
      while opened.recv(1000) != b"%d" % i:
        pass
      trips.append(time.monotonic() - start)
    except TimeoutError:
      pass
print(json.dumps(trips))
"""


@pytest.fixture
def network():
  """Two hosts, joined by a switch."""
  if reason := hosts.missing():
    pytest.skip(reason)
  with hosts.Network(2) as opened:
    yield opened


def round_trips(network, count, wait=10.0):
  command = network.command(0, [sys.executable, "-c", CLIENT, str(count), str(wait)])
  return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


@pytest.fixture
def echo(network):
  """A server on host 1 that sends every datagram back."""
  server = network.command(1, [sys.executable, "-c", SERVER])
  with subprocess.Popen(server, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == "ready\n"
    yield
    process.kill()


@pytest.mark.usefixtures("echo")
def test_links_are_late_lose_frames_and_are_cut(network):
  network.set(delay=0.05)
  trips = round_trips(network, 5)
  assert len(trips) == 5
  assert min(trips) >= 0.1
  network.set(delay=0.0, loss=0.3)
  assert 0 < len(round_trips(network, 10, wait=0.3)) < 10
  assert network.set(loss=0.0, cut=[1])["lost"] > 0
  assert round_trips(network, 1, wait=0.3) == []
  assert network.set(cut=[])["cut"] > 0
  assert len(round_trips(network, 5)) == 5


def test_a_cut_link_ends_both_in_one_line(network):
  with Meeting(f"{hosts.address(0)}:9000", network.command) as meeting:
    network.set(cut=[1])
    for i in range(2):
      meeting.assert_ends_in_one_line(i)


@pytest.mark.slow
@pytest.mark.parametrize("num_hosts", [2, 4])
def test_a_training_survives_faults_of_its_hosts(num_hosts, tmp_path):
  if reason := hosts.missing():
    pytest.skip(reason)
  for outcome in faults.run(num_hosts, faults.ENDING | faults.PASSING, tmp_path):
    assert not outcome.broken, outcome
