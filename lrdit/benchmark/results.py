"""The results of a benchmark, from timings to `benchmark.json` and from that to tables."""

import dataclasses
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lrdit.benchmark import ratios
from lrdit.benchmark.arms import Arms, MatmulPeak, SamplingArm
from lrdit.experiment import Experiment
from lrdit.runtime import parallel
from lrdit.runtime.text import format_table
from lrdit.sampling.sampler import Program

MEMORY_MEANING = (
  "arguments + outputs + temporaries - donated arguments of the compiled training step, per device"
)

Seconds = Mapping[Any, list[float]]  # of each round, by task


def summarize(seconds: Sequence[float], per: int = 1) -> dict[str, Any]:
  """Return the median, the minimum and all of some timings, each divided by `per`."""
  each = [s / per for s in seconds]
  return {"median": statistics.median(each), "min": min(each), "rounds": each}


def _rates(flops: int, seconds: float, peak: float) -> dict[str, float]:
  return {"flops_per_second": flops / seconds, "peak_fraction": flops / seconds / peak}


def training_results(arms: Arms, seconds: Seconds, peak: float) -> dict[str, dict[str, Any]]:
  """Return the results of training by arm; `peak` is in FLOP/s."""
  config, results = arms.config, {}
  steps = config.benchmark.steps
  timings = {name: summarize(seconds["training", name], steps) for name in arms.training}
  for name, arm in arms.training.items():
    step_seconds = timings[name]["median"]
    results[name] = {
      "num_parameters": arm.num_parameters,
      "rank_groups": [list(group) for group in arm.rank_groups],
      "flops_per_step": arm.flops,
      "compile_seconds": arm.compile_seconds,
      "step_seconds": timings[name],
      "steps_per_second": 1 / step_seconds,
      "images_per_second": config.training.batch_size / step_seconds,
      **_rates(arm.flops, step_seconds, peak),
      "memory_bytes": arm.memory_bytes,
      "speedup_over_full": timings["full"]["median"] / step_seconds,
      "full_flops_over_these": arms.training["full"].flops / arm.flops,
    }
  return results


def bucket_results(
  arm: SamplingArm, timings: Mapping[Program, dict[str, Any]], peak: float
) -> list[dict[str, Any]]:
  """Return the results of each program of a sampler, by ascending rank, without guidance first."""
  highest, results = arm.programs[-1], []
  for program in arm.programs:
    seconds, flops = timings[program]["median"], arm.step_flops(program)
    results.append(
      {
        "bucket": program.bucket,
        "is_guided": program.is_guided,
        "solver_steps": arm.solver_steps(program),
        "flops_per_step": flops,
        "step_seconds": timings[program],
        "step_seconds_per_image": seconds / arm.sampler.settings.batch_size,
        **_rates(flops, seconds, peak),
        "time_over_highest_bucket": seconds / timings[highest]["median"],
        "flops_over_highest_bucket": flops / arm.step_flops(highest),
      }
    )
  return results


def sampling_results(arms: Arms, seconds: Seconds, peak: float) -> dict[str, dict[str, Any]]:
  """Return the results of sampling by arm.

  Rates and speed-ups come from the buckets' medians over all rounds. A whole run is timed just
  once, so it only checks them, after its last round.
  """
  config, results = arms.config, {}
  steps = min(config.benchmark.steps, config.sampling.num_steps)
  for name, arm in arms.sampling.items():
    timings = {p: summarize(seconds["program", name, p], steps) for p in arm.programs}
    from_buckets = sum(arm.solver_steps(p) * timings[p]["median"] for p in arm.programs)
    parts = [parts for key, parts in seconds.items() if key[:2] == ("run", name)]
    runs = [sum(p) for p in parts if len(p) == config.benchmark.rounds]
    results[name] = {
      "compile_seconds": arm.compile_seconds,
      "buckets": bucket_results(arm, timings, peak),
      "flops_per_run": arm.run_flops(),
      "run_seconds": summarize(runs) if runs else None,
      "run_seconds_from_buckets": from_buckets,
      "seconds_per_image": from_buckets / arm.sampler.settings.batch_size,
      **_rates(arm.run_flops(), from_buckets, peak),
      "full_flops_over_these": arms.sampling["full"].run_flops() / arm.run_flops(),
    }
  full = results["full"]["seconds_per_image"]
  for entry in results.values():
    entry["speedup_over_full"] = full / entry["seconds_per_image"]
  return results


def describe(full: Experiment, devices: parallel.Devices) -> dict[str, Any]:
  """Return the settings of the full arm, and the software, that the results depend on."""
  config = full.config
  fields = {"model": ("variant", "dtype", "remat", "scan_blocks")}
  fields["sampling"] = ("solver", "num_steps", "guidance_scale")
  fields["sampling"] += ("guidance_min_noise", "guidance_max_noise")
  fields["benchmark"] = ("steps", "sampling_runs", "compile_threads")
  settings = {name: config[group][name] for group, names in fields.items() for name in names}
  return settings | {
    "jax": jax.__version__,
    "optimizer": config.optimizer.name,
    "backend": devices[0].platform,
    "device_kind": devices[0].device_kind,
    "num_devices": len(devices),
    "cpu_count": os.cpu_count(),
    "model": dataclasses.asdict(full.shape),
    "rank": config.rank.to_dict(),
    "batch_size": config.training.batch_size,
    "sampling_batch_size": config.sampling.batch_size,
    "memory_bytes_are": MEMORY_MEANING,
  }


