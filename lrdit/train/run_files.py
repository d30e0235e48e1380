"""A run's files, which the first process alone reads and writes."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lrdit.data import images
from lrdit.runtime import cluster, parallel
from lrdit.runtime.errors import UserError
from lrdit.runtime.locks import owned
from lrdit.runtime.metric_writer import MetricWriter
from lrdit.runtime.paths import local_path
from lrdit.runtime.progress import log_to_file
from lrdit.runtime.store import as_json, changes
from lrdit.runtime.workdir import check_data, read_data
from lrdit.train.checkpoints import Checkpoints, directory_of
from lrdit.train.state import TrainState


class RunFiles:
  """Reads and writes the files of training; does nothing in processes other than the first."""

  def __init__(self, config: ConfigDict, workdir: str, fingerprint: dict[str, Any]):
    """Open the workdir for data whose splits have these fingerprints.

    Raise a UserError if it holds other data, cannot be written, or is in training already.
    """
    self._config, self._workdir = config, pathlib.Path(workdir)
    self._checkpoints: Checkpoints | None = None
    self._restored_step = -1
    self._writer: MetricWriter | None = None
    with contextlib.ExitStack() as opened:
      if cluster.is_first():
        self._workdir.mkdir(parents=True, exist_ok=True)
        opened.enter_context(owned(self._workdir, "train"))
        check_data(self._workdir, fingerprint)
        (self._workdir / "samples").mkdir(exist_ok=True)
        keep, keep_every = config.checkpoint.keep, config.checkpoint.keep_every
        self._checkpoints = Checkpoints(self._workdir, keep, keep_every)
        opened.callback(self._checkpoints.close)
        opened.enter_context(log_to_file(self._workdir / "train.log"))
      self._opened = opened.pop_all()

  def restore_state(self, template: TrainState) -> TrainState | None:
    """Return the newest intact checkpoint's host state, or None; see `Checkpoints`."""
    state = self._checkpoints.restore_state(template) if self._checkpoints else None
    self._restored_step = -1 if state is None else int(state.step)
    return state

  def begin(self) -> None:
    """Open the metrics, which continue after the restored step, or begin anew without one."""
    if self._checkpoints:
      tensorboard = self._config.training.tensorboard
      self._writer = MetricWriter(self._workdir, self._restored_step, tensorboard)
      self._opened.callback(self._writer.close)

  def has_metrics(self) -> bool:
    """Return, on every process, whether the run had lines of metrics that `begin` kept."""
    return bool(cluster.from_first(np.bool_(self._writer is not None and self._writer.has_lines)))

  def write_metrics(self, step: int, scalars: Mapping[str, float]) -> None:
    """Write a line of metrics."""
    if self._writer:
      self._writer.write(step, scalars)

  def write_grid(self, step: int, samples: np.ndarray, columns: int) -> None:
    """Write a grid of (N, H, W, C) uint8 samples."""
    if self._checkpoints:
      images.write_grid(self._workdir / "samples" / f"step_{step:08d}.png", samples, columns)

  def save(self, state: TrainState) -> None:
    """Start to save a checkpoint of a replicated state."""
    if self._checkpoints:
      self.save_host(parallel.read(state))

  def save_host(self, state: TrainState) -> None:
    """Start to save a checkpoint of a host state, whose arrays nothing may overwrite."""
    if self._checkpoints:
      if self._writer:
        self._writer.sync()
      self._checkpoints.save(state, self._config.to_dict())

  def finish_saves(self) -> list[int]:
    """Wait for pending saves; return the steps of all checkpoints, newest first."""
    if not self._checkpoints:
      return []
    self._checkpoints.wait()
    return self._checkpoints.steps()

  def close(self) -> None:
    """Wait for saves and close everything."""
    self._opened.close()


def check_same_on_all(what: str, value: dict[str, Any]) -> None:
  """Raise a UserError on every process if any has another JSON `value` than the first.

  The error calls the value `what`.
  """
  differing = changes(as_json(value), cluster.json_from_first(lambda: value))
  others = np.flatnonzero(parallel.gather_rows(np.array([bool(differing)])))
  if len(others):
    difference = "; ".join(differing) or "see its message"
    raise UserError(
      f"the {what} of process {others[0]} differs from process 0: {difference}. Start all with the "
      "same flags, on the same data"
    )


def check_run_data(workdir: pathlib.Path, split: str, fingerprint: dict[str, Any]) -> None:
  """Raise a UserError if the run was trained on another "train" or "eval" split."""
  check_same_on_all("data", fingerprint)
  if not cluster.is_first():
    return
  stored, found = read_data(workdir)[split], as_json(fingerprint)
  if stored != found:
    raise UserError(
      f"{workdir} holds a run on other data: {'; '.join(changes(found, stored))}. Name the data of "
      "that run"
    )


ALL = "all"  # every checkpoint that is kept, for `--mode=evaluate` and `analyze`


@dataclasses.dataclass(frozen=True)
class ChosenCheckpoint:
  """A checkpoint that a mode reads, and the directory of what it writes."""

  run: pathlib.Path  # workdir of the run that has it
  step: int | None  # None is the newest intact one
  output: pathlib.Path  # the workdir for the newest one, so that no other takes its place


def choose_checkpoint(workdir: str | pathlib.Path, which: str) -> ChosenCheckpoint:
  """Return the checkpoint that `which` names: "" (the newest), a step, or CHECKPOINTS/STEP.

  Another one than the newest has its results under `workdir`/steps.

  Raises:
    UserError: it names neither.
  """
  workdir = pathlib.Path(workdir)
  if not which:
    return ChosenCheckpoint(workdir, None, workdir)
  path = pathlib.Path(local_path("--checkpoint", which, 2))
  if which.isdecimal():
    path = directory_of(workdir) / which
  elif not (path.name.isdecimal() and path.parent.name == "checkpoints"):
    raise UserError(f"--checkpoint={which} is neither a step nor WORKDIR/checkpoints/STEP", 2)
  step, run = int(path.name), path.absolute().parents[1]
  name = f"{step}" if run.resolve() == workdir.resolve() else f"{run.name}_{step}"
  return ChosenCheckpoint(run, step, workdir / "steps" / name)


def restore_params(
  workdir: pathlib.Path, template: Any, weights: Sequence[str], step: int | None = None
) -> tuple[int, dict[str, Any]]:
  """Return (step, host parameters by name) of a checkpoint, on every process.

  Arguments and errors are those of `Checkpoints.restore_params`.
  """
  if cluster.is_first():
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
      found, params = checkpoints.restore_params(template, weights, step)
  else:
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template)
    found, params = 0, dict.fromkeys(weights, zeros)
  found, params = cluster.from_first((np.int32(found), params))
  return int(found), params


def kept_steps(workdir: pathlib.Path) -> list[int]:
  """Return the ascending steps of the kept checkpoints, on every process."""
  steps: list[int] = []
  if cluster.is_first():
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
      steps = checkpoints.steps()[::-1]
  count = int(cluster.from_first(np.int32(len(steps))))
  return [int(s) for s in cluster.from_first(np.resize(np.array(steps or [0], np.int32), count))]


def read_vae_digest(workdir: pathlib.Path) -> str:
  """Return the digest of the VAE that made a run's latents, on every process."""
  digest = bytes(32)
  if cluster.is_first():
    digest = bytes.fromhex(read_data(workdir)["train"]["vae"])
  return bytes(cluster.from_first(np.frombuffer(digest, np.uint8))).hex()
