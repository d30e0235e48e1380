"""Arms, which are runs that differ only in their seed: their model and loss by timestep."""

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from lrdit.config.resolve import resolve
from lrdit.config.run_config import as_config
from lrdit.experiment import Experiment
from lrdit.model import dit, flops
from lrdit.report.fields import describe_difference, differing_fields, unique
from lrdit.report.runs import DAMAGED, Run, finite, run_key
from lrdit.runtime.errors import UserError

MAX_IN_NAME = 24  # characters of a value in an arm's name, unless only it identifies the arm
SHOWN_LAYERS = ("mlp/fc1", "attn/qkv", "mlp/fc2", "adaln")  # preference for the layer of r(t)
LAST_SHARE = 10  # training loss by timestep is the mean of the last 1/10 of a run's lines


@dataclasses.dataclass
class Model:
  """Sizes, MACs and ranks of an arm's model."""

  parameters: int
  mean_forward_macs: float  # mean over t
  buckets: list[dict[str, int]]  # MACs, parameters and number of timesteps of each rank bucket
  num_train_timesteps: int
  segments: list[list[int]]  # [first timestep, bucket]
  factorized: list[str]  # names of the low-rank layers
  active_rank: dict[str, list[int]]  # by layer and bucket; a dense layer has its full rank
  ratio: list[float]  # active parameters over those of dense kernels, by bucket
  mean_ratio: float  # mean over t


@dataclasses.dataclass
class TimestepLoss:
  """Mean loss of the timesteps [t_first, t_last] over n runs; std is None for one run."""

  t_first: int
  t_last: int
  n: int
  mean: float
  std: float | None


@dataclasses.dataclass
class Arm:
  """Runs that differ only in their seed."""

  method: str
  key: dict[str, Any]  # of `run_key`
  runs: list[Run] = dataclasses.field(default_factory=list)  # by seed
  name: str = ""  # the method, and fields that distinguish arms of that method
  model: Model | None = None  # None if the config does not fit this version
  held_out: list[TimestepLoss] = dataclasses.field(default_factory=list)  # of the EMA weights
  training: list[TimestepLoss] = dataclasses.field(default_factory=list)
  # Number of runs missing from `held_out`, by how their protocol differs from the first run's.
  left_out: dict[str, int] = dataclasses.field(default_factory=dict)


def group_arms(runs: Sequence[Run]) -> list[Arm]:
  """Return the arms in order of appearance, with their names, models and losses.

  Raises:
    UserError: a run appears twice.
  """
  arms: list[Arm] = []
  for run in runs:
    key = run_key(run)
    arm = next((arm for arm in arms if arm.key == key), None)
    if arm is None:
      arms.append(arm := Arm(str(run.config.get("method")), key))
    same = [other.workdir for other in arm.runs if other.seed == run.seed]
    if same:
      raise UserError(
        f"{same[0]} and {run.workdir} hold the same run (equal config and seed), which would "
        "count twice: leave one out of --workdirs"
      )
    arm.runs.append(run)
  for arm in arms:
    # Runs without a valid seed come last.
    arm.runs.sort(key=lambda run: math.inf if finite(run.seed) is None else run.seed)
    alike = [other.key for other in arms if other.method == arm.method]
    arm.name = _name(arm, _naming_fields(alike))
    arm.model = _describe_model(arm.runs[0])
  _add_losses(arms)
  return arms


def _name(arm: Arm, fields: Iterable[str]) -> str:
  """Return the method and the fields, those of `init` only for a start from trained parameters."""
  if not arm.key.get("init.from_"):
    fields = [field for field in fields if not field.startswith("init.")]
  own = [f"{f.rpartition('.')[2].rstrip('_')} {_shown(arm.key.get(f))}" for f in fields]
  return f"{arm.method} ({', '.join(own)})" if own else arm.method


def _shown(value: Any) -> str:
  """Return a value as text, and of a path its last part."""
  return pathlib.PurePath(value).name if isinstance(value, str) else str(value)


def _naming_fields(keys: Sequence[dict[str, Any]]) -> list[str]:
  """Return the fields that distinguish arms, with long values only if no others do."""
  fields = differing_fields(*keys)

  def longest(field: str) -> int:
    return max(len(_shown(key.get(field))) for key in keys)

  for field in sorted(fields, key=longest, reverse=True):
    rest = [other for other in fields if other != field]
    names = [[key.get(other) for other in rest] for key in keys]
    if longest(field) > MAX_IN_NAME and len(unique(names)) == len(keys):
      fields = rest
  return fields