def device_peak_bytes(devices: parallel.Devices) -> int | None:
  """Return the peak memory of the process over its devices; None if unknown."""
  peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
  return max((peak for peak in peaks if peak is not None), default=None)


def make_results(
  arms: Arms, devices: parallel.Devices, peak: MatmulPeak, seconds: Seconds
) -> dict[str, Any]:
  """Return the contents of `benchmark.json` after the rounds of the given seconds."""
  products = summarize(seconds["peak",])
  peak_rate = peak.flops / products["median"]
  results = describe(arms.experiments["full"], devices) | {
    "rounds": len(products["rounds"]),
    "matmul_peak": {
      "size": peak.size,
      "flops_per_second": peak_rate,
      "highest_flops_per_second": peak.flops / products["min"],
      "seconds": products,
    },
    "device_peak_bytes_of_all_arms": device_peak_bytes(devices),
    "training": training_results(arms, seconds, peak_rate),
    "sampling": sampling_results(arms, seconds, peak_rate),
  }
  return results | {"ratios": ratios.ratios(results), "machine": ratios.machine(results)}


# Maps the header of each column to a function that formats an entry of the results.
Columns = Mapping[str, Callable[[Any], str]]
_RATES: Columns = {
  "GFLOP/s": lambda e: f"{e['flops_per_second'] / 1e9:.4g}",
  "of peak": lambda e: f"{100 * e['peak_fraction']:.0f} %",
}
_STEP: Columns = {
  "GFLOPs": lambda e: f"{e['flops_per_step'] / 1e9:.4g}",
  "median s": lambda e: f"{e['step_seconds']['median']:.4g}",
  "min s": lambda e: f"{e['step_seconds']['min']:.4g}",
}
_AGAINST_FULL: Columns = {
  "compile s": lambda e: "-" if (s := e["compile_seconds"]) is None else f"{s:.1f}",
  "speed-up": lambda e: f"{e['speedup_over_full']:.2f}",
  "by FLOPs": lambda e: f"{e['full_flops_over_these']:.2f}",
}
TRAINING_COLUMNS: Columns = {
  "parameters": lambda e: f"{e['num_parameters']:,}",
  **_STEP,
  "steps/s": lambda e: f"{e['steps_per_second']:.4g}",
  "images/s": lambda e: f"{e['images_per_second']:.4g}",
  **_RATES,
  "memory MiB": lambda e: "-" if e["memory_bytes"] is None else f"{e['memory_bytes'] / 2**20:,.0f}",
  **_AGAINST_FULL,
}
BUCKET_COLUMNS: Columns = {
  "in a run": lambda e: str(e["solver_steps"]),
  **_STEP,
  "s/image": lambda e: f"{e['step_seconds_per_image']:.3g}",
  **_RATES,
  "over top bucket": lambda e: f"{e['time_over_highest_bucket']:.3f}",
  "by FLOPs": lambda e: f"{e['flops_over_highest_bucket']:.3f}",
}
RUN_COLUMNS: Columns = {
  "GFLOPs": lambda e: f"{e['flops_per_run'] / 1e9:.4g}",
  "median s": lambda e: f"{e['run_seconds']['median']:.4g}" if e["run_seconds"] else "not run",
  "from buckets s": lambda e: f"{e['run_seconds_from_buckets']:.4g}",
  "s/image": lambda e: f"{e['seconds_per_image']:.3g}",
  **_RATES,
  **_AGAINST_FULL,
}


def _program_name(name: str, arm: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
  buckets, kinds = ({own[key] for own in arm["buckets"]} for key in ("bucket", "is_guided"))
  words = [f", bucket {entry['bucket']}"] if len(buckets) > 1 else []
  words += [", guided" if entry["is_guided"] else ", not guided"] if len(kinds) > 1 else []
  return name + "".join(words)


def format_results(results: Mapping[str, Any]) -> str:
  """Return a readable summary of `benchmark.json`."""
  r, model, peak = results, results["model"], results["matmul_peak"]
  size = f"{model['image_size']}x{model['image_size']}x{model['channels']}"
  head = f"""\
DiT-{r["variant"]} (width {model["hidden_size"]}, depth {model["depth"]}) on {size}, {r["dtype"]}, \
{r["num_devices"]} x {r["device_kind"]}, jax {r["jax"]}
medians of {r["rounds"]} rounds; batch {r["batch_size"]} in training, \
{r["sampling_batch_size"]} in sampling by {r["solver"]} with {r["num_steps"]} steps \
at guidance {r["guidance_scale"]:g}
matmul peak {peak["flops_per_second"] / 1e9:.4g} GFLOP/s, highest \
{peak["highest_flops_per_second"] / 1e9:.4g} ({peak["size"]} squared)
memory: {MEMORY_MEANING}"""
  buckets = {
    _program_name(name, arm, entry): entry
    for name, arm in results["sampling"].items()
    for entry in arm["buckets"]
  }
  tables = [
    format_table("training step", TRAINING_COLUMNS, results["training"]),
    format_table("solver step", BUCKET_COLUMNS, buckets),
    format_table("sampling run", RUN_COLUMNS, results["sampling"]),
  ]
  return "\n\n".join([head, *tables])
