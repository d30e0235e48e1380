"""Train, sample and evaluate several arms, one after another, and report them on one page.

Usage: [RUNS=DIR] bash launch/NAME.sh [--config.GROUP.FIELD=VALUE ...]
where NAME is digits, schedules, cifar10, celeba or imagenet128.

RUNS       directory of the workdirs NAME_METHOD and the page NAME_report (default runs)
SEEDS      digits and schedules: the seeds of the runs digits_METHOD_SEED (default "0 1 2")
LATENTS    celeba and imagenet128: directory of the latents (default data/NAME_latents), which are
           encoded first unless they are there; --config.vae.path=VAE names the VAE
CLASSES    imagenet128: train on the first N classes (default 1000), in other RUNS for each N
--config   overrides for the encoding and every arm

Relative directories are relative to where you are. Each config's header says how to get its data.
Ctrl-C or SIGTERM stops the command with status 75 or 143; started again, it goes on and repeats
nothing. A mistake ends it with status 1 or 2. A higher training.num_steps prolongs finished arms.
"""

import itertools
import os
import pathlib
import signal
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
METHODS = ("full", "narrow", "static", "adaptive")
# Fields that the commands set themselves.
SET_BY_ALL = ("method=", "vae.latents_dir=")
SET_BY_DIGITS = (*SET_BY_ALL, "seed=", "evaluation.features_dir=")
SET_BY_SCHEDULES = (*SET_BY_DIGITS, "rank.schedule=", "rank.analysis=", "rank.measured_")


def fail(message: str) -> None:
  """Exit with the status of a mistake."""
  print(f"error: {message} (see --help)", file=sys.stderr)
  sys.exit(2)


def run_main(title: str, mode: str, *flags: str) -> None:
  """Run main.py to its end, passing signals on; exit with its status unless that is 0."""
  print(f"== {title}: {mode}", file=sys.stderr, flush=True)
  # In a process group of its own, it gets a Ctrl-C once: a second signal would kill it.
  command = [sys.executable, str(ROOT / "main.py"), f"--mode={mode}", *flags]
  process = subprocess.Popen(command, process_group=0)
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda *_: process.terminate())
  if status := process.wait():
    sys.exit(128 - status if status < 0 else status)


def run_arm(title: str, workdir: pathlib.Path, *flags: str) -> str:
  """Train, sample and evaluate a run, each as far as it is not done; return its workdir."""
  for mode in ("train", "sample", "evaluate"):
    run_main(title, mode, *flags, f"--workdir={workdir}")
  return str(workdir)


def run_dataset(name: str, runs: pathlib.Path, overrides: list[str]) -> None:
  """Run the four arms on a dataset, on its latents if it has any."""
  config, arguments = f"--config={ROOT / 'configs' / name}.py", ""
  if name == "imagenet128":
    classes = os.environ.get("CLASSES") or "1000"
    if not classes.isdecimal() or not 1 <= int(classes) <= 1000:
      fail(f"CLASSES={classes} is not a number from 1 to 1000")
    arguments = f",classes={classes}"
  if name != "cifar10":
    latents = pathlib.Path(os.environ.get("LATENTS") or f"data/{name}_latents").resolve()
    if not (latents / "manifest.json").exists() or (latents / "progress.json").exists():
      run_main(name, "encode", config, f"--output={latents}", *overrides)
    overrides = [f"--config.vae.latents_dir={latents}", *overrides]
  flags = {method: [f"{config}:method={method}{arguments}", *overrides] for method in METHODS}
  workdirs = [run_arm(f"{name}, {m}", runs / f"{name}_{m}", *flags[m]) for m in METHODS]
  run_main(name, "report", f"--output={runs}/{name}_report", f"--workdirs={','.join(workdirs)}")


def run_digits(name: str, runs: pathlib.Path, overrides: list[str]) -> None:
  """Run the arms on the digits with several seeds; of "schedules", an arm for each r(t) too."""
  seeds = (os.environ.get("SEEDS") or "0 1 2").split()
  # One classifier for all, so that their metrics can be compared, and one r(t) for all seeds.
  overrides = [*overrides, f"--config.evaluation.features_dir={runs / 'digits_features'}"]
  first = runs / f"digits_full_{seeds[0]}"
  arms: dict[str, list[str]] = {method: [] for method in METHODS}
  if name == "schedules":
    for schedule in ("measured", "increasing", "constant"):
      arms[schedule] = [f"--config.rank.schedule={schedule}"]
    arms["measured"] += [f"--config.rank.analysis={first / 'analysis' / 'truncation.json'}"]
  workdirs = []
  for seed, arm in itertools.product(seeds, arms):
    title, method = f"digits, {arm}, seed {seed}", arm if arm in METHODS else "adaptive"
    config = f"--config={ROOT / 'configs' / 'digits.py'}:method={method}"
    flags, workdir = [config, *overrides, f"--config.seed={seed}"], runs / f"digits_{arm}_{seed}"
    workdirs.append(run_arm(title, workdir, *flags, *arms[arm]))
    if name == "schedules" and workdir == first:
      run_main(title, "analyze", *flags, f"--workdir={first}")
  page = "digits_report" if name == "digits" else "digits_schedules"
  run_main(name, "report", f"--output={runs / page}", f"--workdirs={','.join(workdirs)}")


def main(name: str, *overrides: str) -> None:
  """Run what a launch script names."""
  if {"-h", "--help"} & set(overrides):
    print(__doc__.strip())
    return
  fields = {"digits": SET_BY_DIGITS, "schedules": SET_BY_SCHEDULES}.get(name, SET_BY_ALL)
  for argument in overrides:
    if not argument.startswith("--config.") or "=" not in argument:
      fail(f"{argument!r} is not of the form --config.GROUP.FIELD=VALUE")
    if argument.removeprefix("--config.").startswith(fields):
      fail(f"{argument}: this command sets the field itself")
  run = run_digits if name in ("digits", "schedules") else run_dataset
  run(name, pathlib.Path(os.environ.get("RUNS") or "runs").resolve(), list(overrides))


if __name__ == "__main__":
  main(*sys.argv[1:])
