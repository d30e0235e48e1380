"""The command line: python main.py --config=FILE[:ARGS] --workdir=DIR [--mode=MODE]."""

import functools
import importlib
import logging
import os
import sys

from lrdit.runtime import malloc

if __name__ == "__main__":  # before anything else, as this may start the program again
  malloc.restart_tuned()

from lrdit.config.flags import MODES, SHARED_BY_PROCESSES, parse_flags, wants_tracebacks
from lrdit.runtime import startup
from lrdit.runtime.errors import UserError, print_error


def run(argv: list[str]) -> int:
  """Does what a command line says; returns the exit status."""
  debug, who = wants_tracebacks(argv), ""
  try:
    values = parse_flags(argv)
    if values.help:
      print(__doc__, values.get_help(), sep="\n")
      return 0
    notes = startup.prepare()
    from lrdit.config import resolve
    from lrdit.runtime import (
      cluster,
      progress,  # now, as importing jax takes a while
    )

    job = cluster.find_cluster(values.coordinator, values.num_processes, values.process_id)
    if job:
      if values.mode not in SHARED_BY_PROCESSES:
        raise UserError(
          f"--mode={values.mode} is for one process: start it once, or --num_processes=1", 2
        )
      who = job.process_name
      progress.start_logging(debug, who, is_first=True)  # none has met another yet
      cluster.connect(job, shares_sigterm=values.mode == "train")
      who = cluster.process_name()
    startup.open_devices()
    progress.start_logging(debug, who, cluster.is_first())
    for note in notes:
      logging.getLogger("lrdit").warning(note)
    verb = getattr(importlib.import_module(f"lrdit.modes.{values.mode}"), values.mode)
    read = {"config": resolve.resolve}
    if values.workdir:
      read["config"] = functools.partial(resolve.resolve_for_run, run=values.workdir)
    arguments = (read.get(f, lambda value: value)(values[f].value) for f in MODES[values.mode])
    return verb(*arguments) or 0
  except (Exception, KeyboardInterrupt) as error:
    status = print_error(error, debug, who)
    if who:  # jax would have this process wait for the others, which wait for it
      os._exit(status)
    return status


if __name__ == "__main__":
  sys.exit(run(sys.argv))
