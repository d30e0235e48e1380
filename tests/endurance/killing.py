"""`kill -9` at random moments, after which the same command must end as an undisturbed one.

A directory is disturbed again and again, so that one comparison at its end is of several kills.
"""

import collections
import os
import pathlib
import random
import shutil
import time
from collections.abc import Callable

from tests.endurance import targets
from tests.endurance.jobs import Job, environment
from tests.endurance.targets import Target

AT_START = 0.2  # share of the kills at any moment from the start of a process on
# Of a hundred kills.
SHARES = {"training": 20, "checkpoint": 20, "samples": 20, "encode": 15, "evaluate": 15, "two": 10}


def make_targets(output: pathlib.Path) -> dict[str, Target]:
  """Return what is killed, by the names of `SHARES`."""
  return {
    "training": targets.training(),
    "checkpoint": targets.training(100, save_every=2, is_due=targets.is_saving, delay=0.02),
    "samples": targets.sampling(output),
    "encode": targets.encoding(output),
    "evaluate": targets.evaluating(output, pause=0.8),
    "two": targets.training(processes=2),
  }


class Disturbance:
  """One target, disturbed in directory after directory.

  Attributes:
    counts: how often it was "disturbed" and "compared", and how many directories were "made".
    findings: a text on each.
  """

  def __init__(
    self,
    name: str,
    target: Target,
    output: pathlib.Path,
    seed: int,
    place: pathlib.Path | None = None,
  ):
    """Make what an undisturbed run makes; `place` is where the others work, or else `output`."""
    self.name, self.target, self.output, self.place = name, target, output, place or output
    self.rng, self.env = random.Random(f"{seed} {name}"), environment(output)
    self.reference, self.counts = output / f"{name}-undisturbed", collections.Counter()
    self.findings: list[str] = []
    self._directory, self._disturbed = self.reference, 0
    target.prepare(self.reference)
    self._start_seconds, self._work_seconds = self._measure()

  def _measure(self) -> tuple[float, float]:
    """Make what an undisturbed run makes; return the times until its work begins, and of it."""
    mark, start = self.target.mark(self.reference), time.monotonic()
    with self.start(self.reference) as job:
      job.wait_until(lambda: self.target.mark(self.reference) not in (mark, None))
      begun = time.monotonic()
      statuses = job.wait()
      assert set(statuses) == {0}, f"status {statuses}:\n{job.text[-2000:]}"
    return begun - start, time.monotonic() - begun

  def start(self, directory: pathlib.Path) -> Job:
    """Start the command in a directory."""
    return Job(self.target.commands(directory), self.env, self.output / f"{self.name}.log")

  def next_directory(self) -> pathlib.Path:
    """Return the directory to work in, which is made if the last one is finished."""
    if self._directory is self.reference:
      self._directory, self._disturbed = self.place / f"{self.name}-{self.counts['made']}", 0
      self.counts["made"] += 1
      self.target.prepare(self._directory)
      os.sync()  # a disk that fails loses what the command wrote, and not what it started from
    return self._directory

  def wait_for_moment(self, job: Job, directory: pathlib.Path, mark: object) -> None:
    """Return at a random moment of the work, or of its start."""
    target, rng = self.target, self.rng
    if rng.random() < AT_START:
      job.sleep(rng.uniform(0, self._start_seconds))
      return
    job.wait_until(lambda: target.mark(directory) not in (mark, None))
    job.sleep(rng.uniform(0, target.pause * self._work_seconds))
    job.wait_until(lambda: target.is_due(directory))
    job.sleep(rng.uniform(0, target.delay * self._work_seconds))

  def disturb(self, act: Callable[[Job], bool]) -> None:
    """Start the command, and `act` at a random moment, which returns whether it was in time."""
    directory, target = self.next_directory(), self.target
    mark, saved = target.mark(directory), target.saved(directory)
    with self.start(directory) as job:
      self.wait_for_moment(job, directory, mark)
      if act(job):
        self.counts["disturbed"] += 1
        self._disturbed += 1
      went_on = target.went_on_from(job.text)
      assert went_on is None or went_on >= saved, f"it went on from {went_on} of {saved}"
      has_ended = {process.poll() for process in job.processes} == {0}
    if has_ended:
      self.finish()

  def finish(self) -> None:
    """Let the command end in its directory, and compare what it made."""
    directory = self._directory
    with self.start(directory) as job:
      statuses = job.wait()
      assert set(statuses) == {0}, f"status {statuses}:\n{job.text[-2000:]}"
    self.target.compare(directory, self.reference)
    self.counts["compared"] += 1
    shutil.rmtree(directory)
    self._directory = self.reference

  def run(self, count: int, act: Callable[[Job], bool]) -> None:
    """Disturb it so often; a finding keeps its directory."""
    while self.counts["disturbed"] < count:
      self._guarded(lambda: self.disturb(act))
    if self._directory is not self.reference:
      self._guarded(self.finish)

  def _guarded(self, work: Callable[[], None]) -> None:
    try:
      work()
    except AssertionError as error:
      self.findings.append(f"{self._directory.name}, {self._disturbed} times disturbed: {error}")
      self._directory = self.reference
      self.counts["disturbed"] += 1  # so that it ends

  def kill(self, job: Job) -> bool:
    """Kill one process; return whether it was still at work."""
    if job.has_ended:
      job.wait()
      return False
    job.kill(self.rng.randrange(len(job.processes)))
    return -9 in [process.returncode for process in job.processes]

  def report(self, what: str) -> None:
    """Print the counts and the findings."""
    counts = self.counts
    text = f"{self.name}: {counts['disturbed']} {what}, {counts['compared']} comparisons with an "
    print(f"{text}undisturbed run, {len(self.findings)} findings", flush=True)
    for finding in self.findings:
      print(f"  {finding}", flush=True)


def shares(count: int) -> dict[str, int]:
  """Return how many of `count` kills each target gets."""
  bounds, total = [0], 0
  for share in SHARES.values():
    total += share
    bounds.append(round(count * total / sum(SHARES.values())))
  return {name: b - a for name, a, b in zip(SHARES, bounds, bounds[1:], strict=False)}


def kills(output: pathlib.Path, count: int, seed: int, names: list[str]) -> int:
  """Kill processes `count` times in all; return the number of findings."""
  found = total = 0
  made = make_targets(output)
  for name, number in shares(count).items():
    if not number or (names and name not in names):
      continue
    disturbance = Disturbance(name, made[name], output, seed)
    disturbance.run(number, disturbance.kill)
    disturbance.report("kills")
    found, total = found + len(disturbance.findings), total + disturbance.counts["disturbed"]
  print(f"{total} kill -9 at random moments", flush=True)
  return found
