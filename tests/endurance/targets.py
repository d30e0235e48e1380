"""Commands that are disturbed, and what an undisturbed run of each makes."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

from tests import latent_runs, tiny, trained
from tests.endurance.jobs import in_processes

# One block, of which a program compiles in a second.
MODEL = {"model.depth": 1, "model.patch_size": 4, "rank.num_buckets": 2}
STEPS, SAMPLES, IMAGES = 300, 40_000, 2500
# Facts of a sample set that tell how often it was begun.
OF_STARTS = ("num_starts", "num_drawn", "wall_clock_seconds", "compile_seconds")


def flags(fields: dict[str, Any]) -> list[str]:
  """Return the config flags of some fields."""
  return [f"--config.{name}={value}" for name, value in fields.items()]


@dataclasses.dataclass(frozen=True)
class Target:
  """A command that works in a directory, and goes on there after it was disturbed.

  Attributes:
    prepare: makes what the command needs in an empty directory.
    commands: returns the command lines of its processes.
    mark: returns a state of the directory that changes when a start begins its work, or None.
    saved: returns the units of work that are safe.
    resumed: finds in the output the units of work that a start went on from.
    compare: raises an AssertionError unless the directory is what the second one is.
    is_due: whether the work is at the moment in which it is to be disturbed.
    pause: longest time from the beginning of the work until `is_due` is asked for, as a share of
      the time that undisturbed work takes.
    delay: longest time from then on, likewise.
  """

  prepare: Callable[[pathlib.Path], Any]
  commands: Callable[[pathlib.Path], list[list[str]]]
  mark: Callable[[pathlib.Path], Any]
  saved: Callable[[pathlib.Path], int]
  resumed: str
  compare: Callable[[pathlib.Path, pathlib.Path], None]
  is_due: Callable[[pathlib.Path], bool] = lambda _: True
  pause: float = 0.25
  delay: float = 0.0

  def went_on_from(self, text: str) -> int | None:
    """Return the units of work that a start with this output went on from, if it says so."""
    found = re.search(self.resumed, text)
    return int(found[1]) if found else None


def _changed(path: pathlib.Path) -> tuple[int, int] | None:
  try:
    found = os.stat(path)
  except FileNotFoundError:
    return None
  return found.st_mtime_ns, found.st_ino


def _json(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    return {}


def _files(directory: pathlib.Path) -> dict[str, bytes]:
  paths = (path for path in directory.rglob("*") if path.is_file())
  return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def _same_files(a: pathlib.Path, b: pathlib.Path) -> None:
  found, expected = _files(a), _files(b)
  assert sorted(found) == sorted(expected), sorted(found.keys() ^ expected.keys())
  different = [name for name in found if found[name] != expected[name]]
  assert not different, f"{different} differ"


# Training.


def newest_checkpoint(directory: pathlib.Path) -> int:
  """Return the step of the newest complete checkpoint, or 0."""
  names = os.listdir(directory / "checkpoints") if (directory / "checkpoints").exists() else []
  return max((int(name) for name in names if name.isdecimal()), default=0)


def is_saving(directory: pathlib.Path) -> bool:
  """Return whether a checkpoint is being written."""
  try:
    return any("tmp" in name for name in os.listdir(directory / "checkpoints"))
  except FileNotFoundError:
    return False


def training_fields(steps: int, save_every: int) -> dict[str, Any]:
  """Return the fields of a run with grids and evaluations."""
  fields = {"training.num_steps": steps, "checkpoint.every_steps": save_every}
  return (
    MODEL | fields | {f"training.{name}_every_steps": steps // 2 for name in ("eval", "sample")}
  )


def training(steps: int = STEPS, save_every: int = 20, processes: int = 1, **more: Any) -> Target:
  """Train."""
  fields = training_fields(steps, save_every)

  def compare(directory: pathlib.Path, reference: pathlib.Path) -> None:
    own = {name.replace(".", "__"): value for name, value in fields.items()}
    trained.assert_same_run(directory, reference, **own)
    _same_files(directory / "samples", reference / "samples")
    assert not (directory / "damaged_checkpoints").exists()

  return Target(
    prepare=lambda directory: directory.mkdir(),
    commands=lambda directory: in_processes(tiny.command(directory, *flags(fields)), processes),
    mark=lambda directory: _changed(directory / "metrics.jsonl"),
    saved=newest_checkpoint,
    resumed=r"resuming from the checkpoint of step (\d+)",
    compare=compare,
    **more,
  )


# Samples and evaluation, of one run that is copied.


def _run(output: pathlib.Path) -> pathlib.Path:
  """Return a workdir with a checkpoint of noisy parameters and the data's record."""
  path = output / "trained"
  if not path.exists():
    from lrdit.config.run_config import store_config
    from lrdit.experiment import Experiment
    from lrdit.runtime.workdir import check_data

    config = tiny.tiny_config(**{name.replace(".", "__"): v for name, v in MODEL.items()})
    path.mkdir(parents=True)
    store_config(path, config)
    experiment = Experiment(config)
    check_data(path, {split: experiment.source(split).fingerprint for split in ("train", "eval")})
    trained.save_checkpoint(path, config)
  return path


