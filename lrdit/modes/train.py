"""Train a model, or resume from its newest checkpoint: `--mode=train`."""

import contextlib
import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from lrdit.config.run_config import begin_config, open_workdir
from lrdit.data import images, pipeline
from lrdit.data.source import report_classes
from lrdit.evaluation import references
from lrdit.evaluation.held_out import held_out_losses
from lrdit.experiment import Experiment, ToPixels
from lrdit.pretrained import dense_params, open_run, starting_params, teacher_params
from lrdit.runtime import cluster, parallel
from lrdit.runtime.errors import RESTART_STATUS, UserError
from lrdit.runtime.progress import make_bar
from lrdit.sampling import sampler
from lrdit.train.checkpoints import digest, directory_of
from lrdit.train.curriculum import Curriculum
from lrdit.train.monitor import (
  Profiler,
  Stopwatch,
  advice_on_non_finite,
  gradient_norm_scalars,
  window_scalars,
)
from lrdit.train.run_files import RunFiles, check_same_on_all
from lrdit.train.state import (
  NON_FINITE_QUANTITIES,
  StageProgress,
  TrainState,
  WindowMetrics,
)
from lrdit.train.stop import StopRequest

log = logging.getLogger("lrdit")

GRID_ROWS, GRID_COLUMNS = 8, 10


def train(config: ConfigDict, workdir: str, devices: parallel.Devices | None = None) -> int:
  """Run `--mode=train` on `devices`, all by default.

  Return the exit status: `RESTART_STATUS` if the run was stopped before its last step, else 0.
  """
  trainer = Trainer(config, workdir, devices or parallel.all_devices())
  num_steps = trainer.config.training.num_steps
  with contextlib.closing(trainer.files), StopRequest() as stop:
    state = trainer.initial_state()
    first_step = int(state.step)
    if cluster.is_first():
      begin_config(trainer.workdir, trainer.config, first_step)
    trainer.files.begin()
    trainer.prepare_quality()
    if first_step == 0 and config.init.from_:
      trainer.report_start(state)
    if num_steps == 0:  # trained parameters were read, and a replicated state would double them
      trainer.files.finish_saves()
      log.info("the checkpoint of step %d is under %s", first_step, directory_of(workdir))
      return 0
    state = parallel.replicate(state, trainer.devices)
    state, step = run_steps(trainer, state, first_step, stop)
    if step not in (first_step, num_steps):
      trainer.files.save(state)
    trainer.files.finish_saves()
    if step < num_steps:
      log.info("stopped by %s at step %d; the same command resumes", stop.signal_name, step)
      return RESTART_STATUS
    log.info("trained %d steps; checkpoints are under %s", step, directory_of(workdir))
    number, count = 1 + int(parallel.read(state.stage.number)), len(trainer.curriculum.stages)
    if number < count:
      text = (
        "training ended in stage %d/%d of the curriculum: raise config.training.num_steps to "
        "continue, or lower config.curriculum.patience in a new run"
      )
      log.warning(text, number, count)
    return 0


def run_steps(
  trainer: "Trainer", state: TrainState, first_step: int, stop: StopRequest
) -> tuple[TrainState, int]:
  """Train until the last step or a request to stop; return state and step.

  A step is logged while the next one runs, unless something needs its state.
  """
  step, last = first_step, trainer.config.training.num_steps
  batches = trainer.batches(range(step, last))
  on_devices = parallel.prefetch(batches, trainer.devices)
  profiler = Profiler(trainer.config.training.profile_steps, trainer.workdir / "profile")
  watch, pending = Stopwatch(), None
  stage, train_step = trainer.enter_stage(state)
  bar = make_bar(last, step, "step")
  with contextlib.closing(batches), contextlib.closing(profiler), bar:
    while step < last and not stop.is_due():
      profiler.before(step + 1, state, watch)
      batch = next(on_devices)
      state, window = train_step(state, batch, trainer.key)
      step += 1
      if pending:
        trainer.log_step(pending, watch, bar)
      watch.tick()
      due = due_after(trainer.config, step)
      pending = FinishedStep(step, stage, window, due, batch if "norms" in due else None)
      profiler.after(step, state, watch)
      if pending.due - {"log"}:  # reads the state, which the next step donates
        trainer.finish_step(pending, state, watch, bar)
        pending = None
      bar.update()
      if trainer.has_left_stage(stage, state, step):
        watch.pause()
        stage, train_step = trainer.enter_stage(state)
    if pending:
      trainer.log_step(pending, watch, bar)
  return state, step


