"""Train, sample and evaluate several arms, one after another, and report them on one page.

Usage: [RUNS=DIR] bash launch/NAME.sh [STUDY] [--config.GROUP.FIELD=VALUE ...]
where NAME is digits, cifar10, celeba or imagenet128. Studies of the digits are arms (the default),
adamw (the same by AdamW), schedules, rates (learning rates), frontier (ratios) and ablation.

RUNS       directory of the workdirs NAME_METHOD and the page NAME_report (default runs)
SEEDS      digits: the seeds of the runs digits_ARM_SEED, reported in digits_STUDY (default "0 1 2";
           frontier "0 1", rates and ablation "0")
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
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
METHODS = ("full", "narrow", "static", "adaptive")
# The studies of the digits with their seeds.
STUDIES = {
  "arms": "0 1 2",
  "adamw": "0 1 2",
  "schedules": "0 1 2",
  "rates": "0",
  "frontier": "0 1",
  "ablation": "0",
}
RATES, RATIOS = (0.002, 0.004, 0.016), (0.1, 0.25, 0.35, 0.7)
# Each changes one choice of the adaptive arm.
ABLATION = {
  "bands": ("optimizer.factor_update=bands",),
  "lora_muon": ("optimizer.factor_update=lora_muon",),
  "spectron": ("optimizer.factor_update=spectron",),
  "fan_in": ("optimizer.factor_rates=fan_in",),
  "adamw_rate": ("optimizer.learning_rate=0.002", "optimizer.muon_learning_rate_ratio=4.0"),
  "dense_adaln": (
    "rank.dense_layers=('patch_embed','blocks_0/mlp','final_layer','t_embedder','blocks_*/adaln')",
  ),
  "wide": ("model.hidden_size=160", "rank.ratio=0.25"),
}
# Fields that the commands set themselves, beside those of a study's arms.
SET_BY_ALL, SET_BY_DIGITS = ("method", "vae.latents_dir"), ("seed", "evaluation.features_dir")


class Arm(NamedTuple):
  """An arm of the digits: its method, perhaps with more of the recipe's arguments, and fields."""

  argument: str
  fields: tuple[str, ...] = ()  # FIELD=VALUE


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


def arms_of(study: str, analysis: pathlib.Path) -> dict[str, Arm]:
  """Return the arms of a study of the digits by name.

  An arm has one name in all studies, so that studies share its runs. `analysis` determines the
  measured schedule.
  """
  methods = {method: Arm(method) for method in METHODS}
  if study == "schedules":
    own = {name: (f"rank.schedule={name}",) for name in ("measured", "increasing", "constant")}
    own["measured"] += (f"rank.analysis={analysis}",)
    return methods | {name: Arm("adaptive", fields) for name, fields in own.items()}
  if study == "adamw":
    return {f"{m}_adamw": Arm(f"{m},recipe=dissertation") for m in METHODS}
  if study == "rates":
    pairs = itertools.product(RATES, METHODS)
    own = {f"{m}_rate{r}": Arm(m, (f"optimizer.learning_rate={r}",)) for r, m in pairs}
    return methods | own
  if study == "frontier":
    pairs = itertools.product(RATIOS, METHODS[1:])
    return methods | {f"{m}_ratio{r}": Arm(m, (f"rank.ratio={r}",)) for r, m in pairs}
  if study == "ablation":
    choices = {name: Arm("adaptive", fields) for name, fields in ABLATION.items()}
    return {"adaptive": methods["adaptive"]} | choices
  return methods


def run_digits(study: str, runs: pathlib.Path, overrides: list[str]) -> None:
  """Run the arms of a study of the digits with several seeds."""
  seeds = (os.environ.get("SEEDS") or STUDIES[study]).split()
  first = runs / f"digits_full_{seeds[0]}"
  arms = arms_of(study, first / "analysis" / "truncation.json")
  fields = [field.partition("=")[0] for arm in arms.values() for field in arm.fields]
  check_overrides(overrides, *SET_BY_ALL, *SET_BY_DIGITS, *fields)
  # One classifier for all, so that their metrics can be compared.
  overrides = [*overrides, f"--config.evaluation.features_dir={runs / 'digits_features'}"]
  workdirs = []
  for seed, (name, arm) in itertools.product(seeds, arms.items()):
    title, workdir = f"digits, {name}, seed {seed}", runs / f"digits_{name}_{seed}"
    config = f"--config={ROOT / 'configs' / 'digits.py'}:method={arm.argument}"
    flags = [config, *overrides, f"--config.seed={seed}", *(f"--config.{f}" for f in arm.fields)]
    workdirs.append(run_arm(title, workdir, *flags))
    if study == "schedules" and workdir == first:
      run_main(title, "analyze", *flags, f"--workdir={first}")
  page = f"--output={runs / f'digits_{study}'}"
  run_main("digits", "report", page, f"--workdirs={','.join(workdirs)}")


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
  if name != "digits":
    check_overrides(overrides, *SET_BY_ALL)
    run_dataset(name, runs, overrides)
    return
  study = overrides.pop(0) if overrides and not overrides[0].startswith("-") else "arms"
  if study not in STUDIES:
    fail(f"{study!r} is no study of the digits: use one of {', '.join(STUDIES)}")
  run_digits(study, runs, overrides)


if __name__ == "__main__":
  main(*sys.argv[1:])
