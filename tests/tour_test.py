"""docs/tour.ipynb: its cells run, and it is committed with what they print and draw."""

import json
import subprocess
import sys

import pytest

from tests import tiny

TOUR = tiny.ROOT / "docs" / "tour.ipynb"
CELLS = [c for c in json.loads(TOUR.read_text())["cells"] if c["cell_type"] == "code"]


def test_the_tour_is_committed_with_its_outputs():
  assert TOUR.stat().st_size < 2**20
  for cell in CELLS:
    assert cell["outputs"]
    assert all(output["output_type"] != "error" for output in cell["outputs"])


@pytest.mark.slow
def test_the_cells_of_the_tour_run():
  program = "\n".join("".join(cell["source"]) for cell in CELLS)
  done = subprocess.run(
    [sys.executable, "-c", program],
    cwd=tiny.ROOT,
    env=tiny.environment(MPLBACKEND="agg"),
    capture_output=True,
    text=True,
    timeout=900,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  differences = [line for line in done.stdout.splitlines() if "largest difference" in line]
  assert len(differences) == 4
  assert all(float(line.rpartition(" ")[2]) < 1e-5 for line in differences)
