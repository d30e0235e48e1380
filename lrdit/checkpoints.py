"""Checkpoints: saving in the background, restoring only what proves intact.

A checkpoint `checkpoints/STEP/` holds the items `params` (raw weights),
`ema_params`, `opt_state`, `progress` (step, metric sums and curriculum stage),
`config` (JSON) and `manifest` (JSON: dtype, shape and CRC-32 of every array), written by orbax,
which makes it visible only once it is complete.
"""

import hashlib
import itertools
import logging
import os
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp

from lrdit import parallel
from lrdit.errors import UserError
from lrdit.train_state import TrainState

# The moving average and what it is of, by the names that figures bear.
WEIGHTS = {"raw": "params", "ema": "ema_params"}
ARRAY_ITEMS = ("params", "ema_params", "opt_state", "progress")

log = logging.getLogger("lrdit")


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
  """SHA-256, in hex, of every array with its path, dtype and shape.

  Args:
    tree: of arrays on the host.
  """
  sha256 = hashlib.sha256()
  for (path, layout), leaf in zip(_layout(tree).items(), jax.tree.leaves(tree), strict=True):
    sha256.update(f"{path}{layout}".encode())
    sha256.update(np.ascontiguousarray(leaf))
  return sha256.hexdigest()


def _manifest(items: dict[str, Any]) -> dict[str, Any]:
  return {
    name: {"layout": _layout(tree), "crc32": _checksums(tree)} for name, tree in items.items()
  }


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
    self.directory = pathlib.Path(workdir).absolute() / "checkpoints"
    # Whatever other processes there are, this one reads and writes alone.
    alone = ocp.options.MultiprocessingOptions(
      primary_host=parallel.process_id(),
      active_processes={parallel.process_id()},
      barrier_sync_key_prefix=f"process_{parallel.process_id()}",
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
    self._manager = ocp.CheckpointManager(self.directory, options=options)

  def steps(self) -> list[int]:
    """Steps of the complete checkpoints, newest first."""
    return sorted(self._manager.all_steps(), reverse=True)

  def save(self, state: TrainState, config: dict[str, Any]) -> None:
    """Starts saving a host state; a save still under way is waited for.

    Args:
      state: numpy arrays that nothing will overwrite.
      config: the resolved config.

    Raises:
      UserError: the disk is full or not writable.
    """
    items = _items(state)
    arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    try:
      self._manager.save(
        int(state.step),
        args=ocp.args.Composite(
          **arrays,
          config=ocp.args.JsonSave(config),
          manifest=ocp.args.JsonSave(_manifest(items)),
        ),
      )
    except Exception as error:
      raise self._save_failed(error) from error

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
      template: a state of the run's shapes.

    Raises:
      UserError: there are checkpoints, but none is intact.
    """
    step, items = self._newest_intact(_items(template), move_damaged=True)
    if step is None:
      return None
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
    steps = self.steps()
    for step in steps:
      try:
        return step, self._restore(step, templates)
      except DamagedCheckpoint as damage:
        log.warning("checkpoint %s/%d is damaged (%s)", self.directory, step, damage)
        if move_damaged and step != steps[-1]:
          self._move_aside(step)
    if steps:
      raise UserError(
        f"none of the checkpoints under {self.directory} is intact: restore one from a "
        "backup, or delete that directory to start again"
      )
    return None, {}

  def _restore(self, step: int, templates: dict[str, Any]) -> dict[str, Any]:
    """Reads and checks some items of one checkpoint."""
    manifest = self._read(step, manifest=ocp.args.JsonRestore())["manifest"]
    for name, tree in templates.items():
      stored, asked = manifest[name]["layout"], _layout(tree)
      differing = [p for p in stored.keys() | asked.keys() if stored.get(p) != asked.get(p)]
      if differing:
        path = min(differing)
        raise UserError(
          f"checkpoint {self.directory}/{step} is of another model: {name}{path} is "
          f"{stored.get(path, 'missing')} there and {asked.get(path, 'missing')} here"
        )
    zeros = {name: _host_zeros(tree) for name, tree in templates.items()}
    restored = self._read(step, **{k: ocp.args.StandardRestore(tree) for k, tree in zeros.items()})
    for name in templates:
      expected, found = manifest[name]["crc32"], _checksums(restored[name])
      changed = [path for path in expected if expected[path] != found[path]]
      if changed:
        raise DamagedCheckpoint(f"contents of {name}{changed[0]} changed")
    return restored

  def _read(self, step: int, **items: Any) -> dict[str, Any]:
    """Reads items of one checkpoint, whatever they hold."""
    try:
      restored = self._manager.restore(step, args=ocp.args.Composite(**items))
      return {name: restored[name] for name in items}
    except FileNotFoundError as error:
      raise DamagedCheckpoint(f"a file is missing: {error.filename}") from error
    except (OSError, MemoryError):
      raise  # too many open files, no permission: no reason to give the data up
    except Exception as error:  # orbax and tensorstore raise many kinds
      raise DamagedCheckpoint(_first_line(error)) from error

  def _move_aside(self, step: int) -> None:
    target = self.directory.parent / "damaged_checkpoints"
    target.mkdir(exist_ok=True)
    names = (f"{step}" if i == 0 else f"{step}.{i}" for i in itertools.count())
    free = next(target / name for name in names if not (target / name).exists())
    os.replace(self.directory / str(step), free)
    self._manager.reload()

  def close(self) -> None:
    """Waits for saves and releases orbax's threads."""
    self._manager.close()
