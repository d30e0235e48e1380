import json

import numpy as np
import pytest

from lrdit.report import compare
from lrdit.report.contents import make_report
from tests.workdirs import make_run


def test_accuracy_is_compared_in_points():
  def compared_by(how, values, baseline):
    cells = [
      compare.summarize(compare.Measurement(v, str(i), i, {}) for i, v in enumerate(own))
      for own in (values, baseline)
    ]
    return compare.compare_cells(compare.Quantity("", "", "", "", how), *cells)

  compared = compared_by("points", (0.95, 0.97), (0.98, 0.99))
  assert compared.value == pytest.approx(-2.5)
  assert compared.by_seed == pytest.approx([-3, -2])
  assert compared.standard_error == pytest.approx(0.5)  # of the differences by seed
  unpaired = compared_by("points", (0.95, 0.97), (0.98, 0.99, 0.985))
  error = 100 * np.hypot(0.01, 0.005 / 3**0.5)
  assert unpaired.standard_error == pytest.approx(error)
  assert unpaired.by_seed == pytest.approx([-3, -2])
  ratios = compared_by("ratio", (0.5, 0.6), (1.0, 1.0))
  assert ratios.by_seed == pytest.approx([0.5, 0.6])
  assert ratios.standard_error == pytest.approx(0.05)
  assert compared.spread == pytest.approx(0.02 / 2**0.5)
  # 0.3 and 0.1 + 0.2 are equal but for rounding, and no spread is larger than none.
  equal = compared_by("points", (0.3, 0.3), (0.1 + 0.2, 0.1 + 0.2))
  assert equal.verdict == "within the seeds' spread"


def test_steps_until_the_full_arm_s_last_held_out_loss(tmp_path):
  curves = {"full": (0.5, 0.3, 0.2), "narrow": (0.4, 0.2, 0.1), "static": (0.6, 0.5, 0.4)}
  for name, losses in curves.items():
    make_run(tmp_path / name, name)  # of 100 images/s and a batch of 16
    lines = [{"step": 4 * i + 4, "eval/loss": loss} for i, loss in enumerate(losses)]
    lines[-1] |= {"train/loss": 1.0, "train/images_per_second": 100.0}
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / name / "metrics.jsonl").write_text(text)
  made = make_report([str(tmp_path / name) for name in curves], "out")
  values = {
    row.key: [[one.mean for one in cell.summaries] for cell in row.cells] for row in made.rows
  }
  assert values["steps_to_full"] == [[12], [8], []]
  assert values["seconds_to_full"] == [[1.92], [1.28], []]
  without = make_report([str(tmp_path / "narrow")], "out")
  assert "steps_to_full" not in [row.key for row in without.rows]
