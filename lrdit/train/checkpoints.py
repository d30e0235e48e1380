"""Checkpoints: saved in the background, restored only if intact.

A checkpoint `checkpoints/STEP/` holds the items `params` (raw weights), `ema_params`, `opt_state`,
`progress` (step, metric sums and curriculum stage), `config` (JSON) and `manifest` (JSON). Orbax
writes it and makes it visible once it is complete.
"""

import contextlib
import errno
import itertools
import logging
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp

from lrdit.runtime import cluster, store
from lrdit.runtime.errors import UserError
from lrdit.train import manifest
from lrdit.train.manifest import DamagedCheckpoint
from lrdit.train.state import TrainState

# The checkpoint item that holds each kind of weights.
WEIGHTS = {"raw": "params", "ema": "ema_params"}
TREES = ("params", "ema_params", "opt_state")
POSITION = ("number", "first_step")  # what a run knows of its stage and cannot do without
# Fields of `progress` that a run can reset: the sums for the next line of metrics and for the next
# check of a stage.
RESTARTABLE = re.compile(rf"\['(window|stage)'\](?!\['({'|'.join(POSITION)})'\])")
# Paths that orbax takes literally: it splits at "gs:", and tensorstore and glob interpret others.
PLAIN_PATH = re.compile(r"[\w/.,=@%+~ -]*")
PENDING = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that orbax is writing
DESCRIPTORS = pathlib.Path("/proc/self/fd")  # where Linux gives any open directory a plain path

log = logging.getLogger("lrdit")


def directory_of(workdir: str | os.PathLike) -> pathlib.Path:
  """Return the directory of a run's checkpoints."""
  return pathlib.Path(workdir) / "checkpoints"


def digest(tree: Any) -> str:
  """Return the SHA-256, in hex, of every host array with its path, dtype and shape."""
  texts = (f"{path}{kind}" for path, kind in manifest.layout(tree).items())
  return store.digest("", zip(texts, jax.tree.leaves(tree), strict=True))


def _items(state: TrainState) -> dict[str, Any]:
  fields = flax.serialization.to_state_dict(state)
  return {name: fields.pop(name) for name in TREES} | {"progress": fields}


