"""Run long, and break things at random: `python -m tests.endurance soak|kills|disks|flips`.

The exit status is 1 if anything was found. What was run stands in the output.
"""

import argparse
import importlib
import os
import pathlib
import sys
import tempfile

MODULES = {"soak": "soak", "kills": "killing", "disks": "disks", "flips": "flips"}


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="python -m tests.endurance", description=__doc__)
  parser.add_argument("--output", help="directory of what is written; a temporary one by default")
  kinds = parser.add_subparsers(dest="kind", required=True)
  soak = kinds.add_parser("soak", help="memory, open files, threads and time of long work")
  soak.add_argument("--steps", type=int, default=50_000, help="of training; 0 leaves it out")
  soak.add_argument("--samples", type=int, default=1_000_000, help="0 leaves them out")
  soak.add_argument("--evaluations", type=int, default=200, help="0 leaves them out")
  soak.add_argument("--interval", type=float, default=0.5, help="seconds between two looks")
  kills = kinds.add_parser("kills", help="kill -9 at random moments of every kind of work")
  kills.add_argument("--count", type=int, default=100, help="kills in all")
  kills.add_argument(
    "--targets", dest="names", nargs="*", default=[], help="those to run; all by default"
  )
  kills.add_argument("--seed", type=int, default=0)
  disks = kinds.add_parser("disks", help="a full disk, and one that becomes read-only")
  disks.add_argument("--count", type=int, default=20, help="full disks")
  disks.add_argument("--aborts", type=int, default=6, help="disks that become read-only")
  disks.add_argument("--seed", type=int, default=0)
  flips = kinds.add_parser("flips", help="checkpoints and latents with a byte flipped or cut there")
  flips.add_argument("--count", type=int, default=200, help="of each")
  flips.add_argument("--seed", type=int, default=1)
  return parser.parse_args()


def main() -> int:
  """Run the command line."""
  arguments = vars(_arguments())
  kind, output = arguments.pop("kind"), arguments.pop("output")
  path = pathlib.Path(output or tempfile.mkdtemp(prefix="endurance-")).absolute()
  path.mkdir(parents=True, exist_ok=True)
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(path / "cache"))
  run = getattr(importlib.import_module(f"tests.endurance.{MODULES[kind]}"), kind)
  found = run(path, **arguments)
  print(f"{found} findings; see {path}", flush=True)
  return 1 if found else 0


if __name__ == "__main__":
  sys.exit(main())
