"""Trains a model, or goes on training it from its newest checkpoint."""

import contextlib
import dataclasses
import itertools
import logging
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from lrdit.config.run_config import begin_config, open_workdir
from lrdit.data import pipeline
from lrdit.data.source import report_classes
from lrdit.evaluation.held_out import held_out_losses
from lrdit.experiment import Experiment
from lrdit.runtime import cluster, parallel
from lrdit.runtime.errors import UserError
from lrdit.runtime.progress import make_bar
from lrdit.sampling import sampler
from lrdit.train.checkpoints import directory_of
from lrdit.train.run_files import FirstProcessFiles, RunFiles, check_same
from lrdit.train.train_state import (
  NON_FINITE_QUANTITIES,
  StageProgress,
  TrainState,
  WindowMetrics,
  create_train_state,
)

log = logging.getLogger("lrdit")

GRID_ROWS, GRID_COLUMNS = 8, 10


class StopRequest:
  """Turns the first SIGTERM or SIGINT of a lone process into a flag; a second one kills."""

  def __init__(self):
    self.signal_name: str | None = None
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> "StopRequest":
    for number in (signal.SIGTERM, signal.SIGINT):
      self._previous[number] = signal.signal(number, self._on_signal)
    return self

  def _on_signal(self, number: int, _frame: Any) -> None:
    self.signal_name = signal.Signals(number).name
    signal.signal(number, signal.SIG_DFL)

  def __exit__(self, *_exception: Any) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def is_due(self) -> bool:
    """Whether to stop."""
    return self.signal_name is not None


class SharedStopRequest:
  """SIGTERM in any of several processes, which all learn of at the same step.

  jax watches for the signal in all of them. SIGINT ends a process, and with it the others.
  """

  def __init__(self):
    self.signal_name: str | None = None
    self._steps_asked = 0  # jax counts a start's own steps, not the run's

  def __enter__(self) -> "SharedStopRequest":
    return self

  def __exit__(self, *_exception: Any) -> None:
    pass

  def is_due(self) -> bool:
    """Whether to stop; to be asked before every step."""
    if cluster.is_preempted(self._steps_asked):
      self.signal_name = "SIGTERM"
    self._steps_asked += 1
    return self.signal_name is not None


class Stopwatch:
  """Steps per second of training alone: `pause` keeps other work out."""

  def __init__(self):
    self.steps, self.seconds, self._since = 0, 0.0, None

  def tick(self) -> None:
    """A step was dispatched; the first one, which compiles, only starts time."""
    if self._since is None:
      self._since = time.perf_counter()
    else:
      self.steps += 1

  def pause(self) -> None:
    """The steps counted are done, and something else begins."""
    if self._since is not None:
      self.seconds += time.perf_counter() - self._since
      self._since = None

  def resume(self) -> None:
    """Training goes on."""
    self._since = time.perf_counter()