def _merge_progress(fresh: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
  """Return the stored progress; a part of which a sum is new begins anew, all but its position.

  Its sums and its counts are of the same steps, so that a mean is right.
  """
  parts = {}
  for name, fields in fresh.items():
    part = stored.get(name)
    if isinstance(fields, dict) and not _has_all(part, fields):
      part = {key: value for key, value in (part or {}).items() if key in POSITION}
    parts[name] = part
  return manifest.merge(fresh, parts)


def _has_all(stored: Any, fresh: dict[str, Any]) -> bool:
  return manifest.layout(fresh).items() <= manifest.layout(stored).items()


def _without_empty_dicts(tree: dict[str, Any]) -> dict[str, Any]:
  return flax.traverse_util.unflatten_dict(flax.traverse_util.flatten_dict(tree))


def _first_line(error: Exception) -> str:
  return (str(error) or type(error).__name__).splitlines()[0][:200]


@contextlib.contextmanager
def _without_copies() -> Iterator[None]:
  """Let orbax write numpy arrays as they are, which halves the memory of a save."""
  handlers = ocp.type_handlers
  before = handlers.get_type_handler(np.ndarray)
  own = handlers.NumpyHandler(deepcopy_host_arrays=False)
  handlers.register_type_handler(np.ndarray, own, override=True)
  try:
    yield
  finally:
    handlers.register_type_handler(np.ndarray, before, override=True)


class Checkpoints:
  """The checkpoints of one workdir, for one process."""

  def __init__(
    self, workdir: str | os.PathLike, keep: int | None = None, keep_every: int | None = None
  ):
    """Open `workdir`/checkpoints, of which the newest `keep` survive a save.

    So do those whose step `keep_every` divides. A `keep` of None opens them read-only and leaves
    another process's pending save alone.
    """
    self.directory = directory_of(workdir).absolute()
    self._last_step: int | None = None  # the newest checkpoint that this run saved or restored
    access: dict[str, Any] = dict(read_only=True)
    if keep is not None:
      self.directory.mkdir(parents=True, exist_ok=True)
      access = dict(max_to_keep=keep, keep_period=keep_every, cleanup_tmp_directories=True)
      access["async_options"] = ocp.AsyncOptions(post_finalization_callback=self._sync_pending)
    # This process reads and writes alone, whatever other processes there are.
    alone = ocp.options.MultiprocessingOptions(
      primary_host=cluster.process_id(),
      active_processes={cluster.process_id()},
      barrier_sync_key_prefix=f"process_{cluster.process_id()}",
    )
    options = ocp.CheckpointManagerOptions(create=False, multiprocessing_options=alone, **access)
    self._opened = contextlib.ExitStack()
    self._manager = ocp.CheckpointManager(self._plain_path(), options=options)
    self._opened.callback(self._manager.close)

  def _plain_path(self) -> pathlib.Path:
    """Return a path to the directory that orbax and tensorstore take literally."""
    if PLAIN_PATH.fullmatch(str(self.directory)):
      return self.directory
    if not DESCRIPTORS.exists():
      raise UserError(
        f"checkpoints cannot be written under {self.directory.parent}: use another --workdir, of "
        "letters, digits and any of /.,=@%+~_-"
      )
    workdir = os.open(self.directory.parent, os.O_RDONLY | os.O_DIRECTORY)
    self._opened.callback(os.close, workdir)
    return DESCRIPTORS / str(workdir) / self.directory.name

  def steps(self) -> list[int]:
    """Return the steps of the complete checkpoints, newest first."""
    return sorted(self._manager.all_steps(), reverse=True)

  def save(self, state: TrainState, config: dict[str, Any]) -> None:
    """Start to save a host state, once pending saves are done; nothing may overwrite its arrays.

    Raise a UserError if the disk is full or not writable, or a later checkpoint is there.
    """
    step = int(state.step)
    if step == self._last_step:
      return
    items = _items(state)
    # Orbax would record dicts without arrays, such as the sums of a run without penalties.
    items["progress"] = _without_empty_dicts(items["progress"])
    arguments = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    arguments["config"] = ocp.args.JsonSave(config)
    arguments["manifest"] = ocp.args.JsonSave(manifest.make_manifest(step, items, config))
    try:
      with _without_copies():
        is_saved = self._manager.save(step, args=ocp.args.Composite(**arguments))
    except Exception as error:
      raise self._save_failed(error) from error
    if not is_saved:
      raise UserError(
        f"step {step} was not saved, as {self.directory}/{self.steps()[0]} was put there and is "
        "later: move it away, then run the same command again to resume from "
        f"{f'step {self._last_step}' if self._last_step else 'the start'}"
      )
    self._last_step = step

  def wait(self) -> None:
    """Wait until every started save is on disk; raise a UserError if one failed."""
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except Exception as error:
      raise self._save_failed(error) from error

  def _sync_pending(self) -> None:
    """Bring a checkpoint to the disk before it becomes visible and an older one is removed.

    Orbax writes its JSON without that, and a power failure within seconds would leave it empty.
    """
    for directory, _, names in os.walk(self.directory):
      if PENDING in directory:
        for name in (*names, ""):
          store.sync(pathlib.Path(directory, name))

  def _save_failed(self, error: Exception) -> UserError:
    return UserError(
      f"cannot save a checkpoint under {self.directory}: {_first_line(error)}; "
      "free space or make it writable, then run the same command again to resume from "
      f"{'step ' + str(self.steps()[0]) if self.steps() else 'the start'}"
    )

  def restore_state(self, template: TrainState) -> TrainState | None:
    """Return the newest intact state, or None if there is no checkpoint.

    Move damaged newer checkpoints to `damaged_checkpoints`, with a warning; raise a UserError if
    none is intact. The `RESTARTABLE` fields of `template` have their initial values; its other
    leaves need only shape and dtype.
    """
    step, items = self._newest_intact(_items(template), move_damaged=True)
    if step is None:
      return None
    self._last_step = step
    progress = items.pop("progress")
    del items["config"]
    return flax.serialization.from_state_dict(template, items | progress)

  def restore_params(
    self, template: Any, weights: Sequence[str], step: int | None = None
  ) -> tuple[int, dict[str, Any]]:
    """Return (step, parameters by name) of a checkpoint with all of `weights` intact.

    It is that of `step`, or else the newest intact one. `template` has the parameters' shapes;
    `weights` are some of `WEIGHTS`. Raise a UserError if there is none.
    """
    step, items = self._chosen({WEIGHTS[name]: template for name in weights}, step)
    return step, {name: items[WEIGHTS[name]] for name in weights}

  def restore_run(
    self, weights: str, step: int | None = None
  ) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Return (step, config.json, parameters) of a checkpoint, as it was saved.

    Arguments and errors are those of `restore_params`.
    """
    step, items = self._chosen({WEIGHTS[weights]: None}, step)
    return step, items["config"], items[WEIGHTS[weights]]

  def read_config(self, step: int) -> dict[str, Any]:
    """Return the config.json that a run had at a checkpoint; raise a UserError if there is none."""
    return self._chosen({}, step)[1]["config"]

  def _chosen(self, templates: dict[str, Any], step: int | None) -> tuple[int, dict[str, Any]]:
    """Return `_restore` of the checkpoint of `step`, or else of the newest intact one."""
    if step is not None:
      return step, self._intact(step, templates)
    step, items = self._newest_intact(templates, move_damaged=False)
    if step is None:
      raise UserError(
        f"no checkpoint under {self.directory}: train that run first, by --mode=train with its "
        "--config and --workdir"
      )
    return step, items

  def _intact(self, step: int, templates: dict[str, Any]) -> dict[str, Any]:
    """Return the items of the checkpoint of `step`, or raise a UserError."""
    if step not in self.steps():
      kept = ", ".join(map(str, self.steps()[::-1])) or "none"
      raise UserError(
        f"no checkpoint of step {step} under {self.directory}: the steps kept are {kept} "
        "(config.checkpoint.keep and keep_every say which)"
      )
    try:
      return self._restore(step, templates)
    except DamagedCheckpoint as damage:
      raise UserError(
        f"checkpoint {self.directory}/{step} is damaged ({damage}): use another step"
      ) from damage

  def _newest_intact(
    self, templates: dict[str, Any], move_damaged: bool
  ) -> tuple[int | None, dict[str, Any]]:
    damaged: list[int] = []
    while True:
      self._manager.reload()  # another process may have saved or removed some
      steps = self.steps()
      step = next((step for step in steps if step not in damaged), None)
      if step is None:
        break
      try:
        return step, self._restore(step, templates)
      except DamagedCheckpoint as damage:
        self._manager.reload()
        if self.steps()[:1] != steps[:1] and step not in self.steps()[:1]:
          continue  # the run continued and removed this checkpoint
        log.warning("checkpoint %s/%d is damaged (%s)", self.directory, step, damage)
        damaged.append(step)
        if move_damaged and step != steps[-1]:
          self._move_aside(step)
    if damaged:
      raise UserError(
        f"none of the checkpoints under {self.directory} is intact: restore one from a "
        "backup, or delete that directory and train that run again"
      )
    return None, {}

  def _restore(self, step: int, templates: dict[str, Any]) -> dict[str, Any]:
    """Return the config and the items that have a template.

    A template of None stands for whatever was saved.
    """
    asked = {"manifest": ocp.args.JsonRestore(), "config": ocp.args.JsonRestore()}
    stored = self._read(step, **asked)
    arrays = manifest.check_manifest(step, **stored)
    arguments = {}
    for name, tree in templates.items():
      if name not in arrays:
        raise DamagedCheckpoint(f"its manifest has no {name}")
      layout = arrays[name]["layout"]
      if tree is not None:
        self._check_layout(step, name, layout, manifest.layout(tree))
      if tree is None or name == "progress":  # its fields may differ
        tree = manifest.zeros(layout)
      host = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), tree)
      arguments[name] = ocp.args.StandardRestore(host)  # as numpy
    restored = self._read(step, **arguments) if arguments else {}
    for name in templates:
      expected, found = arrays[name]["crc32"], manifest.checksums(restored[name])
      changed = [path for path in expected if expected[path] != found[path]]
      if changed:
        raise DamagedCheckpoint(f"contents of {name}{changed[0]} changed")
    if "progress" in restored:
      restored["progress"] = _merge_progress(templates["progress"], restored["progress"])
    return restored | {"config": stored["config"]}

  def _check_layout(
    self, step: int, name: str, stored: dict[str, str], asked: dict[str, str]
  ) -> None:
    """Log differences in restartable or surplus progress, and refuse all others."""
    for path in sorted(stored.keys() | asked.keys()):
      there, here = stored.get(path, "missing"), asked.get(path, "missing")
      if there == here:
        continue
      difference = f"{name}{path} is {there} there and {here} here"
      is_surplus = path not in asked
      restartable = RESTARTABLE.match(path)
      if not (name == "progress" and (is_surplus or restartable)):
        raise UserError(f"checkpoint {self.directory}/{step} is of another model: {difference}")
      result = "it is left out" if is_surplus else f"the {restartable[1]} begins anew"
      log.info("checkpoint %s/%d: %s: %s", self.directory, step, difference, result)

  def _read(self, step: int, **items: Any) -> dict[str, Any]:
    try:
      restored = self._manager.restore(step, args=ocp.args.Composite(**items))
      return {name: restored[name] for name in items}
    except FileNotFoundError as error:
      raise DamagedCheckpoint(f"a file is missing: {error.filename}") from error
    except (OSError, MemoryError) as error:
      if getattr(error, "errno", None) != errno.ESTALE:  # removed by another host
        raise  # such as too many open files: the data may be intact
      raise DamagedCheckpoint("it was removed") from error
    except Exception as error:  # orbax and tensorstore raise many kinds
      raise DamagedCheckpoint(_first_line(error)) from error

  def _move_aside(self, step: int) -> None:
    target = self.directory.parent / "damaged_checkpoints"
    target.mkdir(exist_ok=True)
    names = (f"{step}" if i == 0 else f"{step}.{i}" for i in itertools.count())
    free = next(target / name for name in names if not (target / name).exists())
    try:
      os.replace(self.directory / str(step), free)
    except OSError as error:
      if error.errno != errno.EXDEV:
        raise
      # `checkpoints` links to another disk, so keep the damaged one there.
      free = self.directory / f"damaged_{free.name}"
      os.replace(self.directory / str(step), free)
    log.info("the damaged checkpoint is kept as %s", free)
    self._manager.reload()

  def close(self) -> None:
    """Wait for saves and release orbax's threads."""
    self._opened.close()
