"""Check and time lrdit on one GPU in at most 9 minutes, in parts, and print one table of results.

Parts are the tests marked `gpu` (tests), benchmarks of DiT-B/2 (b2) and DiT-XL/2 (xl2) on latents
in bfloat16, and short runs of every arm of DiT-S/2 on CIFAR-10 (cifar10), for which
--config.data.data_dir names the photographs. Where an environment lacks packages and the network,
bring wheels along (pip download), install them by pip install --no-index --no-deps --target DIR,
and put DIR on PYTHONPATH.

Each part is this module again with --part, in a process of its own. It writes OUTPUT/PART.json step
by step or when it is done, and its output goes to OUTPUT/PART.log. A part that fails or meets its
time limit loses nothing of the others.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lrdit.runtime import startup
from lrdit.runtime.errors import RESTART_STATUS

ROOT = pathlib.Path(__file__).parents[2]
METHODS = ("full", "narrow", "static", "adaptive")

# Shares of the time limit.
SHARES = {"tests": 0.16, "b2": 0.2, "xl2": 0.3, "cifar10": 0.34}
# part: (variant, batch to begin with).
BENCHMARKS = {"b2": ("B/2", 256), "xl2": ("XL/2", 64)}
# Each arm trains for this share of the part's time, from its first line of metrics on.
TRAINING_SHARE = 0.11

BENCHMARK_FLAGS = (
  "--mode=benchmark",
  "--config.data.image_size=256",  # 32x32x4 latents
  "--config.model.dtype=bfloat16",
  "--config.rank.multiple_of=64",
  "--config.sampling.batch_size=64",
  "--config.sampling.guidance_scale=1",
  "--config.benchmark.fit_memory=True",
  "--config.benchmark.steps=4",
  "--config.benchmark.rounds=4",
  "--config.benchmark.compile_threads=6",
  "--config.benchmark.sampling_runs=None",
)
CIFAR10_FLAGS = (
  "--config.model.dtype=bfloat16",
  "--config.rank.multiple_of=64",
  "--config.optimizer.learning_rate=1e-3",
  "--config.optimizer.warmup_steps=200",
  "--config.optimizer.ema_decay=0.995",
  "--config.training.num_steps=1000000",
  "--config.training.log_every_steps=20",
  "--config.training.eval_every_steps=None",
  "--config.training.sample_every_steps=None",
  "--config.training.tensorboard=False",
  "--config.checkpoint.every_steps=1000000",
  "--config.sampling.num_samples=1000",
  "--config.sampling.batch_size=500",
  "--config.sampling.num_steps=25",
  "--config.sampling.guidance_scale=1",
  "--config.evaluation.classifier_steps=500",
  "--config.evaluation.draws=1",
)
# XLA would compile every fusion of a training step in several ways to time them, which takes longer
# than the whole check may take.
FUSION_TUNING = "xla_gpu_experimental_enable_fusion_autotuner"
TINY_FLAGS = (
  "--config.model.hidden_size=32",
  "--config.model.depth=1",
  "--config.model.num_heads=2",
  "--config.model.patch_size=8",
  "--config.model.dtype=float32",
  "--config.rank.multiple_of=2",
  "--config.rank.num_buckets=2",
  '--config.rank.dense_layers=("patch_embed","final_layer/linear")',
  "--config.training.batch_size=16",
  "--config.sampling.batch_size=8",
  "--config.sampling.num_steps=4",
)
TINY_BENCHMARK_FLAGS = (
  "--config.benchmark.matmul_size=64",
  "--config.benchmark.steps=1",
  "--config.benchmark.rounds=1",
)
TINY_CIFAR10_FLAGS = (
  "--config.training.log_every_steps=1",
  "--config.sampling.num_samples=8",
  "--config.evaluation.extractors=()",
)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Write indented JSON."""
  path.write_text(json.dumps(value, indent=2) + "\n")


def run_main(*flags: str, expected: int = 0) -> None:
  """Run a command line of main.py in this process.

  Raises:
    SystemExit: it ended with another status than expected.
  """
  import main

  if (status := main.run(["main.py", *flags])) != expected:
    raise SystemExit(status or "training ended before it was stopped")


def run_tests(args: argparse.Namespace) -> None:
  """Run the tests marked `gpu`; the JSON has each one's outcome as soon as it is known."""
  platform = "cpu" if args.dry_run else "cuda"
  # On a GPU nearly all of the time goes by compiling, on one core for each test.
  dry = ["-p", "tests.one_variant", "tests/model/low_rank_test.py"]
  more = dry if args.dry_run else ["--numprocesses=8"]
  environment = os.environ | {
    "LRDIT_TEST_PLATFORM": platform,
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  }
  process = subprocess.Popen(
    [sys.executable, "-m", "pytest", "-v", "-m", "gpu", *more],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    text=True,
  )
  outcomes: dict[str, str] = {}
  with process:
    for line in process.stdout:
      print(line, end="", flush=True)
      # "tests/x.py::name PASSED [ 5%]"; of several processes "[gw0] [ 5%] PASSED tests/x.py::name".
      outcome = re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line)
      name = re.search(r"tests/\S+::.*?(?= PASSED| FAILED| ERROR| SKIPPED|$)", line)
      if "%]" in line and outcome and name:
        outcomes[name[0].strip()] = outcome[1].lower()
        write_json(args.output / "tests.json", outcomes)
  if process.returncode:
    raise SystemExit(process.returncode)


