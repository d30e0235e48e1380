"""What is kept of a benchmark and compared: its ratios, and the machine that they were taken on.

The functions read `benchmark.json` of any version, with the arms that it has.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

Results = Mapping[str, Any]  # benchmark.json

# Each arm's time over another's, all else equal.
PAIRS = (("static", "full"), ("adaptive", "full"), ("adaptive", "static"), ("narrow", "full"))
# The field of an arm's results that holds its time.
TIMES = {"training": "step_seconds", "sampling": "seconds_per_image"}
CPU_INFO = pathlib.Path("/proc/cpuinfo")


def seconds(results: Results) -> dict[str, float]:
  """Return the time of each arm's training step and sampled image, and of the matrix products.

  Names are such as "training/adaptive".
  """
  found = {"matmul": float(results["matmul_peak"]["seconds"]["median"])}
  for kind, field in TIMES.items():
    for name, arm in results[kind].items():
      value = arm[field]
      found[f"{kind}/{name}"] = float(value["median"] if isinstance(value, Mapping) else value)
  return found


def ratios(results: Results) -> dict[str, float]:
  """Return the ratios of times that are there, by names such as "training/adaptive/full".

  A variant of an arm is compared with the arm, as in "training/adaptive, muon/adaptive".
  "sampling/lowest/highest" is that of a step in the adaptive arm's lowest and highest bucket. It is
  left out where only some steps are guided.
  """
  times, found = seconds(results), {}
  for kind in TIMES:
    variants = [(name, name.partition(",")[0]) for name in results[kind] if "," in name]
    for arm, other in (*PAIRS, *variants):
      if {f"{kind}/{arm}", f"{kind}/{other}"} <= times.keys():
        found[f"{kind}/{arm}/{other}"] = times[f"{kind}/{arm}"] / times[f"{kind}/{other}"]
  buckets = results["sampling"].get("adaptive", {}).get("buckets", [])
  if len(buckets) > 1 and len({bucket.get("is_guided") for bucket in buckets}) == 1:
    lowest, highest = (bucket["step_seconds"]["median"] for bucket in (buckets[0], buckets[-1]))
    found["sampling/lowest/highest"] = lowest / highest
  return found


def cpu_model() -> str:
  """Return the CPU's model as Linux names it, or "unknown"."""
  try:
    lines = CPU_INFO.read_text().splitlines()
  except OSError:
    return "unknown"
  names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
  return next(names, "unknown")


def machine(results: Results) -> dict[str, Any]:
  """Return what ratios depend on of this machine, which `results` were taken on.

  A machine is told apart by its parts, not by its name.
  """
  names = ("backend", "device_kind", "num_devices", "jax")
  return {name: results[name] for name in names} | {
    "cpu_model": cpu_model(),
    "num_cores": os.cpu_count(),
    "matmul_flops_per_second": results["matmul_peak"]["flops_per_second"],
  }


def settings(results: Results) -> dict[str, Any]:
  """Return what was timed: sizes, dtype, batches, solver, ranks and the repetitions."""
  names = ("variant", "model", "dtype", "remat", "scan_blocks", "rank", "optimizer", "batch_size")
  names += ("sampling_batch_size", "solver", "num_steps", "guidance_scale")
  names += ("guidance_min_noise", "guidance_max_noise", "steps", "rounds")
  return {name: results[name] for name in names if name in results}


def accepted(results: Results) -> dict[str, Any]:
  """Return what tests/benchmarks/accepted.json keeps of a benchmark.json."""
  kept = {name: results[name] for name in ("machine", "ratios")}
  return kept | {"settings": settings(results)}
