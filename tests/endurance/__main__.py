"""Run long, and break things at random: `python -m tests.endurance soak|kills|disks|flips`.

The exit status is 1 if anything was found. What was run stands in the output.
"""

import argparse
import pathlib
import sys
import tempfile


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="python -m tests.endurance", description=__doc__)
  parser.add_argument("--output", help="directory of what is written; a temporary one by default")
  kinds = parser.add_subparsers(dest="kind", required=True)
  soak = kinds.add_parser("soak", help="memory, open files, threads and time of long work")
  soak.add_argument("--steps", type=int, default=50_000, help="of training; 0 leaves it out")
  soak.add_argument("--samples", type=int, default=1_000_000, help="0 leaves them out")
  soak.add_argument("--evaluations", type=int, default=200, help="0 leaves them out")
  soak.add_argument("--interval", type=float, default=0.5, help="seconds between two looks")
  return parser.parse_args()


def main() -> int:
  """Run the command line."""
  arguments = vars(_arguments())
  kind, output = arguments.pop("kind"), arguments.pop("output")
  path = pathlib.Path(output or tempfile.mkdtemp(prefix="endurance-")).absolute()
  path.mkdir(parents=True, exist_ok=True)
  if kind == "soak":
    from tests.endurance.soak import soak

    found = soak(
      path,
      arguments["steps"],
      arguments["samples"],
      arguments["evaluations"],
      arguments["interval"],
    )
  print(f"{found} findings; see {path}", flush=True)
  return 1 if found else 0


if __name__ == "__main__":
  sys.exit(main())