def run_benchmark(args: argparse.Namespace) -> None:
  """Run `--mode=benchmark` of a variant."""
  workdir = args.output / "benchmarks" / args.part
  tiny = (*TINY_FLAGS, *TINY_BENCHMARK_FLAGS) if args.dry_run else ()
  variant, batch_size = BENCHMARKS[args.part]
  run_main(
    f"--config=configs/imagenet128.py:variant={variant}",
    f"--workdir={workdir}",
    f"--config.training.batch_size={batch_size}",
    *BENCHMARK_FLAGS,
    *tiny,
  )
  write_json(
    args.output / f"{args.part}.json", json.loads((workdir / "benchmark.json").read_text())
  )


@contextlib.contextmanager
def stop_after(seconds: float, workdir: pathlib.Path) -> Iterator[None]:
  """Send this process SIGTERM some seconds after a run's first line of metrics.

  That line comes when the step is compiled, which takes longer in some arms.
  """
  over, metrics = threading.Event(), workdir / "metrics.jsonl"

  def watch() -> None:
    while not (metrics.exists() and metrics.stat().st_size) and not over.wait(0.02):
      pass
    if not over.wait(seconds):
      os.kill(os.getpid(), signal.SIGTERM)

  thread = threading.Thread(target=watch)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()


def run_cifar10(args: argparse.Namespace) -> None:
  """Train every arm for the same time, sample and evaluate it; the last arm in a dry run."""
  flags, seconds = [*CIFAR10_FLAGS], TRAINING_SHARE * args.limit
  if args.dry_run:
    rng, path = np.random.default_rng(0), args.output / "noise.npz"
    image = rng.integers(0, 256, (40, 32, 32, 3), np.uint8)
    np.savez(path, image=image, label=np.arange(40) % 10)
    flags += [*TINY_FLAGS, *TINY_CIFAR10_FLAGS]
    flags += ["--config.data.name=npz", f"--config.data.data_dir={path}"]
    seconds = 0.1
  arms = {}
  shutil.rmtree(args.output / "cifar10", ignore_errors=True)  # it would be trained on
  for method in METHODS[-1:] if args.dry_run else METHODS:
    workdir = args.output / "cifar10" / method
    common = [
      f"--config=configs/cifar10.py:method={method}",
      f"--workdir={workdir}",
      f"--config.evaluation.features_dir={args.output / 'cifar10' / 'features'}",
      *flags,
      *args.overrides,
    ]
    start = time.perf_counter()
    with stop_after(seconds, workdir):
      run_main(*common, "--mode=train", expected=RESTART_STATUS)
    trained = time.perf_counter()
    run_main(*common, "--mode=sample")
    sampled = time.perf_counter()
    run_main(*common, "--mode=evaluate")
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    speeds = [line.get("train/images_per_second") for line in metrics]
    arms[method] = {
      "training_seconds": seconds,
      "images_per_second": statistics.median(filter(None, speeds)) if any(speeds) else None,
      "whole_seconds": {
        "train": trained - start,
        "sample": sampled - trained,
        "evaluate": time.perf_counter() - sampled,
      },
      "evaluation": json.loads((workdir / "evaluation.json").read_text()),
    }
    write_json(args.output / "cifar10.json", arms)


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
  "tests": run_tests,
  "b2": run_benchmark,
  "xl2": run_benchmark,
  "cifar10": run_cifar10,
}


def part_command(
  name: str, arguments: Sequence[str], output: pathlib.Path, limit: float
) -> list[str]:
  """Return the command line of one part."""
  module = [sys.executable, "-m", "tests.benchmarks.gpu_check"]
  return [*module, f"--part={name}", f"--limit={limit}", f"--output={output}", *arguments]


def run_part(name: str, arguments: Sequence[str], output: pathlib.Path, limit: float) -> str:
  """Run a part in a process group of its own; return how it ended, in words."""
  environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "PYTHONUNBUFFERED": "1"} | os.environ
  start = time.monotonic()
  with (output / f"{name}.log").open("w") as log:
    process = subprocess.Popen(
      part_command(name, arguments, output, limit),
      cwd=ROOT,
      env=environment,
      stdout=log,
      stderr=log,
      start_new_session=True,
    )
    try:
      status = process.wait(limit)
      end = "done" if status == 0 else f"failed with status {status}, see {name}.log"
    except subprocess.TimeoutExpired:
      end = f"ended at its limit of {limit:.0f} s"
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()
  return f"{end} ({time.monotonic() - start:.0f} s)"


