"""Checkpoints: saving in the background, restoring only what proves intact.

A checkpoint `checkpoints/STEP/` holds the items `params` (raw weights),
`ema_params`, `opt_state`, `progress` (step, metric sums and curriculum stage),
`config` (JSON) and `manifest` (JSON: the step, dtype, shape and CRC-32 of every array, and a
CRC-32 of all that), written by orbax, which makes it visible only once it is complete.
"""

import contextlib
import errno
import itertools
import json
import logging
import os
import pathlib
import re
import zlib
from collections.abc import Sequence
from typing import Any

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp

from lrdit.runtime import cluster, store
from lrdit.runtime.errors import UserError
from lrdit.train.train_state import TrainState

# The moving average and what it is of, by the names that figures bear.
WEIGHTS = {"raw": "params", "ema": "ema_params"}
ARRAY_ITEMS = ("params", "ema_params", "opt_state", "progress")
# Fields of `progress` that a run can begin anew: sums for the next line of metrics and the next
# check of a stage. The others, and all other items, are the run.
ACCOMPANYING = re.compile(r"\['(window|stage)'\](?!\['(number|first_step)'\])")
# Directory names that orbax takes as they are: it splits paths at "gs:", and tensorstore and
# glob read others of their own.
PLAIN_PATH = re.compile(r"[\w/.,=@%+~ -]*")
DESCRIPTORS = pathlib.Path("/proc/self/fd")  # by which Linux gives any directory a plain path

log = logging.getLogger("lrdit")


def directory_of(workdir: str | os.PathLike) -> pathlib.Path:
  """Return where a run's checkpoints are."""
  return pathlib.Path(workdir) / "checkpoints"


class DamagedCheckpoint(Exception):
  """A checkpoint that cannot be read or whose contents changed."""


def _progress(state: TrainState) -> dict[str, Any]:
  """All but the large trees, by the field's name."""
  return {"step": state.step, "window": state.window, "stage": state.stage}


def _items(state: TrainState) -> dict[str, Any]:
  """The array items of a host state, as trees of plain dicts."""
  trees = {
    "params": state.params,
    "ema_params": state.ema_params,
    "opt_state": state.opt_state,
    "progress": _progress(state),
  }
  return {name: flax.serialization.to_state_dict(tree) for name, tree in trees.items()}


def _layout(tree: Any) -> dict[str, str]:
  """Dtype and shape of every leaf by its path, for arrays and templates."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _checksums(tree: Any) -> dict[str, int]:
  """CRC-32 of every array by its path."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path): zlib.crc32(np.ascontiguousarray(leaf)) for path, leaf in leaves
  }


def digest(tree: Any) -> str:
  """Return the SHA-256, in hex, of every host array with its path, dtype and shape."""
  texts = (f"{path}{layout}" for path, layout in _layout(tree).items())
  return store.digest("", zip(texts, jax.tree.leaves(tree), strict=True))


def _crc32_of_json(value: Any) -> int:
  return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _manifest(step: int, items: dict[str, Any]) -> dict[str, Any]:
  """Return what a checkpoint holds, with a checksum of that."""
  arrays = {
    name: {"layout": _layout(tree), "crc32": _checksums(tree)} for name, tree in items.items()
  }
  contents = {"step": step, "items": arrays}
  return {"contents": contents, "crc32": _crc32_of_json(contents)}


def _check_manifest(step: int, manifest: dict[str, Any]) -> dict[str, Any]:
  """Return the items of a manifest.

  Raises:
    DamagedCheckpoint: it is not as it was written, or of another step.
  """
  if isinstance(manifest, dict) and set(manifest) == set(ARRAY_ITEMS):
    return manifest  # of a version without a checksum
  contents = manifest.get("contents") if isinstance(manifest, dict) else None
  if contents is None or manifest.get("crc32") != _crc32_of_json(contents):
    raise DamagedCheckpoint("its manifest changed")
  if contents["step"] != step:
    raise DamagedCheckpoint(
      f"it holds step {contents['step']}: give the directory that name to use it"
    )
  return contents["items"]


def _zeros(layout: dict[str, str]) -> Any:
  """Return a numpy tree of plain dicts by the layout of its leaves."""
  flat = {}
  for path, leaf in layout.items():
    dtype, shape = re.fullmatch(r"(\w+)\[(.*)\]", leaf).groups()
    keys = tuple(re.findall(r"\['([^']*)'\]", path))
    flat[keys] = np.zeros([int(size) for size in shape.split(",") if size], dtype)
  return flax.traverse_util.unflatten_dict(flat)