def compare_samples(directory: pathlib.Path, reference: pathlib.Path) -> None:
  """Compare two sample sets to the bit, but for what tells how often they were begun."""
  sets = [_files(path / "samples" / "default") for path in (directory, reference)]
  records = [json.loads(files.pop("metadata.json")) for files in sets]
  for record in records:
    for name in OF_STARTS:
      record.pop(name)
  assert records[0] == records[1]
  assert sets[0].keys() == sets[1].keys()
  assert [name for name in sets[0] if sets[0][name] != sets[1][name]] == []


def sampling(output: pathlib.Path, **more: Any) -> Target:
  """Export samples."""
  fields = MODEL | {"sampling.num_samples": SAMPLES, "sampling.batch_size": 100}
  fields |= {"sampling.num_steps": 2}

  def record(directory: pathlib.Path) -> pathlib.Path:
    return directory / "samples" / "default" / "progress.json"

  return Target(
    prepare=lambda directory: shutil.copytree(_run(output), directory),
    commands=lambda directory: [tiny.command(directory, "--mode=sample", *flags(fields))],
    mark=lambda directory: _changed(record(directory)),
    saved=lambda directory: _json(record(directory)).get("num_done", 0),
    resumed=r"going on from (\d+) of",
    compare=compare_samples,
    **more,
  )


def evaluating(output: pathlib.Path, **more: Any) -> Target:
  """Train a classifier, measure references and a sample set, and write evaluation.json."""
  given = {"evaluation.extractors": ("pixel", "classifier"), "evaluation.classifier_steps": 60}
  fields = MODEL | given | {"sampling.num_samples": 200, "sampling.num_steps": 2}

  def prepare(directory: pathlib.Path) -> None:
    sampled = output / "sampled"
    if not sampled.exists():
      from lrdit.config.resolve import resolve
      from lrdit.config.run_config import stored_config
      from lrdit.modes import sample

      shutil.copytree(_run(output), sampled)
      config = resolve(stored_config(sampled)).unlock()
      config.sampling.num_samples, config.sampling.num_steps = 200, 2
      sample.sample(config, str(sampled))
    shutil.copytree(sampled, directory)

  def compare(directory: pathlib.Path, reference: pathlib.Path) -> None:
    for name in ("features", "samples"):
      _same_files(directory / name, reference / name)
    assert _json(directory / "evaluation.json") == _json(reference / "evaluation.json") != {}

  return Target(
    prepare=prepare,
    commands=lambda directory: [tiny.command(directory, "--mode=evaluate", *flags(fields))],
    mark=lambda directory: _changed(directory / ".evaluate.lock"),
    saved=lambda _: 0,
    resumed=r"(?!)",
    compare=compare,
    **more,
  )


# Latents.


def encoding(output: pathlib.Path, **more: Any) -> Target:
  """Encode images."""
  images = output / "images.npz"

  def prepare(directory: pathlib.Path) -> None:
    if not images.exists():
      latent_runs.write_images(images, IMAGES)
    directory.mkdir()

  def done(directory: pathlib.Path) -> int:
    splits = _json(directory / "progress.json").get("splits", {})
    return splits.get("train", {}).get("done", 0)

  return Target(
    prepare=prepare,
    commands=lambda directory: [latent_runs.command("encode", images, f"--output={directory}")],
    mark=lambda directory: _changed(directory / ".encode.lock"),
    saved=done,
    resumed=r"train: (\d+) of \d+ images are encoded",
    compare=_same_files,
    **more,
  )
