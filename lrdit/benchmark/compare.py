"""Compare the speed of two commits, or a benchmark with the accepted one.

python -m lrdit.benchmark.compare COMMIT COMMIT [--pairs=N] [--config=RECIPE] [--config.FIELD=VALUE]
python -m lrdit.benchmark.compare runs/benchmark/benchmark.json [--accept]

Commits are extracted into a temporary directory. Each runs the same small `--mode=benchmark` in
processes that take turns (A B, B A, A B, ...), so that whatever else the machine does meets both.
The fields must be known to both commits. A ratio B / A is that of the two processes of a pair.

The second form prints every ratio beside that of tests/benchmarks/accepted.json, which --accept
replaces.
"""

import argparse
import io
import json
import pathlib
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lrdit.benchmark import ratios
from lrdit.runtime.errors import UserError, print_error
from lrdit.runtime.store import changes, write_json
from lrdit.runtime.text import format_table

ROOT = pathlib.Path(__file__).resolve().parents[2]
ACCEPTED = ROOT / "tests" / "benchmarks" / "accepted.json"
# A benchmark of about a minute; concurrent compilations may use the compilation cache.
SMALL = (
  "--config=configs/digits.py",
  "--config.training.batch_size=64",
  "--config.sampling.batch_size=64",
  "--config.benchmark.rounds=5",
  "--config.benchmark.steps=4",
  "--config.benchmark.sampling_runs=None",
  "--config.benchmark.compile_threads=2",
)

Run = Callable[[str], ratios.Results]  # of one side, "A" or "B"


def extract(commit: str, directory: pathlib.Path) -> str:
  """Write a commit's files to a directory and return the commit's short name."""

  def git(*arguments: str) -> bytes:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=False)
    if done.returncode:
      cause = done.stderr.decode(errors="replace").strip().splitlines() or ["git failed"]
      raise UserError(f"{commit} is no commit of {ROOT}: {cause[-1]}", 2)
    return done.stdout

  name = git("rev-parse", "--short", "--verify", "--end-of-options", f"{commit}^{{commit}}")
  archive = git("archive", name.decode().strip())
  with tarfile.open(fileobj=io.BytesIO(archive)) as files:
    files.extractall(directory, filter="data")
  return name.decode().strip()


def run_benchmark(tree: pathlib.Path, flags: Sequence[str]) -> ratios.Results:
  """Return the results of a commit's `--mode=benchmark`, in a process of its own."""
  with tempfile.TemporaryDirectory(dir=tree.parent) as workdir:
    command = [sys.executable, "main.py", "--mode=benchmark", f"--workdir={workdir}", *flags]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
      cause = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
      raise UserError(f"the benchmark of {tree.name} failed: {cause}", 2)
    return json.loads((pathlib.Path(workdir) / "benchmark.json").read_text())


def take_turns(num_pairs: int, run: Run) -> list[tuple[ratios.Results, ratios.Results]]:
  """Return pairs of results of A and B; every other pair begins with B."""
  pairs = []
  for number in range(num_pairs):
    order = "BA" if number % 2 else "AB"
    results = {side: run(side) for side in order}
    print(f"pair {number + 1} of {num_pairs} is done", file=sys.stderr)
    pairs.append((results["A"], results["B"]))
  return pairs


def figures(results: ratios.Results) -> dict[str, float]:
  """Return the times, in seconds, and the ratios of a benchmark.json."""
  return ratios.seconds(results) | ratios.ratios(results)


def _median(values: Iterable[float]) -> str:
  return f"{statistics.median(values):.4g}"