@dataclasses.dataclass(frozen=True)
class FinishedStep:
  """A dispatched step."""

  step: int  # updates applied
  stage: int  # the step's stage of the curriculum
  window: WindowMetrics  # the step's second output
  due: set[str]  # work after the step, from `due_after`
  batch: Any  # the step's, if its gradient norms are due


def due_after(config: ConfigDict, step: int) -> set[str]:
  """Return the work that is due after `step` updates: the keys of `every`."""
  training = config.training
  every = {
    "log": training.log_every_steps,
    "eval": training.eval_every_steps,
    "norms": training.gradient_norms_every_steps,
    "metrics": training.metrics_every_steps,
    "grid": training.sample_every_steps,
    "save": config.checkpoint.every_steps,
  }
  is_last = step == training.num_steps
  return {name for name, steps in every.items() if steps and (step % steps == 0 or is_last)}


class Trainer:
  """One run's compiled steps, data and files; its `config` has the number of steps."""

  def __init__(self, config: ConfigDict, workdir: str, devices: parallel.Devices):
    """Build everything but the state, with all checks before the first file is written."""
    check_same_on_all("config", config.to_dict())
    self.workdir, self.devices = pathlib.Path(workdir), devices
    self.experiment, self.source = open_run(config)
    self.config = config = self.experiment.config
    self.curriculum = self.experiment.curriculum
    warn_of_too_few_steps(self.curriculum, config.training.num_steps)
    self.eval_source = self.experiment.source("eval")
    self.quality: Quality | None = None
    self.grids = Grids(self.experiment, devices, self.source.fingerprint.get("vae", ""))
    self.slots = parallel.batch_slots(config.training.batch_size, devices)
    self.key = jax.random.key(config.seed)
    self.eval_step = self.experiment.eval_step(devices)
    self.norm_step = functools.cache(
      functools.partial(self.experiment.gradient_norms, self.devices)
    )
    fingerprint = {"train": self.source.fingerprint, "eval": self.eval_source.fingerprint}
    self.teacher_params = None  # replicated; of distillation
    if config.init.distillation:
      teacher = teacher_params(self.experiment)
      fingerprint["teacher"] = {"digest": digest(teacher)}
      self.teacher_params = parallel.replicate(teacher, devices)
    check_same_on_all("data", fingerprint)
    if cluster.is_first():
      open_workdir(workdir, config, create=True)
    self.files = RunFiles(config, workdir, fingerprint)
    report_classes(self.source, config.data.num_classes)

  def prepare_quality(self) -> None:
    """Prepare the metrics of samples, if any are asked for, in the first process.

    This can train a classifier and reads real images.
    """
    if self.config.training.metrics_every_steps and cluster.is_first():
      self.quality = Quality(self.experiment, self.devices, self.workdir, self.grids.to_pixels)

  def initial_state(self) -> TrainState:
    """Return the first process's newest checkpoint, or a fresh state, on the host."""
    fresh = self.experiment.fresh_state
    template = jax.eval_shape(fresh, self.experiment.params_template)
    window = WindowMetrics.empty(self.curriculum.num_groups, [*template.window.extra])
    template = template.replace(window=window, stage=StageProgress.begin(0, 0))
    state = self.files.restore_state(template)
    if state is None:
      state = fresh(self._first_params())
      log.info("%d parameters", parameter_overview.count_parameters(state.params))
    else:
      log.info("resuming from the checkpoint of step %d", state.step)
    return cluster.from_first(jax.device_get(state))  # no copy on a CPU

  def _first_params(self) -> Any:
    """Return the parameters of step 0; only the first process reads trained ones."""
    if self.config.init.from_ and cluster.is_first():
      return starting_params(self.experiment, self.source)
    return self.experiment.initial_params()

  def report_start(self, state: TrainState) -> None:
    """Save the host state that a run starts from, and log its held-out loss.

    For a low-rank arm this is the loss after compression; the one before it is logged too. A run
    that begins at its checkpoint of step 0 keeps the line that it has.
    """
    self.files.save_host(state)
    if not self.config.training.eval_every_steps or self.files.has_metrics():
      return
    params = parallel.replicate(state.ema_params, self.devices)
    scalars = {"eval/loss": self._held_out_loss(self.eval_step, params)}
    if self.experiment.plan.layers:
      model = self.experiment.dense_model(self.devices)
      params = parallel.replicate(dense_params(self.experiment), self.devices)
      eval_step = self.experiment.eval_step(self.devices, model)
      scalars["init/loss"] = self._held_out_loss(eval_step, params)
      log.info("held-out loss %.5f before compression", scalars["init/loss"])
    log.info("held-out loss %.5f before the first step", scalars["eval/loss"])
    self.files.write_metrics(0, scalars)

  def _held_out_loss(self, eval_step: Callable, ema_params: Any) -> float:
    size, source = self.config.training.batch_size, self.eval_source
    return held_out_losses(eval_step, ema_params, source, self.slots, size, draws=1).mean

  def batches(self, steps: range) -> Any:
    """Return an iterator that reads the training batches of `steps` ahead."""
    config = self.config
    return pipeline.train_batches(
      self.source, config.seed, self.slots, config.training.batch_size, steps, config.data.flip
    )

  def enter_stage(self, state: TrainState) -> tuple[int, Callable]:
    """Return the stage of a replicated state and its pmapped step, not yet compiled."""
    progress = parallel.read(state.stage)
    stage, count = int(progress.number), len(self.curriculum.stages)
    if count > 1:
      low, high = self.curriculum.timesteps_of(stage)
      text = "stage %d/%d: timesteps %d to %d, from step %d"
      log.info(text, stage + 1, count, low, high - 1, progress.first_step)
    if not self.config.init.distillation:
      return stage, self.experiment.train_step(self.devices, stage)
    teacher = self.experiment.dense_model(self.devices)
    distil = self.experiment.train_step(self.devices, stage, teacher)
    return stage, lambda *arguments: distil(*arguments, self.teacher_params)

  def has_left_stage(self, stage: int, state: TrainState, step: int) -> bool:
    """Return whether the state after `step` updates is in a later stage.

    This waits for the state, but only where a stage can end.
    """
    is_last = stage == len(self.curriculum.stages) - 1
    if is_last or step % self.curriculum.check_every_steps:
      return False
    return int(parallel.read(state.stage.number)) != stage

  def log_step(
    self, finished: FinishedStep, watch: Stopwatch, bar: Any, extra: dict[str, float] | None = None
  ) -> None:
    """Wait for a step, raise a UserError if it is not finite, and write its metrics and `extra`.

    The watch keeps running, because the next step may be under way.
    """
    step, window = finished.step, parallel.read(finished.window)
    if window.non_finite:
      self._refuse_non_finite(step, NON_FINITE_QUANTITIES[int(window.non_finite) - 1])
    scalars = {}
    if "log" in finished.due:
      scalars = window_scalars(window, self.curriculum, finished.stage)
      rate = watch.take_rate()
      images_per_second = (rate or 0.0) * self.config.training.batch_size
      if rate is not None:
        scalars["train/steps_per_second"] = rate
        scalars["train/images_per_second"] = images_per_second
      text = f"{images_per_second:.0f} images/s, loss {scalars['train/loss']:.4f}"
      bar.set_postfix_str(text, refresh=False)
    if scalars := scalars | (extra or {}):
      self.files.write_metrics(step, scalars)
      numbers = "  ".join(f"{name} {value:.5g}" for name, value in scalars.items())
      log.debug("step %d/%d  %s", step, self.config.training.num_steps, numbers)

  def finish_step(
    self, finished: FinishedStep, state: TrainState, watch: Stopwatch, bar: Any
  ) -> None:
    """Log a step, and run the evaluation, grid and checkpoint that are due after it."""
    jax.block_until_ready(state)
    watch.pause()
    extra = {}
    if "eval" in finished.due:
      extra["eval/loss"] = self._held_out_loss(self.eval_step, state.ema_params)
    if "norms" in finished.due:
      extra |= self.gradient_norms(finished, state)
    if "metrics" in finished.due and self.quality:
      extra |= self.quality.measure(parallel.unreplicate(state.ema_params), finished.step)
    self.log_step(finished, watch, bar, extra)
    watch.pause()
    if "grid" in finished.due and cluster.is_first():
      pixels = self.grids.sample(parallel.unreplicate(state.ema_params), finished.step)
      self.files.write_grid(finished.step, pixels, GRID_COLUMNS)
    if "save" in finished.due:
      self.files.save(state)
    watch.resume()

  def gradient_norms(self, finished: FinishedStep, state: TrainState) -> dict[str, float]:
    """Return the gradient norms after a step, on its batch with the next step's noise."""
    key = jax.random.fold_in(self.key, finished.step)
    sums = parallel.read(self.norm_step(finished.stage)(state.params, finished.batch, key))
    return gradient_norm_scalars(sums, self.curriculum.boundaries)

  def _refuse_non_finite(self, step: int, quantity: str) -> None:
    saved = (*self.files.finish_saves(), 0, 0)[:2]
    newest, before = (int(s) for s in cluster.from_first(np.array(saved, np.int32)))
    advice = advice_on_non_finite(quantity, step, newest, before, directory_of(self.workdir))
    raise UserError(
      f"the {quantity} of step {step} is not finite, the first quantity that is not; nothing was "
      f"saved after it. {advice}"
    )


