"""Small configs, and the real command line in a subprocess."""

import json
import os
import pathlib
import re
import subprocess
import sys

from configs import digits
from lrdit.config.resolve import resolve
from lrdit.config.schema import FIELDS
from lrdit.experiment import Experiment

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"

SHOWING_IMPORTS = {"PYTHONPROFILEIMPORTTIME": "1"}  # a variable of the environment
# Packages that take long to import, and that neither training nor sampling needs.
HEAVY = {"tensorflow", "tensorflow_datasets", "matplotlib", "torch"}

# A model that compiles in seconds: one block of width 32, whose every kind of layer is factorized,
# on the real digits.
OVERRIDES = {
  "optimizer.name": "adamw",  # compiles faster than muon
  "optimizer.learning_rate": 2e-3,
  "model.hidden_size": 32,
  "model.depth": 1,
  "model.num_heads": 2,
  "rank.multiple_of": 2,
  "rank.num_buckets": 2,
  "rank.dense_layers": ("patch_embed", "final_layer/linear"),
  "training.batch_size": 16,
  "training.num_steps": 8,
  "training.log_every_steps": 1,
  "training.eval_every_steps": None,
  "training.sample_every_steps": None,
  "training.tensorboard": False,
  "checkpoint.every_steps": 4,
  "sampling.num_samples": 10,
  "sampling.batch_size": 4,
  "sampling.num_steps": 10,
  "evaluation.extractors": ("pixel",),
  "evaluation.draws": 1,
}

# Two blocks, of which the first differs, and three ranks, for tests that are about them.
DEEPER = {
  "model__depth": 2,
  "rank__num_buckets": 3,
  "rank__dense_layers": FIELDS["rank.dense_layers"].default,
}

# For a process that a test kills: it reads the shared cache of compiled programs and writes nothing
# there, as jax does not write an entry at once.
READ_ONLY_CACHE = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}


def tiny_config(arg="", **overrides):
  """A resolved config; override fields as group__field=value."""
  config = digits.get_config(arg).unlock()
  fields = OVERRIDES | {key.replace("__", "."): value for key, value in overrides.items()}
  for field, value in fields.items():
    config.update_from_flattened_dict({field: value})
  return resolve(config)


def command(workdir, *flags, arg=""):
  """The command line of a tiny run; later flags win."""
  fields = [f"--config.{field}={value}" for field, value in OVERRIDES.items()]
  config = f"--config=configs/digits.py:{arg}" if arg else "--config=configs/digits.py"
  return [sys.executable, "main.py", config, f"--workdir={workdir}", *fields, *flags]


def environment(num_devices=None, **extra):
  """That of a command line, of one device unless the tests' own environment has more."""
  count = str(num_devices or os.environ.get("JAX_NUM_CPU_DEVICES", 1))
  return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": count} | extra


def run_main(workdir, *flags, arg="", num_devices=None, check=True, timeout=300, **extra):
  """Runs the command line to its end; returns the completed process."""
  done = subprocess.run(
    command(workdir, *flags, arg=arg),
    cwd=ROOT,
    env=environment(num_devices, **extra),
    capture_output=True,
    text=True,
    timeout=timeout,
    check=False,
  )
  assert not check or done.returncode == 0, done.stderr
  return done


def imported_packages(stderr):
  """The packages that a process imported which was started with `SHOWING_IMPORTS`."""
  names = re.findall(r"^import time: .*\| +(\w+)", stderr, re.MULTILINE)
  assert "jax" in names
  return {*names}


def load_digits(split):
  """The real digits."""
  return Experiment(tiny_config()).source(split)


def read_metrics(workdir):
  lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def losses(workdir):
  return [line["train/loss"] for line in read_metrics(workdir)]
