"""The contents of a report on several workdirs."""

import dataclasses
import datetime
import importlib.metadata
import platform
import shlex
from collections.abc import Sequence
from typing import Any

from absl import flags

from lrdit.report.arms import Arm, choose_layer, group_arms
from lrdit.report.claim import Claim, judge
from lrdit.report.commands import reproduce
from lrdit.report.compare import Comparison, Row, compare
from lrdit.report.pictures import Grid, choose_grids
from lrdit.report.rows import measure_rows
from lrdit.report.runs import read_run

PACKAGES = ("lrdit", "jax", "flax", "numpy", "matplotlib")
PAGE_ONLY = ("lines", "pixels", "image")  # fields that report.json omits


@dataclasses.dataclass
class Origin:
  """How a report was made."""

  command: str
  time: str  # ISO 8601, UTC
  versions: dict[str, str | None]  # of Python and `PACKAGES`; None for one not installed


@dataclasses.dataclass
class Report:
  """The contents of report.html and report.json."""

  made: Origin
  claim: list[Claim]  # one for each adaptive arm
  arms: list[Arm]
  layer: str  # whose r(t) is shown
  rows: list[Row]
  comparisons: list[Comparison]
  grids: list[Grid]

  def to_json(self) -> dict[str, Any]:
    """Return the report as JSON, without images and log lines."""

    def kept(items: list[tuple[str, Any]]) -> dict[str, Any]:
      return {key: value for key, value in items if key not in PAGE_ONLY}

    return dataclasses.asdict(self, dict_factory=kept)


def make_report(workdirs: Sequence[str], output: str) -> Report:
  """Read and compare workdirs; `output` appears only in the recorded command.

  Raises:
    UserError: a directory is not a workdir, or a run appears twice.
  """
  runs = [read_run(name) for name in workdirs]
  arms = group_arms(runs)
  rows, grids = measure_rows(arms), choose_grids(arms)
  comparisons = compare(arms, rows)
  for run in runs:
    run.commands = reproduce(run)
  names = flags.CsvListSerializer(",").serialize(list(workdirs))
  own = ["--mode=report", f"--workdirs={names}", f"--output={output}"]
  made = Origin(
    command=shlex.join(["python", "main.py", *own]),
    time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    versions={"python": platform.python_version()} | dict(map(_version, PACKAGES)),
  )
  claim = judge(arms, comparisons)
  return Report(made, claim, arms, choose_layer(arms), rows, comparisons, grids)


def _version(name: str) -> tuple[str, str | None]:
  try:
    return name, importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return name, None
