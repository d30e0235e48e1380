"""Print the resolved run of a command without running it: `--dry_run`."""

import collections
import re

from ml_collections import ConfigDict

from lrdit.benchmark.arms import arm_experiments
from lrdit.config import derive
from lrdit.config.run_config import check_workdir, choose_checkpoint
from lrdit.experiment import Experiment
from lrdit.model import dit, flops
from lrdit.pretrained import open_pretrained, open_run
from lrdit.runtime import parallel
from lrdit.runtime.workdir import has_begun
from lrdit.train import run_files

# The files of each mode below --workdir, or --output.
WRITES = {
  "train": "config.json, data.json, changes.jsonl, metrics.jsonl, train.log, checkpoints/, "
  "samples/step_*.png",
  "sample": "samples/{name}/",
  "evaluate": "evaluation.json, features/",
  "analyze": "analysis/",
  "benchmark": "benchmark.json",
  "export": "weights, config.json, README.md",
  "encode": "latents of both splits and their manifest",
}


def dry_run(
  mode: str, config: ConfigDict, path: str, output: str = "", checkpoint: str = "", format: str = ""
) -> None:
  """Run `--dry_run`: print the resolved run of a mode; `path` is --workdir, or encode's --output.

  Raise a UserError where the mode itself would for its config, workdir, devices and data.
  """
  chooses_ranks = mode == "train" and derive.lacks_ranks(config)
  experiment = open_run(config)[0] if chooses_ranks else Experiment(config)
  devices, s = parallel.all_devices(), config.sampling
  if mode == "benchmark":
    arm_experiments(config)
  if mode != "encode":
    needs_no_run = mode in ("train", "benchmark") or (mode == "analyze" and not _sections(config))
    check_workdir(path, config, create=needs_no_run)
  is_all = mode in ("evaluate", "analyze") and checkpoint == run_files.ALL
  chosen = choose_checkpoint(path, config, "" if is_all else checkpoint)
  if mode == "train" and config.init.from_ and not has_begun(chosen.run):
    open_pretrained(config, experiment.shape).warn()
  for group in _batch_groups(mode, config):
    parallel.check_divisible(f"config.{group}.batch_size", config[group].batch_size, devices)
  counts = _count_data(mode, experiment)
  named = [f"{split} {count}" for split, count in counts.items()]
  shape, plan = experiment.shape, experiment.plan
  buckets = flops.describe_buckets(shape, plan)
  lines = {
    "mode": mode,
    "method": config.method,
    "model": (
      f"DiT-{config.model.variant}: {shape.depth} blocks of width {shape.hidden_size} on "
      f"{shape.image_size}x{shape.image_size}x{shape.channels}, {shape.num_classes} classes"
    ),
    "parameters": f"{flops.num_parameters(shape, plan):,}",
    "MACs": (
      f"{flops.mean_forward_macs(shape, plan):,.0f} of a forward pass, mean over t; "
      f"{experiment.sampling_macs:,} of a sample by {s.num_steps} steps of {s.solver}"
    ),
    "rank buckets": ", ".join(f"{b['timesteps']} timesteps" for b in buckets),
  }
  lines |= {f"  {kind}": ranks for kind, ranks in _plan_by_kind(experiment).items()}
  if mode == "train":
    experiment = experiment.for_examples(counts["train"])
    training = experiment.config.training
    epochs = training.num_steps * training.batch_size / counts["train"]
    text = f"{training.num_steps:,} steps of {training.batch_size} examples, {epochs:.1f} epochs"
    lines["training"] = text
  lines |= {
    "data": f"{config.data.name}: {', '.join(named) or 'not read'}",
    "devices": f"{len(devices)} x {devices[0].device_kind}",
    "writes": f"below {output or chosen.output}: {_writes(mode, config)}",
  }
  width = max(map(len, lines))
  print("\n".join(f"{key:{width}}  {value}" for key, value in lines.items()))


def _sections(config: ConfigDict) -> set[str]:
  """Return the sections of an analysis that read the trained run."""
  return {*config.analysis.sections} - {"flops"}


def _batch_groups(mode: str, config: ConfigDict) -> tuple[str, ...]:
  """Return the groups of the config whose batch size the mode divides over the devices."""
  if mode == "analyze":
    return ("training",) if "truncation" in _sections(config) else ()
  groups = {"sample": ("sampling",), "benchmark": ("training", "sampling"), "encode": ()}
  return groups.get(mode, ("training",))


def _count_data(mode: str, experiment: Experiment) -> dict[str, int]:
  """Return the number of examples of each split that the mode reads."""
  config = experiment.config
  splits = {"train": ("train", "eval"), "encode": ("train", "eval"), "evaluate": ("eval",)}
  read = splits.get(mode, ())
  if mode == "analyze":
    by_section = {"gradients": "train", "truncation": "eval"}
    read = [by_section[name] for name in by_section if name in _sections(config)]
  source = experiment.image_source if mode == "encode" else experiment.source
  counts = {split: len(source(split)) for split in read}
  if mode == "evaluate" and config.evaluation.extractors:
    split = config.evaluation.reference_split
    counts[f"images of {split}"] = len(experiment.image_source(split))
  return counts


def _writes(mode: str, config: ConfigDict) -> str:
  """Return the files that the mode writes."""
  training, files = config.training, [WRITES[mode].format(name=config.sampling.name)]
  if mode == "train":
    files += ["tensorboard/"] if training.tensorboard else []
    files += ["profile/"] if training.profile_steps else []
  return ", ".join(files)


def _plan_by_kind(experiment: Experiment) -> dict[str, str]:
  """Return the ranks of each kind of layer, summed up over the blocks."""
  kinds: dict[tuple[str, str], int] = collections.Counter()
  for name in dit.layer_shapes(experiment.shape):
    ranks = experiment.plan.by_name.get(name)
    active = f"rank {', '.join(map(str, ranks.active))}" if ranks else "dense"
    kinds[re.sub(r"^blocks_\d+", "blocks_*", name), active] += 1
  found: dict[str, list[str]] = collections.defaultdict(list)
  for (kind, active), count in kinds.items():
    found[kind].append(f"{count} of {active}" if kind.startswith("blocks") else active)
  return {kind: "; ".join(entries) for kind, entries in found.items()}