class Trainer:
  """One run's compiled steps, data and files."""

  def __init__(self, config: ConfigDict, workdir: str, devices: parallel.Devices):
    """Builds what does not depend on the state, checking before it writes.

    Args:
      config: resolved.
      workdir: the run's directory.
      devices: devices to train on.
    """
    check_same("config", config.to_dict())
    self.config, self.workdir, self.devices = config, pathlib.Path(workdir), devices
    self.experiment = Experiment(config)
    self.curriculum = self.experiment.curriculum
    self._warn_of_too_few_steps()
    self.source = self.experiment.source("train")
    self.eval_source = self.experiment.source("eval")
    self.optimizer = self.experiment.optimizer
    own = parallel.own_devices(devices)  # the first process draws grids alone
    grid_batch = -(-GRID_ROWS * GRID_COLUMNS // len(own)) * len(own)
    self.grid_sampler = self.experiment.sampler(own, grid_batch)
    self.to_pixels = self._make_to_pixels()
    self.slots = parallel.batch_slots(config.training.batch_size, devices)
    self.key = jax.random.key(config.seed)
    self.eval_step = self.experiment.eval_step(devices)
    fingerprint = {"train": self.source.fingerprint, "eval": self.eval_source.fingerprint}
    check_same("data", fingerprint)
    self.files = RunFiles()
    if cluster.is_first():
      open_workdir(workdir, config, create=True)
      self.files = FirstProcessFiles(config, workdir, fingerprint)
    report_classes(self.source, config.data.num_classes)

  def _make_to_pixels(self) -> Any:
    """What turns samples into pixels: for grids, and to check a VAE that is named."""
    if not (self.config.training.sample_every_steps or self.config.vae.path):
      return None
    vae_digest = self.source.fingerprint.get("vae", "")
    return self.experiment.to_pixels(self.devices, vae_digest)

  def initial_state(self) -> TrainState:
    """The newest checkpoint's state, on the host, or a fresh one; the first process's."""

    def fresh() -> TrainState:
      params = self.experiment.init_params()
      return create_train_state(params, self.optimizer, self.curriculum.num_groups)

    template = jax.eval_shape(fresh).replace(
      window=WindowMetrics.empty(self.curriculum.num_groups), stage=StageProgress.begin(0, 0)
    )
    state = self.files.restore_state(template)
    if state is None:
      state = fresh()
      log.info("%d parameters", parameter_overview.count_parameters(state.params))
    return cluster.from_first(parallel.to_host(state))

  def enter_stage(self, state: TrainState) -> tuple[int, Callable]:
    """The stage of a replicated state and its pmapped step, which its first call compiles."""
    progress = parallel.read(state.stage)
    stage, count = int(progress.number), len(self.curriculum.stages)
    if count > 1:
      low, high = self.curriculum.timesteps_of(stage)
      text = "stage %d/%d: timesteps %d to %d, from step %d"
      log.info(text, stage + 1, count, low, high - 1, progress.first_step)
    return stage, self.experiment.train_step(self.devices, stage)

  def has_left_stage(self, stage: int, state: TrainState, step: int) -> bool:
    """Whether the state after `step` updates is of a later stage.

    Waits for the state where a stage can have ended, and only there.
    """
    is_last = stage == len(self.curriculum.stages) - 1
    if is_last or step % self.curriculum.check_every_steps:
      return False
    return int(parallel.read(state.stage.number)) != stage

  def _warn_of_too_few_steps(self) -> None:
    """Tells of a curriculum that cannot come to all timesteps in the run's steps."""
    c, num_steps = self.curriculum, self.config.training.num_steps
    # A stage's first check is always better than none, so it takes one more.
    least = (len(c.stages) - 1) * (c.patience + 1) * c.check_every_steps
    if least >= num_steps:
      log.warning(
        "the curriculum takes at least %d steps to come to all timesteps, and config.training."
        "num_steps is %d: lower config.curriculum.check_every_steps or patience",
        least,
        num_steps,
      )

  def warn_of_stages_left(self, state: TrainState) -> None:
    """Tells of a finished run whose curriculum did not come to all timesteps."""
    stage, count = int(parallel.read(state.stage.number)) + 1, len(self.curriculum.stages)
    if stage < count:
      log.warning(
        "training ended in stage %d/%d of the curriculum: go on with more "
        "config.training.num_steps, or begin again with less config.curriculum.patience",
        stage,
        count,
      )

  def refuse_non_finite(self, step: int, non_finite: int) -> None:
    """Stops the run if the numbers of a step are bad.

    Args:
      step: updates applied.
      non_finite: as in `WindowMetrics`.
    """
    if not non_finite:
      return
    saved = (*self.files.finish_saves(), 0, 0)[:2]
    newest, before = (int(s) for s in cluster.from_first(np.array(saved, np.int32)))
    quantity = NON_FINITE_QUANTITIES[non_finite - 1]
    mend = how_to_go_on(quantity, step, newest, before, directory_of(self.workdir))
    raise UserError(
      f"the {quantity} of step {step} is not finite, the first quantity that is not; nothing was "
      f"saved after it. {mend}"
    )

  def batches(self, steps: range) -> Iterator[dict[str, np.ndarray]]:
    """The training batches of some steps, read ahead."""
    config = self.config
    return pipeline.train_batches(
      self.source, config.seed, self.slots, config.training.batch_size, steps, config.data.flip
    )

  def eval_loss(self, state: TrainState) -> float:
    """Mean held-out loss of the averaged weights; the same draws every time."""
    batch_size = self.config.training.batch_size
    losses = held_out_losses(
      self.eval_step, state.ema_params, self.eval_source, self.slots, batch_size, draws=1
    )
    return losses.mean

  def write_grid(self, state: TrainState, step: int) -> None:
    """A grid of samples of the averaged weights, one class a column."""
    if not cluster.is_first():
      return
    count, classes = GRID_ROWS * GRID_COLUMNS, self.config.data.num_classes

    def label_of_column(index: np.ndarray) -> np.ndarray:
      return sampler.balanced_labels(index % GRID_COLUMNS, classes)

    params = parallel.unreplicate(state.ema_params)
    label_rule = label_of_column if classes else None
    batch = np.concatenate(list(self.grid_sampler.sample(params, label_rule, count)))
    pixels, are_finite = self.to_pixels(batch)
    if not are_finite.all():
      text = "%d of the %d samples of step %d are not finite: they are black in the grid"
      log.warning(text, np.count_nonzero(~are_finite), count, step)
    self.files.write_grid(step, pixels, GRID_COLUMNS)

  def window_scalars(self, window: WindowMetrics, stage: int, watch: Stopwatch) -> dict[str, float]:
    """Means since the last line, and the speed where a step was timed."""
    count = int(window.count)
    scalars = {
      "train/loss": float(window.loss) / count,
      "train/grad_norm": float(window.grad_norm) / count,
      "train/learning_rate": float(window.learning_rate),
    }
    if len(self.curriculum.stages) > 1:
      scalars["train/stage"] = stage + 1
    groups = itertools.pairwise(self.curriculum.boundaries)
    for (low, high), total, n in zip(groups, window.group_loss, window.group_count, strict=True):
      if n:
        scalars[f"train/loss_t{low:04d}-{high - 1:04d}"] = float(total) / int(n)
    if watch.steps:
      rate = watch.steps / watch.seconds
      scalars["train/steps_per_second"] = rate
      scalars["train/images_per_second"] = rate * self.config.training.batch_size
    return scalars


def how_to_go_on(
  quantity: str, step: int, newest: int, before: int, directory: pathlib.Path
) -> str:
  """Return what can be done about a quantity that is not finite.

  Args:
    quantity: one of `NON_FINITE_QUANTITIES`.
    step: updates applied.
    newest, before: steps of the two last checkpoints; 0 where there is none.
    directory: of the checkpoints.
  """
  lower = "ower config.optimizer.learning_rate or raise config.optimizer.warmup_steps"
  # What a step computes before its update depends on the checkpoint alone.
  if newest and step == newest + 1 and quantity in ("loss", "gradient"):
    goes_on = f"step {before}" if before else "the start"
    return (
      f"The parameters of the checkpoint of step {newest} are spoilt already: delete "
      f"{directory / str(newest)}, l{lower}, and run the command again, which goes on from "
      f"{goes_on}"
    )
  last_good = f"The last good checkpoint is step {newest}. " if newest else ""
  if quantity == "batch":
    return (
      f"{last_good}The data is damaged: where it is latents, run the command that made them, "
      "--mode=encode, again, which says what has changed"
    )
  goes_on = f", which goes on from step {newest}" if newest else ""
  return f"{last_good}L{lower}, and run the command again{goes_on}"


def due_after(config: ConfigDict, step: int) -> set[str]:
  """What of "log", "eval", "grid" and "save" is to be done after `step` updates."""
  training = config.training
  every = {
    "log": training.log_every_steps,
    "eval": training.eval_every_steps,
    "grid": training.sample_every_steps,
    "save": config.checkpoint.every_steps,
  }
  is_last = step == training.num_steps
  return {name for name, steps in every.items() if steps and (step % steps == 0 or is_last)}


@dataclasses.dataclass(frozen=True)
class Finished:
  """What is reported of a step once it is done.

  Attributes:
    step: updates applied.
    stage: of the curriculum, the step's.
    window: the step's second output.
    due: from `due_after`.
  """

  step: int
  stage: int
  window: WindowMetrics
  due: set[str]

  def needs_state(self) -> bool:
    """Whether something is due that the next step would donate the state of."""
    return bool(self.due - {"log"})


def report(
  trainer: Trainer, finished: Finished, watch: Stopwatch, bar: Any, figures: dict[str, float]
) -> None:
  """Waits for a step, stops if its numbers are bad, and writes its line of metrics.

  Args:
    trainer: the run's.
    finished: the step.
    watch: paused, or running while the next step is under way.
    bar: of the progress.
    figures: what else the line has.
  """
  window = parallel.read(finished.window)
  trainer.refuse_non_finite(finished.step, int(window.non_finite))
  scalars = {}
  if "log" in finished.due:
    watch.pause()
    scalars = trainer.window_scalars(window, finished.stage, watch)
    watch.steps, watch.seconds = 0, 0.0
    watch.resume()
    speed = scalars.get("train/images_per_second", 0.0)
    bar.set_postfix_str(f"{speed:.0f} images/s, loss {scalars['train/loss']:.4f}", refresh=False)
  if scalars := scalars | figures:
    trainer.files.write_metrics(finished.step, scalars)
    numbers = "  ".join(f"{name} {value:.5g}" for name, value in scalars.items())
    last = trainer.config.training.num_steps
    log.debug("step %d/%d  %s", finished.step, last, numbers)


def report_with_state(
  trainer: Trainer, finished: Finished, state: TrainState, watch: Stopwatch, bar: Any
) -> None:
  """As `report`, and the held-out loss, grid and checkpoint that are due."""
  jax.block_until_ready(state)
  watch.pause()
  figures = {"eval/loss": trainer.eval_loss(state)} if "eval" in finished.due else {}
  report(trainer, finished, watch, bar, figures)
  watch.pause()
  if "grid" in finished.due:
    trainer.write_grid(state, finished.step)
  if "save" in finished.due:
    trainer.files.save(state)
  watch.resume()


def run_steps(
  trainer: Trainer, state: TrainState, first_step: int, stop: StopRequest | SharedStopRequest
) -> tuple[TrainState, int]:
  """Trains until the last step or a request to stop; returns state and step.

  A step is reported while the next one is under way, unless its state is needed.
  """
  step, last = first_step, trainer.config.training.num_steps
  batches = trainer.batches(range(step, last))
  on_devices = parallel.prefetch(batches, trainer.devices)
  watch, before = Stopwatch(), None
  stage, train_step = trainer.enter_stage(state)
  with contextlib.closing(batches), make_bar(last, step, "step") as bar:
    while step < last and not stop.is_due():
      state, window = train_step(state, next(on_devices), trainer.key)
      step += 1
      if before:
        report(trainer, before, watch, bar, {})
      watch.tick()
      before = Finished(step, stage, window, due_after(trainer.config, step))
      if before.needs_state():
        report_with_state(trainer, before, state, watch, bar)
        before = None
      bar.update()
      if trainer.has_left_stage(stage, state, step):
        watch.pause()
        stage, train_step = trainer.enter_stage(state)
    if before:
      report(trainer, before, watch, bar, {})
  return state, step


def train(config: ConfigDict, workdir: str, devices: parallel.Devices | None = None) -> None:
  """Runs `--mode=train`: see the README's mode table for what it writes.

  Args:
    config: resolved.
    workdir: the run's directory.
    devices: devices to train on; all by default.

  Raises:
    UserError: whatever the user can mend.
  """
  trainer = Trainer(config, workdir, devices or parallel.all_devices())
  try:
    with StopRequest() if cluster.num_processes() == 1 else SharedStopRequest() as stop:
      state = trainer.initial_state()
      first_step = int(state.step)
      if cluster.is_first():
        begin_config(trainer.workdir, config, first_step)
      trainer.files.begin(first_step)
      state = parallel.replicate(state, trainer.devices)
      state, step = run_steps(trainer, state, first_step, stop)
      if step not in (first_step, config.training.num_steps):
        trainer.files.save(state)
      trainer.files.finish_saves()
    if step < config.training.num_steps:
      log.info("stopped by %s at step %d; the same command resumes", stop.signal_name, step)
    else:
      log.info("trained %d steps; checkpoints are under %s", step, directory_of(trainer.workdir))
      trainer.warn_of_stages_left(state)
  finally:
    trainer.files.close()