def _describe_model(run: Run) -> Model | None:
  """Return the model of a run's config, or None, with a note, if this version cannot build it."""
  try:
    experiment = Experiment(resolve(as_config(run.config)))
    shape, plan = experiment.shape, experiment.plan
  except (UserError, *DAMAGED) as error:
    run.notes.append(f"config.json does not fit this version of lrdit ({error})")
    return None
  shapes, num_buckets = dit.layer_shapes(shape), plan.num_buckets
  dense = sum(math.prod(shapes[name]) for name, _ in plan.layers)
  active = [
    sum(ranks.active[bucket] * sum(shapes[name]) for name, ranks in plan.layers)
    for bucket in range(num_buckets)
  ]
  ratio = [count / dense if dense else 1.0 for count in active]
  ranks = {name: [min(dims)] * num_buckets for name, dims in shapes.items()}
  return Model(
    parameters=flops.num_parameters(shape, plan),
    mean_forward_macs=flops.mean_forward_macs(shape, plan),
    buckets=flops.describe_buckets(shape, plan),
    num_train_timesteps=plan.num_train_timesteps,
    segments=[list(segment) for segment in plan.segments],
    factorized=[name for name, _ in plan.layers],
    active_rank=ranks | {name: list(own.active) for name, own in plan.layers},
    ratio=ratio,
    mean_ratio=statistics.fmean(ratio[bucket] for bucket in plan.bucket_of_timestep),
  )


def choose_layer(arms: Sequence[Arm]) -> str:
  """Return the layer whose r(t) is shown: a factorized one of the first low-rank arm, if any."""
  models = [arm.model for arm in arms if arm.model]
  if not models:
    return ""
  first = next((model for model in models if model.factorized), models[0])
  names = first.factorized or list(first.active_rank)
  alike = [[name for name in names if name.endswith(end)] for end in SHOWN_LAYERS]
  chosen = next(filter(None, alike), names)
  return chosen[len(chosen) // 2]


def held_out_protocol(run: Run) -> dict[str, Any]:
  """Return the settings that comparable held-out losses share."""
  fields = ("data", "draws", "examples", "seed", "batch_size", "dtype")
  return {f"held_out.{field}": run.evaluation["held_out"].get(field) for field in fields} | {
    "checkpoint_step": run.evaluation.get("checkpoint_step"),
    "diffusion": run.config.get("diffusion"),
  }


def _add_losses(arms: Sequence[Arm]) -> None:
  evaluated = [run for arm in arms for run in arm.runs if run.held_out("ema").get("groups")]
  protocol = held_out_protocol(evaluated[0]) if evaluated else {}
  for arm in arms:
    held = []
    for run in arm.runs:
      if not (groups := run.held_out("ema").get("groups")):
        continue
      if differs := describe_difference(protocol, held_out_protocol(run)):
        arm.left_out[differs] = arm.left_out.get(differs, 0) + 1
      else:
        held += [(group["t_first"], group["t_last"], group.get("loss")) for group in groups]
    arm.held_out = _means(held)
    arm.training = _means(loss for run in arm.runs for loss in _training_losses(run))


def _training_losses(run: Run) -> Iterable[tuple[int, int, float]]:
  """Yield (t_first, t_last, mean over the last lines) of each sampled group."""
  last = run.lines[-max(1, len(run.lines) // LAST_SHARE) :]
  for name in sorted({key for line in last for key in line if key.startswith("train/loss_t")}):
    values = [line[name] for line in last if line.get(name) is not None]
    first, _, final = name.removeprefix("train/loss_t").partition("-")
    if values and first.isdigit() and final.isdigit():
      yield int(first), int(final), statistics.fmean(values)


def _means(groups: Iterable[tuple[int, int, Any]]) -> list[TimestepLoss]:
  """Average over the runs; groups without examples have no loss and are skipped."""
  losses: dict[tuple[int, int], list[float]] = {}
  for first, last, loss in groups:
    if finite(loss) is not None:
      losses.setdefault((first, last), []).append(loss)
  return [
    TimestepLoss(*span, len(own), statistics.fmean(own), deviation(own))
    for span, own in sorted(losses.items())
  ]


def deviation(values: Sequence[float]) -> float | None:
  """Return the sample standard deviation, or None for one value."""
  return statistics.stdev(values) if len(values) > 1 else None
