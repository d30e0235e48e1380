"""The files of a run's training."""

import contextlib
import os

from lrdit.train.checkpoints import Checkpoints
from lrdit.train.run_files import RunFiles
from tests import tiny


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
    files.begin(0)
    files.write_metrics(1, {"train/loss": 1.0})
    files.write_metrics(2, {"train/loss": 1.0})
    files.save_host(None)
  assert events == [2, "save"]
