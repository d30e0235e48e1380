"""Where a run's numbers go: metrics.jsonl always, TensorBoard if it is there."""

import json
import logging
import math
import os
import pathlib
from collections.abc import Mapping

log = logging.getLogger("lrdit")


def _drop_lines_after(path: pathlib.Path, step: int) -> None:
  """Removes lines of steps a resumed run will write again, and a torn last one."""
  if not path.is_file():
    return
  kept = []
  for line in path.read_text().splitlines():
    try:
      if json.loads(line)["step"] <= step:
        kept.append(line + "\n")
    except (ValueError, TypeError, KeyError):
      break  # written when the process was killed; nothing follows it
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_text("".join(kept))
  os.replace(temporary, path)


def _tensorboard_writer(workdir: pathlib.Path):
  """clu's TensorBoard writer, or None where it cannot be imported."""
  # Only its event files are used; without this it greets at length.
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  try:
    from clu import metric_writers  # imports tensorflow: seconds, and optional

    return metric_writers.SummaryWriter(str(workdir / "tensorboard"))
  except (ImportError, AttributeError, TypeError) as error:  # so clashing versions show
    log.info("TensorBoard events are off (%s): pip install 'lrdit[tensorboard]'", error)
    return None


class MetricWriter:
  """Appends scalars of a step as one JSON object a line, full precision."""

  def __init__(self, workdir: pathlib.Path, first_step: int, tensorboard: bool):
    """Opens the files.

    Args:
      workdir: the run's directory.
      first_step: step the run resumes from; later lines are dropped.
      tensorboard: also write TensorBoard events where clu can be imported.
    """
    path = workdir / "metrics.jsonl"
    _drop_lines_after(path, first_step)
    self._file = path.open("a")
    self._tensorboard = _tensorboard_writer(workdir) if tensorboard else None

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes one line and flushes it; non-finite values become null."""
    values = {k: float(v) if math.isfinite(v) else None for k, v in scalars.items()}
    self._file.write(json.dumps({"step": step} | values) + "\n")
    self._file.flush()
    if self._tensorboard:
      self._tensorboard.write_scalars(step, {k: v for k, v in values.items() if v is not None})

  def close(self) -> None:
    """Flushes and closes the files."""
    self._file.close()
    if self._tensorboard:
      self._tensorboard.close()
