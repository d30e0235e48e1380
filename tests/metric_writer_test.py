import json
import logging
import sys

import pytest

from lrdit.metric_writer import MetricWriter
from tests.tiny import read_metrics


def test_numbers_keep_their_digits(tmp_path):
  writer = MetricWriter(tmp_path, 0, tensorboard=False)
  value = 0.1 + 0.2
  writer.write(1, {"train/loss": value, "bad": float("nan")})
  writer.close()
  assert read_metrics(tmp_path) == [{"step": 1, "train/loss": value, "bad": None}]


@pytest.mark.parametrize("torn", ['{"step": 8, "x"', "[1]", "{}", "7"])
def test_lines_after_the_checkpoint_and_torn_lines_are_dropped(tmp_path, torn):
  lines = [json.dumps({"step": s, "x": s}) + "\n" for s in (2, 4, 6)]
  (tmp_path / "metrics.jsonl").write_text("".join(lines) + torn)
  writer = MetricWriter(tmp_path, 4, tensorboard=False)
  writer.write(6, {"x": 60})
  writer.close()
  assert [line["x"] for line in read_metrics(tmp_path)] == [2, 4, 60]


def test_tensorboard_is_off_with_one_line_where_clu_cannot_be_imported(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "clu.metric_writers", None)
  told = []
  monkeypatch.setattr(logging.getLogger("lrdit"), "info", lambda text, *_: told.append(text))
  writer = MetricWriter(tmp_path, 0, tensorboard=True)
  writer.write(1, {"train/loss": 1.5})
  writer.close()
  assert [text.split(" (")[0] for text in told] == ["TensorBoard events are off"]
  assert not (tmp_path / "tensorboard").exists()
  assert len(read_metrics(tmp_path)) == 1


def test_tensorboard_events_are_written_where_clu_can_be_imported(tmp_path):
  pytest.importorskip("tensorflow")
  writer = MetricWriter(tmp_path, 0, tensorboard=True)
  writer.write(1, {"train/loss": 1.5})
  writer.close()
  assert list((tmp_path / "tensorboard").glob("events*"))
