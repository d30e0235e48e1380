"""What a run has on the disk, and when."""

import contextlib
import os
import pathlib

import numpy as np

from lrdit.model import layouts
from lrdit.runtime import store
from lrdit.train.checkpoints import Checkpoints
from lrdit.train.run_files import RunFiles
from tests import tiny, trained


def test_metrics_are_on_the_disk_before_the_checkpoint_after_them(tmp_path, monkeypatch):
  """A run that goes on from the checkpoint does not write the lines before it again."""
  config, events = tiny.tiny_config(), []
  path, fsync = tmp_path / "metrics.jsonl", os.fsync

  def record(file):
    if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
      events.append(path.read_text().count("\n"))
    fsync(file)

  monkeypatch.setattr(os, "fsync", record)
  monkeypatch.setattr(Checkpoints, "save", lambda *_: events.append("save"))
  with contextlib.closing(RunFiles(config, str(tmp_path), {})) as files:
    files.begin()
    files.write_metrics(1, {"train/loss": 1.0})
    files.write_metrics(2, {"train/loss": 1.0})
    files.save_host(None)
  assert events == [2, "save"]


def test_a_checkpoint_is_on_the_disk_before_the_one_it_replaces_is_removed(tmp_path, monkeypatch):
  """A power failure may empty files that were written and renamed, but not synced."""
  config = tiny.tiny_config()
  params = layouts.nest(trained.random_params(config))
  trained.save_checkpoint(tmp_path, config, 5, params=params)
  synced, sync, directory = set(), store.sync, tmp_path / "checkpoints"

  def record(path):
    assert (directory / "5").exists()
    assert not (directory / "6").exists()
    sync(path)
    synced.add(pathlib.Path(*path.relative_to(directory).parts[1:]))

  monkeypatch.setattr(store, "sync", record)
  trained.save_checkpoint(tmp_path, config, 6, 2.0, params)
  assert [path.name for path in directory.iterdir()] == ["6"]
  found = {path.relative_to(directory / "6") for path in (directory / "6").rglob("*")}
  later = ("commit_success.txt", "_CHECKPOINT_METADATA")  # orbax writes them once more
  assert synced | {pathlib.Path(later[0])} == found | {pathlib.Path()}
  for name in later:
    (directory / "6" / name).write_text("")
  with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
    step, restored = checkpoints.restore_params(params, ["raw"])
  assert step == 6
  for name, value in layouts.flat(restored["raw"]).items():
    np.testing.assert_array_equal(value, 2.0 * trained.random_params(config)[name])
