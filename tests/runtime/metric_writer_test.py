import json
import logging
import sys

import pytest

from lrdit.runtime.metric_writer import MetricWriter
from tests.tiny import read_metrics


def test_numbers_keep_their_digits(tmp_path):
  writer = MetricWriter(tmp_path, 0, tensorboard=False)
  value = 0.1 + 0.2
  writer.write(1, {"train/loss": value, "bad": float("nan")})
  writer.close()
  assert read_metrics(tmp_path) == [{"step": 1, "train/loss": value, "bad": None}]


@pytest.mark.parametrize("torn", ['{"step": 8, "x"', "[1]", "{}", "7", "\udcff"])
def test_lines_after_the_checkpoint_and_torn_lines_are_dropped(tmp_path, torn):
  lines = [json.dumps({"step": s, "x": s}) + "\n" for s in (2, 4, 6)]
  (tmp_path / "metrics.jsonl").write_text("".join(lines) + torn, errors="surrogateescape")
  writer = MetricWriter(tmp_path, 4, tensorboard=False)
  writer.write(6, {"x": 60})
  writer.close()
  assert [line["x"] for line in read_metrics(tmp_path)] == [2, 4, 60]
  assert writer.has_lines


def test_a_run_without_a_checkpoint_begins_its_metrics_anew(tmp_path):
  for first_step, has_lines in ((-1, False), (0, True), (-1, False)):  # no file, then step 0
    writer = MetricWriter(tmp_path, first_step, tensorboard=False)
    assert writer.has_lines == has_lines
    assert [line["step"] for line in read_metrics(tmp_path)] == [0] * has_lines
    if not has_lines:
      writer.write(0, {"x": 1})
    writer.close()


def test_tensorboard_is_off_with_one_line_where_it_cannot_be_imported(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
  told = []
  monkeypatch.setattr(logging.getLogger("lrdit"), "info", lambda text, *_: told.append(text))
  writer = MetricWriter(tmp_path, 0, tensorboard=True)
  writer.write(1, {"train/loss": 1.5})
  writer.close()
  assert [text.split(" (")[0] for text in told] == ["TensorBoard events are off"]
  assert not (tmp_path / "tensorboard").exists()
  assert len(read_metrics(tmp_path)) == 1


def test_tensorboard_shows_no_step_that_a_resumed_run_takes_back(tmp_path):
  accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
  # Killed after step 6, whose checkpoint is of step 4; then to step 5 only.
  for first_step, steps, value in ((0, range(1, 7), 0.5), (4, [5], 0.25)):
    writer = MetricWriter(tmp_path, first_step, tensorboard=True)
    for step in steps:
      writer.write(step, {"train/loss": value, "bad": float("nan")})
    writer.close()
  accumulator = accumulators.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
  assert accumulator.Tags()["scalars"] == ["train/loss"]
  shown = [(event.step, event.value) for event in accumulator.Scalars("train/loss")]
  assert shown == [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.5), (5, 0.25)]
  assert all(event.wall_time > 0 for event in accumulator.Scalars("train/loss"))
