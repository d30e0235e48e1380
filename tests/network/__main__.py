"""Disturb a training over a network of hosts: `python -m tests.network [FAULT ...] --hosts=2,4`.

Every host is a network namespace, which a veth pair joins to a switch of frames. The table has a
line for each fault; the exit status is 1 if a promise does not hold.
"""

import argparse
import os
import pathlib
import sys
import tempfile


def _arguments():
  parser = argparse.ArgumentParser(prog="python -m tests.network", description=__doc__)
  parser.add_argument("faults", nargs="*", help="those to try, in quotes; all by default")
  parser.add_argument("--hosts", default="2,4", help="numbers of hosts")
  parser.add_argument("--output", help="directory of the runs and logs, which are kept there")
  return parser.parse_args()


def main() -> int:
  """Run the command line."""
  arguments = _arguments()
  os.environ["JAX_PLATFORMS"] = "cpu"
  import absl.logging

  from tests.network import faults, hosts

  absl.logging.set_verbosity(absl.logging.ERROR)  # orbax warns of what it reads

  known = faults.ENDING | faults.PASSING
  if unknown := sorted({*arguments.faults} - known.keys()):
    print(f"unknown faults {', '.join(unknown)}: use some of {', '.join(known)}")
    return 2
  if reason := hosts.missing():
    print(f"not run: {reason}")
    return 0
  num_broken = 0
  with tempfile.TemporaryDirectory(prefix="network") as scratch:
    directory = pathlib.Path(arguments.output or scratch)
    directory.mkdir(parents=True, exist_ok=True)
    print("hosts  fault                of     after    then")
    for num_hosts in map(int, arguments.hosts.split(",")):
      try:
        for outcome in faults.run(num_hosts, arguments.faults or [*known], directory):
          num_broken += bool(outcome.broken)
          print(outcome, flush=True)
        print(f"{num_hosts:5}  the run ends as an undisturbed one does, to the bit", flush=True)
      except AssertionError as error:
        num_broken += 1
        print(f"{num_hosts:5}  BROKEN: {error}", flush=True)
  return 1 if num_broken else 0


if __name__ == "__main__":
  sys.exit(main())
