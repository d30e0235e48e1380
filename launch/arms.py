"""Train, sample and evaluate several arms, one after another, and report them on one page.

Usage: [RUNS=DIR] bash launch/NAME.sh [STUDY] [--config.GROUP.FIELD=VALUE ...]
where NAME is digits, cifar10, celeba or imagenet128

STUDY      digits: arms (default), adamw, schedules, rates, frontier, ablation or compression
           cifar10: photographs, rates, short, ablation or compression, all of DiT-XS/4
RUNS       directory of the workdirs (NAME_METHOD or NAME_ARM_SEED) and pages (default runs)
SEEDS      the seeds of a study
LATENTS    celeba and imagenet128: directory of the latents (default data/NAME_latents), which are
           encoded first unless they are there; --config.vae.path=VAE names the VAE
CLASSES    imagenet128: train on the first N classes (default 1000), in other RUNS for each N
--config   overrides for the encoding and every arm

Relative directories are relative to where you are. Ctrl-C or SIGTERM stops the command with status
75 or 143; started again, it goes on and repeats nothing. A mistake ends it with status 1 or 2.
"""

import itertools
import os
import pathlib
import signal
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from configs.studies import METHODS, STUDIES  # noqa: E402  a script finds only its own directory

SET_BY_ALL, SET_BY_STUDIES = ("method", "vae.latents_dir"), ("seed", "evaluation.features_dir")


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
  check_overrides(overrides, *SET_BY_ALL)
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


def run_study(name: str, study: str, runs: pathlib.Path, overrides: list[str]) -> None:
  """Run the arms of a study of a dataset with several seeds."""
  default_seeds, arms_of, analyzed = STUDIES[name][study]
  seeds = (os.environ.get("SEEDS") or default_seeds).split()
  first, workdirs, arms = runs / f"{name}_full_{seeds[0]}", [], arms_of(runs, seeds[0])
  fields = [field.partition("=")[0] for arm in arms.values() for field in arm.fields]
  check_overrides(overrides, *SET_BY_ALL, *SET_BY_STUDIES, *fields)
  # One classifier for all, so that their metrics can be compared.
  overrides = [*overrides, f"--config.evaluation.features_dir={runs / f'{name}_features'}"]
  for seed, (own, arm) in itertools.product(seeds, arms.items()):
    title, workdir = f"{name}, {own}, seed {seed}", runs / f"{name}_{own}_{seed}"
    config = f"--config={ROOT / 'configs' / name}.py:method={arm.argument}"
    flags = [config, *overrides, f"--config.seed={seed}", *(f"--config.{f}" for f in arm.fields)]
    workdirs.append(run_arm(title, workdir, *flags))
    if analyzed and workdir == first:
      run_main(title, "analyze", *flags, f"--workdir={first}")
  run_main(name, "report", f"--output={runs}/{name}_{study}", f"--workdirs={','.join(workdirs)}")


def check_overrides(overrides: list[str], *own: str) -> None:
  """Fail for an override that is no config field, or one of the command's own fields."""
  for argument in overrides:
    if not argument.startswith("--config.") or "=" not in argument:
      fail(f"{argument!r} is not of the form --config.GROUP.FIELD=VALUE")
    if argument.removeprefix("--config.").partition("=")[0] in own:
      fail(f"{argument}: this command sets the field itself")


def main(name: str, *arguments: str) -> None:
  """Run what a launch script names."""
  if {"-h", "--help"} & set(arguments):
    print(__doc__.strip())
    return
  runs, overrides = pathlib.Path(os.environ.get("RUNS") or "runs").resolve(), list(arguments)
  studies, default = STUDIES.get(name, {}), "arms" if name == "digits" else None
  study = default if not overrides or overrides[0].startswith("-") else overrides.pop(0)
  if study and study not in studies:
    fail(f"{study!r} is no study of {name}: use one of {', '.join(studies) or 'none'}")
  run_study(name, study, runs, overrides) if study else run_dataset(name, runs, overrides)


if __name__ == "__main__":
  main(*sys.argv[1:])
