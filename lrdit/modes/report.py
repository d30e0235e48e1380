"""Compare workdirs on one page: `--mode=report`."""

import logging
import os
import pathlib
from collections.abc import Sequence

from lrdit.report import page
from lrdit.report.contents import make_report
from lrdit.runtime.locks import owned
from lrdit.runtime.store import atomic_path, write_json

log = logging.getLogger("lrdit")


def report(workdirs: Sequence[str], output: str) -> None:
  """Run `--mode=report`: write report.html and report.json to the directory `output`.

  Runs that differ only in their seed are one arm.
  """
  made = make_report(workdirs, output)
  text = page.render(made)
  directory = pathlib.Path(os.path.expanduser(output))
  directory.mkdir(parents=True, exist_ok=True)
  with owned(directory, "report", wait=True):
    with atomic_path(directory / "report.html") as temporary:
      temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    write_json(directory / "report.json", made.to_json())
  log.info("%d arms compared: %s", len(made.arms), directory / "report.html")
