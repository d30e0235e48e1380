"""Write a run's metrics to metrics.jsonl, and to TensorBoard where it is installed."""

import json
import logging
import math
import os
import pathlib
import socket
import time
from collections.abc import Mapping
from typing import Any

from lrdit.runtime.store import atomic_path, parse_json

log = logging.getLogger("lrdit")


def _drop_lines_after(path: pathlib.Path, step: int) -> bool:
  """Remove lines that a resumed run writes again, and an incomplete last one.

  Return whether a line stays.
  """
  if not path.is_file():
    return False
  kept = []
  for line in path.read_text(errors="replace").splitlines():
    try:
      if parse_json(line)["step"] <= step:
        kept.append(line + "\n")
    except (ValueError, TypeError, KeyError):
      break  # cut off when the process was killed; nothing follows it
  with atomic_path(path) as temporary:
    temporary.write_text("".join(kept))
  return bool(kept)


class _EventWriter:
  """Writes TensorBoard events without TensorFlow; the first one drops later steps of earlier files.

  Raises ImportError, AttributeError or TypeError where tensorboard is missing or does not fit.
  """

  def __init__(self, directory: pathlib.Path, first_step: int):
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter

    self._event, self._summary = event_pb2.Event, summary_pb2.Summary
    directory.mkdir(exist_ok=True)
    # TensorBoard reads the files in order of their names.
    name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
    self._records = RecordWriter((directory / name).open("wb"))
    self._write(file_version="brain.Event:2")
    log_of_start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(step=first_step + 1, session_log=log_of_start)

  def _write(self, **fields: Any) -> None:
    event = self._event(wall_time=time.time(), **fields)
    self._records.write(event.SerializeToString())
    self._records.flush()

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    values = [self._summary.Value(tag=k, simple_value=v) for k, v in scalars.items()]
    self._write(step=step, summary=self._summary(value=values))

  def close(self) -> None:
    self._records.close()


class MetricWriter:
  """Appends each step's scalars as a line of JSON in full precision, after dropping later steps.

  Steps after `first_step` are dropped, all of them where it is -1. `has_lines` says whether
  earlier ones stay. With `tensorboard`, TensorBoard events are written too where the package can be
  imported.
  """

  def __init__(self, workdir: pathlib.Path, first_step: int, tensorboard: bool):
    path = workdir / "metrics.jsonl"
    self.has_lines = _drop_lines_after(path, first_step)
    self._file, self._tensorboard = path.open("a"), None
    if tensorboard:
      try:
        self._tensorboard = _EventWriter(workdir / "tensorboard", first_step)
      except (ImportError, AttributeError, TypeError) as error:
        log.info("TensorBoard events are off (%s): pip install 'lrdit[tensorboard]'", error)

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Write one line and flush it; non-finite values become null."""
    values = {k: float(v) if math.isfinite(v) else None for k, v in scalars.items()}
    self._file.write(json.dumps({"step": step} | values) + "\n")
    self._file.flush()
    if self._tensorboard:
      self._tensorboard.write(step, {k: v for k, v in values.items() if v is not None})

  def sync(self) -> None:
    """Wait until the lines are on the disk, as those before a checkpoint are not written again."""
    os.fsync(self._file.fileno())

  def close(self) -> None:
    """Close the files."""
    self._file.close()
    if self._tensorboard:
      self._tensorboard.close()
