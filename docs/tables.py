"""Print the table of a report's arms as Markdown: python -m docs.tables runs/NAME/report.json."""

import json
import pathlib
import sys

from lrdit.report.page import format_pair, format_value

# (key of a row of report.json, heading).
COLUMNS = (
  ("parameters", "parameters"),
  ("mean_forward_macs", "MACs, mean over t"),
  ("held_out_loss_ema", "held-out loss"),
  ("classifier_recognition_accuracy", "recognized"),
  ("classifier_frechet_distance", "Frechet distance"),
  ("steps_to_full", "steps to the first full arm's loss"),
)


def main(path: str) -> None:
  """Print a line for each arm: means and standard deviations over its seeds."""
  report = json.loads(pathlib.Path(path).read_text())
  rows = {row["key"]: row for row in report["rows"]}
  columns = [(rows[key], heading) for key, heading in COLUMNS if key in rows]
  lines = [["arm", *(heading for _, heading in columns), "seeds"]]
  lines.append(["---"] * len(lines[0]))
  for number, arm in enumerate(report["arms"]):
    cells = [(row["cells"][number], row["format"], row["key"]) for row, _ in columns]
    lines.append(
      [f"`{arm['name']}`", *(format_cell(*cell) for cell in cells), str(len(arm["runs"]))]
    )
  print("\n".join(f"| {' | '.join(line)} |" for line in lines))


def format_cell(cell: dict, form: str, key: str) -> str:
  """Format an exact value, or the first summary of a cell."""
  if cell["exact"] is not None:
    return format_value(cell["exact"], form)
  for summary in cell["summaries"]:
    return format_pair(summary["mean"], summary["std"], form)
  return "not reached" if key == "steps_to_full" else "not measured"


if __name__ == "__main__":
  main(sys.argv[1])
