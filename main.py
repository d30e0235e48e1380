"""The command line: python main.py --config=FILE[:ARGS] --workdir=DIR [--mode=MODE]."""

import importlib
import logging
import sys

from lrdit.runtime import malloc

if __name__ == "__main__":  # this may start the program again, so it comes first
  malloc.restart_tuned()

from lrdit.config.flags import SHARED_BY_PROCESSES, arguments_of, parse_flags, wants_tracebacks
from lrdit.runtime import startup
from lrdit.runtime.errors import UserError, end_process, print_error


def run(argv: list[str]) -> int:
  """Run a command line and return the exit status."""
  debug, who = wants_tracebacks(argv), ""
  try:
    values = parse_flags(argv)
    if values.help:
      print(__doc__, values.get_help(), sep="\n")
      return 0
    notes = startup.prepare()
    # These import jax, which needs the prepared environment.
    from lrdit.config.resolve import resolve, resolve_for_run
    from lrdit.runtime import cluster, progress

    job = cluster.find_cluster(values.coordinator, values.num_processes, values.process_id)
    if job:
      if values.mode not in SHARED_BY_PROCESSES:
        raise UserError(
          f"--mode={values.mode} is for one process: start it once, or --num_processes=1", 2
        )
      who = job.process_name
      progress.start_logging(debug, who, is_first=True)  # which one is first is not yet known
      cluster.connect(job, shares_sigterm=values.mode == "train")
      who = cluster.process_name()
    startup.open_devices()
    progress.start_logging(debug, who, cluster.is_first())
    for note in notes:
      logging.getLogger("lrdit").warning(note)
    arguments, named = arguments_of(values)
    if values.config is not None:
      config, run = values.config, values.workdir
      arguments[0] = resolve_for_run(config, run) if run else resolve(config)
    if values.dry_run:
      from lrdit.modes.dry_run import dry_run

      dry_run(values.mode, *arguments, **named)
      return 0
    mode = importlib.import_module(f"lrdit.modes.{values.mode}")
    return getattr(mode, values.mode)(*arguments, **named) or 0
  except (Exception, KeyboardInterrupt) as error:
    if who:
      end_process(error, debug, who)
    return print_error(error, debug)


if __name__ == "__main__":
  sys.exit(run(sys.argv))