def format_pairs(
  names: tuple[str, str], pairs: Sequence[tuple[ratios.Results, ratios.Results]]
) -> str:
  """Return a table with a line for each figure that all results have."""
  own = [(figures(a), figures(b)) for a, b in pairs]
  kept = [name for name in own[0][0] if all(name in side for pair in own for side in pair)]
  entries = {name: {"pairs": [(a[name], b[name]) for a, b in own]} for name in kept}
  columns = {
    f"A {names[0]}": lambda e: _median(a for a, _ in e["pairs"]),
    f"B {names[1]}": lambda e: _median(b for _, b in e["pairs"]),
    "B / A": lambda e: f"{statistics.median(b / a for a, b in e['pairs']):.3f}",
    "least": lambda e: f"{min(b / a for a, b in e['pairs']):.3f}",
    "most": lambda e: f"{max(b / a for a, b in e['pairs']):.3f}",
  }
  title = f"medians of {len(pairs)} pairs; seconds, ratios"
  return format_table(title, columns, entries)


def compare_commits(commits: Sequence[str], num_pairs: int, flags: Sequence[str]) -> str:
  """Return a table of the figures of two commits; nothing is left behind."""
  with tempfile.TemporaryDirectory(prefix="lrdit_compare_") as temporary:
    trees = {side: pathlib.Path(temporary) / side for side in "AB"}
    names = [extract(commit, trees[side]) for side, commit in zip("AB", commits, strict=True)]
    own = [*SMALL, *flags]
    if any(flag.startswith("--config=") for flag in flags):
      own.remove(SMALL[0])  # main.py takes one
    pairs = take_turns(num_pairs, lambda side: run_benchmark(trees[side], own))
    return format_pairs((names[0], names[1]), pairs)


def compare_with_accepted(new: dict[str, Any], accepted: dict[str, Any]) -> str:
  """Return what differs between two records of `ratios.accepted`, and a table of their ratios."""
  peak = "matmul_flops_per_second"
  lines = []
  for name in ("machine", "settings"):  # which ratios depend on
    ours, theirs = ({k: v for k, v in own[name].items() if k != peak} for own in (new, accepted))
    lines += [f"{name}: {change}" for change in changes(ours, theirs)]
  lines.append(
    f"matmul peak: {accepted['machine'][peak] / 1e9:.4g} GFLOP/s accepted, "
    f"{new['machine'][peak] / 1e9:.4g} here"
  )
  entries = {
    name: {"accepted": value, "here": new["ratios"][name]}
    for name, value in accepted["ratios"].items()
    if name in new["ratios"]
  }
  columns = {
    "accepted": lambda e: f"{e['accepted']:.3f}",
    "here": lambda e: f"{e['here']:.3f}",
    "here / accepted": lambda e: f"{e['here'] / e['accepted']:.3f}",
  }
  return "\n".join([*lines, "", format_table("ratio of times", columns, entries)])


def read_benchmark(path: pathlib.Path) -> dict[str, Any]:
  """Return what is kept of a benchmark.json."""
  try:
    return ratios.accepted(json.loads(path.read_text()))
  except (OSError, ValueError, KeyError, TypeError) as error:
    fix = "make it by --mode=benchmark of this version"
    raise UserError(f"{path} is no benchmark.json with ratios ({error!r}): {fix}", 2) from error


def main(arguments: Sequence[str]) -> None:
  """Run a command line; raise a UserError for a wrong one."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument("names", nargs="+", metavar="COMMIT or FILE")
  parser.add_argument("--pairs", type=int, default=4, help="processes of each commit")
  parser.add_argument("--accept", action="store_true", help="replace the accepted ratios")
  given, flags = parser.parse_known_args(arguments)
  if given.pairs < 1:
    raise UserError(f"--pairs={given.pairs} must be a whole number from 1", 2)
  if len(given.names) == 2 and not given.accept:
    print(compare_commits(given.names, given.pairs, flags))
  elif len(given.names) == 1 and not flags:
    new = read_benchmark(pathlib.Path(given.names[0]))
    if given.accept:
      write_json(ACCEPTED, new)
    print(compare_with_accepted(new, json.loads(ACCEPTED.read_text())))
  else:
    raise UserError("name two commits, or one benchmark.json without further flags (see --help)", 2)


if __name__ == "__main__":
  try:
    main(sys.argv[1:])
  except (Exception, KeyboardInterrupt) as error:
    sys.exit(print_error(error, False))
