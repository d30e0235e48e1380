"""A long training, a large sample set, and many evaluations in one process, watched from outside.

The models are tiny, because what is measured is growth and not learning.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable

from lrdit.runtime.malloc import KEEP_FREED
from tests import tiny
from tests.endurance.jobs import environment
from tests.endurance.targets import flags
from tests.endurance.verdict import Verdict, draw, judge
from tests.endurance.watch import watch

ROUND = 500  # steps between the grids, evaluations and checkpoints of training
BATCH = 500  # samples computed at once
# The kernel joins pages of malloc's heap to huge ones and splits them again as it likes, which
# moved the resident memory of a training between 0.5 and 0.9 GiB.
SMALL_PAGES = KEEP_FREED.replace("hugetlb=1", "hugetlb=0")

# One block of four tokens, of which a million samples take a minute.
SMALLEST = {"model.depth": 1, "model.patch_size": 4, "sampling.num_steps": 2}


@dataclasses.dataclass(frozen=True)
class Scenario:
  """A command, and what it has done.

  Attributes:
    title: of the picture.
    unit: of the work.
    command: its words.
    done: counts the units of work that are done.
  """

  title: str
  unit: str
  command: list[str]
  done: Callable[[], int]


def last_step(workdir: pathlib.Path) -> int:
  """Return the step of the last whole line of metrics.jsonl, or 0."""
  try:
    with (workdir / "metrics.jsonl").open("rb") as file:
      file.seek(-min(4096, os.path.getsize(file.name)), os.SEEK_END)
      lines = file.read().rpartition(b"\n")[0].splitlines()
    return int(json.loads(lines[-1])["step"])
  except (OSError, IndexError, ValueError):
    return 0


def _num_done(directory: pathlib.Path) -> int:
  """Return the number of samples of a set that are on the disk, or 0 before it is begun."""
  try:
    record = json.loads((directory / "progress.json").read_text())
  except FileNotFoundError:
    record = {}
  return int(record.get("num_done", 0))


def train(output: pathlib.Path, steps: int) -> Scenario:
  """Train with grids, held-out losses, metrics of samples, checkpoints and TensorBoard events."""
  workdir, each = output / "train", min(ROUND, max(1, steps // 2))
  fields = {f"training.{name}_every_steps": each for name in ("eval", "sample", "metrics")}
  fields |= {"checkpoint.every_steps": each, "training.log_every_steps": max(1, each // 10)}
  fields |= {"training.num_steps": steps, "training.metrics_samples": 100}
  fields |= {"training.tensorboard": True, "optimizer.learning_rate": 1e-3}
  title = f"{steps} steps; grid, evaluation, metrics and checkpoint every {each}"
  command = tiny.command(workdir, *flags(fields))
  return Scenario(title, "step", command, lambda: last_step(workdir))


def checkpoints(output: pathlib.Path, evaluations: int) -> Scenario:
  """Train the smallest model, and keep as many checkpoints as are to be evaluated."""
  workdir = output / "smallest"
  fields = {"checkpoint.every_steps": 1, "checkpoint.keep": evaluations}
  fields |= {"training.num_steps": evaluations}
  command = tiny.command(workdir, *flags(SMALLEST | fields))
  return Scenario("", "step", command, lambda: last_step(workdir))


def sample(output: pathlib.Path, count: int) -> Scenario:
  """Export a set of samples."""
  workdir = output / "smallest"
  fields = {"sampling.num_samples": count, "sampling.batch_size": min(BATCH, count)}
  command = tiny.command(workdir, "--mode=sample", *flags(SMALLEST | fields))
  directory = workdir / "samples" / "default"
  return Scenario(f"a set of {count} samples", "sample", command, lambda: _num_done(directory))


def evaluate(output: pathlib.Path, count: int) -> Scenario:
  """Evaluate every checkpoint, in one process."""
  workdir = output / "smallest"
  command = tiny.command(workdir, "--mode=evaluate", "--checkpoint=all", *flags(SMALLEST))
  title = f"{count} evaluations in one process"
  return Scenario(
    title, "evaluation", command, lambda: len([*workdir.glob("steps/*/evaluation.json")])
  )


def run(scenario: Scenario, path: pathlib.Path, interval: float) -> dict[str, Verdict]:
  """Run a scenario; write its series and verdicts to `path`.json and a picture to `path`.png."""
  env = environment(path.parent) | {"GLIBC_TUNABLES": SMALL_PAGES}
  series = watch(scenario.command, env, path.with_suffix(".log"), scenario.done, interval)
  verdicts = judge(series)
  record = {"title": scenario.title, "unit": scenario.unit, "series": series}
  record["verdicts"] = {name: dataclasses.asdict(v) for name, v in verdicts.items()}
  path.with_suffix(".json").write_text(json.dumps(record))
  draw(path.with_suffix(".png"), series, scenario.title, scenario.unit)
  return verdicts


def describe(verdicts: dict[str, Verdict]) -> list[str]:
  """Return a line on every quantity."""
  units = {"rss": (2.0**-20, "MiB"), "cpu": (1e3, "ms of CPU per unit of work")}
  lines = []
  for name, v in verdicts.items():
    scale, unit = units.get(name, (1, name))
    growth, low, tolerance, median = (
      f"{scale * x:.3g}" for x in (v.growth, v.low, v.tolerance, v.median)
    )
    says = "GROWS" if v.grows else "constant"
    lines.append(
      f"  {name}: {says}: {median} {unit}, growth {growth} (at least {low}, tolerated {tolerance})"
    )
  return lines


def soak(output: pathlib.Path, steps: int, samples: int, evaluations: int, interval: float) -> int:
  """Run the scenarios whose amount of work is not 0; return the number of quantities that grow."""
  made = {}
  if steps:
    made["training"] = train(output, steps)
  if samples or evaluations:
    made["checkpoints"] = checkpoints(output, max(1, evaluations))
  if samples:
    made["samples"] = sample(output, samples)
  if evaluations:
    made["evaluations"] = evaluate(output, evaluations)
  growing = 0
  for name, scenario in made.items():
    if not scenario.title:  # what the others need
      watch(scenario.command, environment(output), output / f"{name}.log", scenario.done, interval)
      continue
    verdicts = run(scenario, output / name, interval)
    print(f"{name}: {scenario.title}", *describe(verdicts), sep="\n", flush=True)
    growing += sum(v.grows for v in verdicts.values())
  return growing