def _merge(fresh: Any, stored: Any) -> Any:
  """Return the stored leaves that `fresh` has in the same layout, and its own in place of others.

  Args:
    fresh, stored: trees of plain dicts.
  """
  if isinstance(fresh, dict):
    stored = stored if isinstance(stored, dict) else {}
    return {name: _merge(value, stored.get(name)) for name, value in fresh.items()}
  same = stored is not None and _layout(fresh) == _layout(stored)
  return stored if same else fresh


def _first_line(error: Exception) -> str:
  return (str(error) or type(error).__name__).splitlines()[0][:200]


def _host_zeros(tree: Any) -> Any:
  """A numpy tree of the same shapes: orbax restores numpy where it finds it."""
  return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)


class Checkpoints:
  """The checkpoints of one workdir, for one process."""

  def __init__(self, workdir: str | os.PathLike, keep: int | None = None):
    """Opens `workdir`/checkpoints.

    Args:
      workdir: the run's directory.
      keep: how many of the newest survive a save; None opens for reading only,
        which leaves a save that another process has under way alone.
    """
    self.directory = directory_of(workdir).absolute()
    self._last_step = 0  # of the newest checkpoint of this run
    # Whatever other processes there are, this one reads and writes alone.
    alone = ocp.options.MultiprocessingOptions(
      primary_host=cluster.process_id(),
      active_processes={cluster.process_id()},
      barrier_sync_key_prefix=f"process_{cluster.process_id()}",
    )
    if keep is None:
      options = ocp.CheckpointManagerOptions(
        read_only=True, create=False, multiprocessing_options=alone
      )
    else:
      self.directory.mkdir(parents=True, exist_ok=True)
      options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        enable_async_checkpointing=True,
        cleanup_tmp_directories=True,
        create=False,
        multiprocessing_options=alone,
      )
    self._opened = contextlib.ExitStack()
    self._manager = ocp.CheckpointManager(self._plain_path(), options=options)
    self._opened.callback(self._manager.close)

  def _plain_path(self) -> pathlib.Path:
    """Return a path of the directory that orbax and tensorstore take as it is.

    Raises:
      UserError: it has none on this system.
    """
    if PLAIN_PATH.fullmatch(str(self.directory)):
      return self.directory
    workdir = os.open(self.directory.parent, os.O_RDONLY | os.O_DIRECTORY)
    self._opened.callback(os.close, workdir)
    if not DESCRIPTORS.exists():
      self._opened.close()
      raise UserError(
        f"checkpoints cannot be written under {self.directory.parent}: use another --workdir, of "
        "letters, digits and any of /.,=@%+~_-"
      )
    return DESCRIPTORS / str(workdir) / self.directory.name

  def steps(self) -> list[int]:
    """Steps of the complete checkpoints, newest first."""
    return sorted(self._manager.all_steps(), reverse=True)

  def save(self, state: TrainState, config: dict[str, Any]) -> None:
    """Starts saving a host state; a save still under way is waited for.

    Args:
      state: numpy arrays that nothing will overwrite.
      config: the resolved config.

    Raises:
      UserError: the disk is full or not writable, or a later checkpoint is there.
    """
    step = int(state.step)
    if step == self._last_step:
      return  # it is there
    items = _items(state)
    arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    try:
      is_saved = self._manager.save(
        step,
        args=ocp.args.Composite(
          **arrays,
          config=ocp.args.JsonSave(config),
          manifest=ocp.args.JsonSave(_manifest(step, items)),
        ),
      )
    except Exception as error:
      raise self._save_failed(error) from error
    if not is_saved:
      raise UserError(
        f"step {step} was not saved, as {self.directory}/{self.steps()[0]} was put there and is "
        "later: move it away, then run the same command again to go on from "
        f"{f'step {self._last_step}' if self._last_step else 'the start'}"
      )
    self._last_step = step

  def wait(self) -> None:
    """Returns once every started save is on disk.

    Raises:
      UserError: a save failed.
    """
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except Exception as error:
      raise self._save_failed(error) from error

  def _save_failed(self, error: Exception) -> UserError:
    return UserError(
      f"cannot save a checkpoint under {self.directory}: {_first_line(error)}; "
      "free space or make it writable, then run the same command again to go on from "
      f"{'step ' + str(self.steps()[0]) if self.steps() else 'the start'}"
    )

  def restore_state(self, template: TrainState) -> TrainState | None:
    """The newest intact state, or None if there is no checkpoint.

    Damaged newer checkpoints are moved to `damaged_checkpoints` with a warning.

    Args:
      template: a state of the run's shapes, whose `ACCOMPANYING` fields are as they begin.

    Raises:
      UserError: there are checkpoints, but none is intact.
    """
    step, items = self._newest_intact(_items(template), move_damaged=True)
    if step is None:
      return None
    self._last_step = step
    progress = flax.serialization.from_state_dict(_progress(template), items["progress"])
    return TrainState(
      **progress,
      **{
        name: flax.serialization.from_state_dict(getattr(template, name), items[name])
        for name in ("params", "ema_params", "opt_state")
      },
    )

  def restore_params(self, template: Any, weights: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """(step, parameters by name) of the newest checkpoint that is intact in all of them.

    Args:
      template: parameters of the model's shapes.
      weights: some of `WEIGHTS`.

    Raises:
      UserError: there is no checkpoint, or none is intact.
    """
    templates = {WEIGHTS[name]: template for name in weights}
    step, items = self._newest_intact(templates, move_damaged=False)
    if step is None:
      raise UserError(
        f"no checkpoint under {self.directory}: train first, with the same --config and "
        "--workdir and --mode=train"
      )
    return step, {name: items[WEIGHTS[name]] for name in weights}

  def _newest_intact(
    self, templates: dict[str, Any], move_damaged: bool
  ) -> tuple[int | None, dict[str, Any]]:
    damaged: list[int] = []
    while True:
      self._manager.reload()  # another process may have saved and removed some
      steps = self.steps()
      step = next((step for step in steps if step not in damaged), None)
      if step is None:
        break
      try:
        return step, self._restore(step, templates)
      except DamagedCheckpoint as damage:
        self._manager.reload()
        if self.steps()[:1] != steps[:1] and step not in self.steps()[:1]:
          continue  # the run has gone on, and removes what it no longer keeps
        log.warning("checkpoint %s/%d is damaged (%s)", self.directory, step, damage)
        damaged.append(step)
        if move_damaged and step != steps[-1]:
          self._move_aside(step)
    if damaged:
      raise UserError(
        f"none of the checkpoints under {self.directory} is intact: restore one from a "
        "backup, or delete that directory to start again"
      )
    return None, {}

  def _restore(self, step: int, templates: dict[str, Any]) -> dict[str, Any]:
    """Reads and checks some items of one checkpoint.

    Fields of `ACCOMPANYING` that it lacks are those of the templates.
    """
    manifest = _check_manifest(step, self._read(step, manifest=ocp.args.JsonRestore())["manifest"])
    zeros = {}
    for name, tree in templates.items():
      stored = manifest[name]["layout"]
      self._check_layout(step, name, stored, _layout(tree))
      zeros[name] = _zeros(stored) if name == "progress" else _host_zeros(tree)
    restored = self._read(step, **{k: ocp.args.StandardRestore(tree) for k, tree in zeros.items()})
    for name, tree in templates.items():
      expected, found = manifest[name]["crc32"], _checksums(restored[name])
      changed = [path for path in expected if expected[path] != found[path]]
      if changed:
        raise DamagedCheckpoint(f"contents of {name}{changed[0]} changed")
      if name == "progress":
        restored[name] = _merge(tree, restored[name])
    return restored

  def _check_layout(
    self, step: int, name: str, stored: dict[str, str], asked: dict[str, str]
  ) -> None:
    """Log differences in what accompanies a run, and refuse others.

    Raises:
      UserError: the checkpoint is of another model.
    """
    for path in sorted(stored.keys() | asked.keys()):
      there, here = stored.get(path, "missing"), asked.get(path, "missing")
      if there == here:
        continue
      text = f"{name}{path} is {there} there and {here} here"
      is_surplus = path not in asked
      if not (name == "progress" and (is_surplus or ACCOMPANYING.match(path))):
        raise UserError(f"checkpoint {self.directory}/{step} is of another model: {text}")
      result = "is left out" if is_surplus else "begins anew"
      log.info("checkpoint %s/%d: %s: it %s", self.directory, step, text, result)

  def _read(self, step: int, **items: Any) -> dict[str, Any]:
    """Reads items of one checkpoint, whatever they hold."""
    try:
      restored = self._manager.restore(step, args=ocp.args.Composite(**items))
      return {name: restored[name] for name in items}
    except FileNotFoundError as error:
      raise DamagedCheckpoint(f"a file is missing: {error.filename}") from error
    except (OSError, MemoryError) as error:
      if getattr(error, "errno", None) != errno.ESTALE:  # removed by another host
        raise  # too many open files, no permission: no reason to give the data up
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
      # `checkpoints` is a link to another disk, where there is room for it.
      free = self.directory / f"damaged_{free.name}"
      os.replace(self.directory / str(step), free)
    log.info("it is kept as %s", free)
    self._manager.reload()

  def close(self) -> None:
    """Waits for saves and releases orbax's threads."""
    self._opened.close()
