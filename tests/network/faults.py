"""What happens to a network and its hosts, and what a training must do then."""

import dataclasses
import re
import signal
import time
from collections.abc import Callable

from lrdit.runtime.errors import RESTART_STATUS
from tests import trained
from tests.network.hosts import Network
from tests.network.job import ARG, FIELDS, TIMEOUT, Job

LIMIT_SECONDS = 60  # in which the run goes on, or ends everywhere
STEPS_BEFORE = 4  # of a start, so that it has saved after the last checkpoint
QUIET = {"delay": 0.001, "loss": 0.0, "cut": []}
LINE = re.compile(
  r"process \d+: error: another process has ended or does not answer \(.*\): start all again; they "
  "go on from the last checkpoint"
)


@dataclasses.dataclass(frozen=True)
class Fault:
  """A fault of a host or its link: what begins and what ends it, of (network, job, victim)."""

  begin: Callable
  end: Callable
  seconds: float = 0.0  # that it lasts, if not as long as it takes
  counted: str = ""  # what the switch counts of it
  stops_victim: bool = False  # so that it can say nothing
  everywhere: bool = False  # on all links, not those of a victim


def _set(**faults):
  return lambda network, job, victim: network.set(**faults)


def _cut(network, job, victim):
  network.set(cut=[victim])


def _send(number):
  return lambda network, job, victim: job.processes[victim].send_signal(number)


_mend, _freeze, _thaw = _set(**QUIET), _send(signal.SIGSTOP), _send(signal.SIGCONT)
# The run ends by these, everywhere; and goes on under these.
ENDING = {
  "link down for ever": Fault(_cut, _mend, counted="cut"),
  "host frozen": Fault(_freeze, _thaw, stops_victim=True),
  "host killed": Fault(_send(signal.SIGKILL), _mend, stops_victim=True),
}
PASSING = {
  "50 ms of delay": Fault(_set(delay=0.05), _mend, everywhere=True),
  "1 % loss": Fault(_set(loss=0.01), _mend, counted="lost", everywhere=True),
  "link down for 5 s": Fault(_cut, _mend, seconds=5, counted="cut"),
  "host frozen for 5 s": Fault(_freeze, _thaw, seconds=5),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What came of a fault."""

  num_hosts: int
  fault: str
  victim: int | None  # None for all
  seconds: float  # until the run has gone on, or the last process has ended
  lines: tuple[str, ...] = ()  # what the processes said
  broken: tuple[str, ...] = ()  # the promises that do not hold

  def __str__(self):
    who = "all" if self.victim is None else f"host {self.victim}"
    then = "ended" if self.fault in ENDING else "went on"
    head = f"{self.num_hosts:5}  {self.fault:19}  {who:6}  {self.seconds:4.1f} s  {then}"
    return "\n       ".join((head, *self.lines, *(f"BROKEN: {text}" for text in self.broken)))


def _apply(name, network, job, victim):
  """Return the `Outcome` of a fault of a running job."""
  fault, apply = (ENDING | PASSING)[name], _end_by if name in ENDING else _pass_by
  counts = network.set()
  seconds, lines, broken = apply(fault, network, job, victim)
  if fault.counted and network.set()[fault.counted] == counts[fault.counted]:
    broken.append(f"there was no fault: no frame was {fault.counted}")
  who = None if fault.everywhere else victim
  return Outcome(network.num_hosts, name, who, seconds, tuple(lines), tuple(broken))


def _pass_by(fault, network, job, victim):
  start = time.monotonic()
  fault.begin(network, job, victim)
  if fault.seconds:
    time.sleep(fault.seconds)
    fault.end(network, job, victim)
  before = job.steps()  # one more may be under way
  goes_on = job.wait_for(lambda: job.steps() >= before + 2, LIMIT_SECONDS)
  seconds = time.monotonic() - start
  if not fault.seconds:
    fault.end(network, job, victim)
  return seconds, [], [] if goes_on else [f"it makes no step in {LIMIT_SECONDS} s"]


def _end_by(fault, network, job, victim):
  sizes, start = job.sizes(), time.monotonic()
  fault.begin(network, job, victim)
  hosts = range(network.num_hosts)
  others = [i for i in hosts if i != victim or not fault.stops_victim]
  others_end = job.wait_for_ends(others, LIMIT_SECONDS)
  seconds = time.monotonic() - start
  fault.end(network, job, victim)  # then a frozen host goes on, and must end as well
  ended = job.wait_for_ends(hosts, LIMIT_SECONDS) and others_end
  broken = [] if ended else [f"not all have ended in {LIMIT_SECONDS} s"]
  lines = []
  for i in hosts:
    status, said = job.processes[i].poll(), job.said(i, sizes)
    if i == victim and status == -signal.SIGKILL:
      continue
    if status != RESTART_STATUS or len(said) != 1 or not LINE.fullmatch(said[0]):
      broken.append(f"process {i} ended with status {status} and said {said}")
    lines += said
  return seconds, lines, broken


def run(num_hosts, names, directory):
  """Train undisturbed, and again with one fault after the other; yield each `Outcome`.

  A fault is tried on the first host, to which the others connect, and on the last. At the end, the
  disturbed run must equal the undisturbed one to the bit, or this raises an AssertionError.
  """
  undisturbed, workdir = (
    directory / f"{num_hosts}_undisturbed",
    directory / f"{num_hosts}_disturbed",
  )
  cases = [
    (name, victim)
    for name in (*ENDING, *PASSING)
    if name in names
    for victim in ((0,) if (ENDING | PASSING)[name].everywhere else (0, num_hosts - 1))
  ]
  ending = [case for case in cases if case[0] in ENDING]
  with Network(num_hosts) as network:
    network.set(**QUIET)
    with Job(network, undisturbed, 0) as job:
      _finish(job)
    for number, (name, victim) in enumerate(ending):
      with Job(network, workdir, number) as job:
        job.wait_for_own_steps(STEPS_BEFORE)
        assert number == 0 or job.resumed_from() > 0, job.text()
        yield _apply(name, network, job, victim)
    with Job(network, workdir, len(ending)) as job:
      job.wait_for_own_steps(1)
      for name, victim in cases[len(ending) :]:
        yield _apply(name, network, job, victim)
      _finish(job)
  trained.assert_same_run(workdir, undisturbed, arg=ARG, **FIELDS)


def _finish(job):
  job.wait_for_ends(range(len(job.processes)), TIMEOUT)
  assert [process.poll() for process in job.processes] == [0] * len(job.processes), job.text()
