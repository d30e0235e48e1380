"""A switch of Ethernet frames whose links are late, lose frames or are cut.

`python -m tests.network.switch` reads one line of JSON at a time. The first is [interface names,
seed]; each further one is a mapping with `delay` (seconds), `loss` (share of the frames) and `cut`
(numbers of the links that carry nothing). It answers each with the counts of frames so far.
"""

import heapq
import json
import os
import random
import selectors
import socket
import sys
import time

ETH_P_ALL = 3
SOL_PACKET, PACKET_VNET_HDR = 263, 15
HEADER = 10  # bytes of the virtio header, by which the kernel completes checksums it left out
BUFFER_BYTES = 1 << 24
LONGEST = 1 << 17  # bytes of a frame


def open_port(name: str) -> socket.socket:
  """Return a socket that has every frame that arrives at an interface."""
  port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
  port.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
  port.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
  port.bind((name, ETH_P_ALL))
  port.setblocking(False)
  return port


class Switch:
  """Forwards frames between ports; a frame is late once, and may be lost once."""

  def __init__(self, names: list[str], seed: int):
    self.ports = [open_port(name) for name in names]
    self.faults = {"delay": 0.0, "loss": 0.0, "cut": []}
    self.counts = {"forwarded": 0, "lost": 0, "cut": 0}
    self._rng, self._home = random.Random(seed), {}  # the port of each address
    self._late: list[tuple[float, int, list[int], bytes]] = []
    self._number = 0

  def receive(self, source: int) -> None:
    """Take the frames that have arrived at a port."""
    while True:
      try:
        frame, address = self.ports[source].recvfrom(LONGEST)
      except BlockingIOError:
        return
      if address[2] == socket.PACKET_OUTGOING:
        continue
      self._home[frame[HEADER + 6 : HEADER + 12]] = source
      home = self._home.get(frame[HEADER : HEADER + 6])
      others = [i for i in range(len(self.ports)) if i != source]
      self._take(source, others if home is None else [home], frame)

  def _take(self, source: int, targets: list[int], frame: bytes) -> None:
    if self._rng.random() < self.faults["loss"]:
      self.counts["lost"] += 1
    elif source in self.faults["cut"]:
      self.counts["cut"] += 1
    else:
      self._number += 1  # frames that are due at the same time keep their order
      due = time.monotonic() + self.faults["delay"]
      heapq.heappush(self._late, (due, self._number, targets, frame))

  def send(self) -> float | None:
    """Send what is due; return in how many seconds the next frame is, if there is any."""
    while self._late and self._late[0][0] <= time.monotonic():
      _, _, targets, frame = heapq.heappop(self._late)
      for target in targets:
        if target in self.faults["cut"]:
          self.counts["cut"] += 1
          continue
        try:
          self.ports[target].send(frame)
          self.counts["forwarded"] += 1
        except (BlockingIOError, OSError):  # a full queue loses frames as any switch does
          self.counts["lost"] += 1
    return max(0.0, self._late[0][0] - time.monotonic()) if self._late else None


def main() -> None:
  """Serve until standard input ends."""
  print("ready", flush=True)  # in its namespace
  names, seed = json.loads(sys.stdin.readline())
  switch, selector = Switch(names, seed), selectors.DefaultSelector()
  for i, port in enumerate(switch.ports):
    selector.register(port, selectors.EVENT_READ, i)
  selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
  print(json.dumps(switch.counts), flush=True)
  while True:
    for key, _ in selector.select(switch.send()):
      if key.data is not None:
        switch.receive(key.data)
        continue
      data = os.read(sys.stdin.fileno(), 1 << 16)
      if not data:
        return
      switch.faults = json.loads(data)
      print(json.dumps(switch.counts), flush=True)


if __name__ == "__main__":
  main()