def read(path: pathlib.Path) -> dict[str, Any]:
  """Return what a part has written, or nothing."""
  return json.loads(path.read_text()) if path.exists() else {}


def benchmark_rows(title: str, result: dict[str, Any]) -> Iterator[list[str]]:
  """Yield a row for each arm's training and sampling."""
  size = result["batch_size"]
  for work, images_per_second in (
    ("training", lambda e: e["images_per_second"]),
    ("sampling", lambda e: 1 / e["seconds_per_image"]),
  ):
    batch = size if work == "training" else result["sampling_batch_size"]
    for arm, entry in result[work].items():
      yield [
        f"{title}, `{arm}`, {work}, batch {batch}",
        f"{images_per_second(entry):,.1f}",
        f"{100 * entry['peak_fraction']:.0f} %",
        f"{entry['speedup_over_full']:.2f}",
        f"{entry['full_flops_over_these']:.2f}",
        "",
      ]


def cifar10_rows(arms: dict[str, Any]) -> Iterator[list[str]]:
  """Yield a row for each arm's short run."""
  for method, arm in arms.items():
    evaluation = arm["evaluation"]
    figures = evaluation.get("samples", {}).get("default", {}).get("figures", {})
    parts = [f"{evaluation['checkpoint_step']} steps"]
    parts += [f"held-out loss {evaluation['held_out']['ema']['loss']:.4f}"]
    parts += [f"{n} {figures[n]:.4g}" for n in figures if n.endswith("frechet_distance")]
    speed = f"{arm['images_per_second']:,.0f}" if arm["images_per_second"] else "-"
    title = f"S/2 on CIFAR-10, `{method}`, {arm['training_seconds']:.0f} s of training"
    yield [title, speed, "", "", "", ", ".join(parts)]


def table(output: pathlib.Path, ends: dict[str, str]) -> str:
  """Return the results of all parts as one Markdown table."""
  header = ["what", "images/s", "of matmul peak", "speed-up over full", "by FLOPs", "result"]
  rows = [header, ["---"] * len(header)]
  if tests := read(output / "tests.json"):
    counted = collections.Counter(tests.values())
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counted.items()))
    rows.append(["tests marked `gpu`", "", "", "", "", counts])
  for name, (variant, _) in BENCHMARKS.items():
    if result := read(output / f"{name}.json"):
      rows += benchmark_rows(f"{variant}, {result['dtype']}", result)
  rows += cifar10_rows(read(output / "cifar10.json"))
  rows += [[f"part {name}", "", "", "", "", end] for name, end in ends.items()]
  return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Return the arguments, with those for main.py as `overrides`."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument("--minutes", type=float, default=9.0, help="that all parts together may take")
  parser.add_argument("--dry_run", action="store_true", help="tiny shapes and noise on a CPU")
  parser.add_argument(
    "--parts", type=lambda text: text.split(","), default=list(PARTS), help="some of them"
  )
  parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
  parser.add_argument("--limit", type=float, help=argparse.SUPPRESS)  # seconds that --part may take
  args, args.overrides = parser.parse_known_args(argv)
  if unknown := set(args.parts) - set(PARTS):
    parser.error(f"--parts={','.join(unknown)} is unknown: use some of {','.join(PARTS)}")
  if unknown := [flag for flag in args.overrides if not flag.startswith("--config.")]:
    parser.error(f"{unknown[0]!r} is not of the form --config.GROUP.FIELD=VALUE")
  return args


def main(argv: Sequence[str] | None = None) -> int:
  """Run all parts, or the one that --part names; return the exit status."""
  args = parse(argv)
  if args.part:
    startup.add_xla_flag(FUSION_TUNING, "false")
    PARTS[args.part](args)
    return 0
  args.output.mkdir(parents=True, exist_ok=True)
  if args.dry_run:
    os.environ["JAX_PLATFORMS"] = "cpu"
  arguments = list(sys.argv[1:] if argv is None else argv)
  has_data = args.dry_run or any(f.startswith("--config.data.data_dir=") for f in args.overrides)
  end_of_all, ends = time.monotonic() + 60 * args.minutes, {}
  for name in args.parts:
    if name == "cifar10" and not has_data:
      ends[name] = "left out: give --config.data.data_dir"
      continue
    left = end_of_all - time.monotonic()
    (args.output / f"{name}.json").unlink(missing_ok=True)  # of an earlier check
    # What earlier parts did not need is there for the later ones.
    later = sum(SHARES[n] for n in args.parts[args.parts.index(name) :])
    ends[name] = run_part(name, arguments, args.output, left * SHARES[name] / later)
    print(f"{name}: {ends[name]}", flush=True)
  text = table(args.output, ends)
  (args.output / "table.md").write_text(text + "\n")
  print(text)
  return int(any("failed" in end or "ended" in end for end in ends.values()))


if __name__ == "__main__":
  sys.exit(main())