class Quality:
  """Measures samples by the config's extractors, on the devices of this process."""

  def __init__(
    self,
    experiment: Experiment,
    devices: parallel.Devices,
    workdir: pathlib.Path,
    to_pixels: ToPixels,
  ):
    """Build the sampler and the references, which are kept as `--mode=evaluate` keeps them."""
    e, own = experiment.config.evaluation, parallel.own_devices(devices)
    self._count = experiment.config.training.metrics_samples
    self._label_rule = experiment.label_rule
    batch_size = -(-experiment.config.sampling.batch_size // len(own)) * len(own)
    self._sampler, self._to_pixels = experiment.sampler(own, batch_size), to_pixels
    features = pathlib.Path(e.features_dir).expanduser() if e.features_dir else workdir / "features"
    source, self._references = experiment.image_source(e.reference_split), []
    for extractor in experiment.extractors(features):
      path = features / f"reference_{extractor.name}_{e.reference_split}.npz"
      reference = references.open_reference(path, source, extractor, e.max_features)
      self._references.append((extractor, reference))

  def measure(self, params: Any, step: int) -> dict[str, float]:
    """Return the metrics of samples of the parameters after `step` updates, by name.

    There are none, and the log warns, if a sample is not finite.
    """
    parts = map(self._to_pixels, self._sampler.sample(params, self._label_rule, self._count))
    pixels, are_finite = (np.concatenate(part) for part in zip(*parts, strict=True))
    if not are_finite.all():
      text = "%d of the %d samples of step %d are not finite: they are not measured"
      log.warning(text, np.count_nonzero(~are_finite), self._count, step)
      return {}
    pixels = images.to_rgb(pixels)
    labels = self._label_rule(np.arange(self._count)) if self._label_rule else None
    scalars = {}
    for extractor, reference in self._references:
      size = extractor.batch_size
      rows = [slice(start, start + size) for start in range(0, self._count, size)]
      batches = ((pixels[r], None if labels is None else labels[r]) for r in rows)
      scalars |= references.measure(batches, extractor, reference)
    return {f"eval/{name}": float(value) for name, value in scalars.items()}


class Grids:
  """Samples a grid of images, one class per column, on the devices of this process."""

  def __init__(self, experiment: Experiment, devices: parallel.Devices, vae_digest: str):
    """Build the sampler. A named VAE is checked even if no grid is due."""
    config = experiment.config
    self._num_classes = config.data.num_classes
    own = parallel.own_devices(devices)
    batch_size = -(-GRID_ROWS * GRID_COLUMNS // len(own)) * len(own)
    self._sampler = experiment.sampler(own, batch_size)
    training = config.training
    if training.sample_every_steps or training.metrics_every_steps or config.vae.path:
      self.to_pixels = experiment.to_pixels(devices, vae_digest)

  def sample(self, params: Any, step: int) -> np.ndarray:
    """Return (rows * columns, H, W, C) uint8 samples of the parameters after `step` updates."""

    def label_of_column(index: np.ndarray) -> np.ndarray:
      return sampler.balanced_labels(index % GRID_COLUMNS, self._num_classes)

    count, label_rule = GRID_ROWS * GRID_COLUMNS, label_of_column if self._num_classes else None
    samples = np.concatenate(list(self._sampler.sample(params, label_rule, count)))
    pixels, are_finite = self.to_pixels(samples)
    if not are_finite.all():
      text = "%d of the %d samples of step %d are not finite: they are black in the grid"
      log.warning(text, np.count_nonzero(~are_finite), count, step)
    return pixels


def warn_of_too_few_steps(curriculum: Curriculum, num_steps: int) -> None:
  """Warn of a curriculum that cannot reach all timesteps in the run's steps."""
  # A stage's first check always improves on none, so it does not count towards the patience.
  checks = (len(curriculum.stages) - 1) * (curriculum.patience + 1)
  least = checks * curriculum.check_every_steps
  text = (
    "the curriculum takes at least %d steps to reach all timesteps, and config.training.num_steps "
    "is %d: lower config.curriculum.check_every_steps or patience"
  )
  if 0 < num_steps <= least:
    log.warning(text, least, num_steps)
