"""Trained parameters to start a run from: `init.from_`.

They come from a workdir of ours, one of its checkpoints, an export, or a file in one of the
`layouts`, and are fitted to the run's own layers (`factors.fit`).
"""

import contextlib
import dataclasses
import logging
import os
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lrdit.config import derive
from lrdit.config.checks import require
from lrdit.config.resolve import resolve
from lrdit.config.run_config import VARIANCE_FLOOR, as_config, trained_with
from lrdit.config.schema import upgrade
from lrdit.data.source import Source
from lrdit.experiment import Experiment
from lrdit.model import dit, factors, layouts, tensor_files
from lrdit.runtime import cluster, store
from lrdit.runtime.errors import UserError
from lrdit.train.checkpoints import Checkpoints, directory_of
from lrdit.train.moments import input_moments

# With what the published code trains models of a learned variance, which their files do not tell.
PUBLISHED = {
  "diffusion.num_train_timesteps": 1000,
  "diffusion.noise_schedule": "linear",
  "diffusion.prediction": "epsilon",
}
OWN_WEIGHTS = "model.safetensors"  # of an export in our own layout
DIRECTORY_WEIGHTS = (
  tensor_files.WEIGHTS_NAME,
  tensor_files.WEIGHTS_NAME + tensor_files.INDEX_SUFFIX,
  OWN_WEIGHTS,
  "diffusion_pytorch_model.fp16.safetensors",  # as diffusers names its variant "fp16"
  "diffusion_pytorch_model.safetensors.index.fp16.json",
  "diffusion_pytorch_model.bin",
)
MOMENT_BYTES = 2 << 30  # of the second moments that are held at once

log = logging.getLogger("lrdit")


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """Trained parameters by path, as they were stored: layers have a kernel or factors."""

  source: str  # names them in messages
  params: dict[str, np.ndarray]  # float32
  unknown: str  # of what they were trained with, as a message; "" if nothing

  def warn(self) -> None:
    """Log a warning of what is unknown."""
    if self.unknown:
      log.warning("%s", self.unknown)


def open_pretrained(config: ConfigDict, shape: dit.DiTShape) -> Pretrained:
  """Read the parameters that `init` names, for a model of these sizes.

  Raises:
    UserError: there are none, they are damaged or of another model, or were trained with other
      fields of `trained_with`.
  """
  given = config.init.from_.replace("{seed}", str(config.seed))
  path = pathlib.Path(os.path.expanduser(given))
  require(path.exists(), "init.from_", str(path), "does not exist: name a workdir, or a file")
  is_step = path.parent.name == "checkpoints" and path.name.isdecimal()
  if is_step or directory_of(path).is_dir():
    layout, tensors, fields = _read_run(path, is_step, config.init.weights)
  else:
    path = _find_weights(path)
    tensors = tensor_files.read_tensors(path, config.init.weights)
    layout = layouts.detect(tensors, str(path))
    fields = _stored_fields(path, layout, shape)
  own = trained_with(config)
  for name, value in fields.items():
    if value is not None and name in own:
      rule = f"is not what {path} was trained with: use {value!r}"
      require(own[name] == value, name, own[name], rule)
  untold = {name: value for name, value in own.items() if fields.get(name) is None}
  unknown = _name_unknown(path, untold, config.model.learn_sigma and layout != layouts.OWN)
  return Pretrained(str(path), layouts.to_params(layout, tensors, shape, str(path)), unknown)


def _name_unknown(path: pathlib.Path, untold: dict[str, Any], may_be_published: bool) -> str:
  """Return a warning of fields, given with a run's own values, that a file does not tell, or ""."""
  if not untold:
    return ""
  text = f"{path} does not tell {', '.join(untold)}, which are not compared"
  others = {name: value for name, value in PUBLISHED.items() if untold.get(name, value) != value}
  if not (others and may_be_published):
    return text
  published = " and ".join(f"{name}={value!r}" for name, value in others.items())
  here = " and ".join(repr(untold[name]) for name in others)
  return f"{text}; the published models have {published}, and this run has {here}"


def _read_run(
  path: pathlib.Path, is_step: bool, weights: str
) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
  """Return the layout, tensors and fields of one of our workdirs or checkpoints."""
  workdir = path.parents[1] if is_step else path
  with contextlib.closing(Checkpoints(workdir)) as checkpoints:
    step, stored, params = checkpoints.restore_run(weights, int(path.name) if is_step else None)
  config = resolve(as_config(upgrade(stored)))
  log.info("starting from step %d of %s, %s weights", step, workdir, weights)
  return layouts.OWN, layouts.flat(params), trained_with(config)


def _find_weights(path: pathlib.Path) -> pathlib.Path:
  """Return the file of weights that a path is or holds."""
  if not path.is_dir():
    return path
  if (path / "model_index.json").is_file():  # a whole pipeline
    path = path / "transformer"
  found = [path / name for name in DIRECTORY_WEIGHTS if (path / name).is_file()]
  if not found:
    known = ", ".join(DIRECTORY_WEIGHTS)
    raise UserError(
      f"{path} has neither checkpoints nor weights: name a workdir, a file, or a directory with "
      f"one of {known}"
    )
  return found[0]


def _stored_fields(path: pathlib.Path, layout: str, shape: dit.DiTShape) -> dict[str, Any]:
  """Return the fields that a file's parameters were trained with, as far as it tells."""
  config, published = path.with_name("config.json"), {VARIANCE_FLOOR: "posterior"}
  if layout == layouts.OFFICIAL:
    return published | {"model.frequency_shift": 0}
  if not config.is_file():
    return published if layout == layouts.DIFFUSERS else {}
  if layout == layouts.DIFFUSERS:
    published["model.num_heads"] = shape.num_heads  # which is compared with the file's
    fields = layouts.check_diffusers_config(config, shape).get("lrdit", published)
  else:
    fields = store.read_json(config, "restore it").get("lrdit", {})
  if not isinstance(fields, dict):
    raise UserError(f"{config} is damaged (lrdit is {fields!r}, and no object): restore it")
  return fields


def open_run(config: ConfigDict) -> tuple[Experiment, Source]:
  """Return a run's experiment and its training data, on which the experiment can depend.

  Its config has `training.num_epochs` as `num_steps`, and the ranks that `init.energy` chooses: of
  the kernels, or with `init.compression="whitened"` of their outputs over all timesteps.

  Raises:
    UserError: the data is missing, or the ranks' parameters are not dense or all stay so.
  """
  if not derive.lacks_ranks(config):
    experiment = Experiment(config)
    source = experiment.source("train")
    return experiment.for_examples(len(source)), source
  full, names = ConfigDict(config.to_dict()), derive.selected_layers(config)
  full.method = "full"
  experiment, ranks = Experiment(full.lock()), np.zeros(len(names), np.int32)
  source = experiment.source("train")
  if cluster.is_first():
    ranks[:] = _ranks_by_energy(experiment, source, names)
  chosen = ConfigDict(config.to_dict())
  chosen.rank.layer_ranks = tuple(map(int, cluster.from_first(ranks)))
  dense = chosen.rank.layer_ranks.count(0)
  rule = "saves no parameters in any layer: lower it, or use method=full"
  require(dense < len(names), "init.energy", config.init.energy, rule)
  text = "init.energy=%g: ranks of %d layers, %d stay dense"
  log.info(text, config.init.energy, len(names) - dense, dense)
  return experiment.with_config(chosen).for_examples(len(source)), source


def _ranks_by_energy(experiment: Experiment, source: Source, names: Sequence[str]) -> list[int]:
  """Return the rank of each of the layers; `experiment` is that of the full arm."""
  config = experiment.config
  trained = open_pretrained(config, experiment.shape)
  for name in names:
    if f"{name}/kernel" not in trained.params:
      raise UserError(
        f"config.init.energy needs dense parameters, and {trained.source} has {name}/down: name a "
        "dense model, or use None"
      )
  ranks, settings = {}, (config.init.energy, config.rank.multiple_of)
  for name, roots in _roots(experiment, trained.params, source, names):
    root = roots[0] if roots else None  # a dense plan has one bucket
    ranks[name] = factors.rank_by_energy(trained.params[f"{name}/kernel"], *settings, root)
  return [ranks[name] for name in names]


def starting_params(experiment: Experiment, source: Source) -> Any:
  """Return the parameters of `init` as the run's own tree, float32 on the host.

  `source` is the training data, on which `init.compression="whitened"` measures the layers' inputs.
  """
  config, plan = experiment.config, experiment.plan
  trained = open_pretrained(config, experiment.shape)
  trained.warn()
  params = trained.params
  cut = [name for name, _ in plan.layers if f"{name}/kernel" in params]
  for name, roots in _roots(experiment, params, source, cut):
    kernel, ranks = params.pop(f"{name}/kernel"), plan.by_name[name].active  # frees its memory
    made = factors.factorize(kernel, ranks, config.seed + zlib.crc32(name.encode()), roots)
    params |= dict(zip((f"{name}/down", f"{name}/up"), made, strict=True))
  if cut:
    log.info("%d kernels became factors (%s)", len(cut), config.init.compression)
  templates = layouts.flat(experiment.params_template)
  return layouts.nest(factors.fit(params, templates, trained.source))


def dense_params(experiment: Experiment) -> Any:
  """Return the tree of `init`'s parameters with kernels, float32, on every process.

  Factors are merged at their full rank.
  """
  params = {}
  if cluster.is_first():
    params = factors.merged(open_pretrained(experiment.config, experiment.shape).params)
  return _from_first(experiment, params)


def teacher_params(experiment: Experiment) -> Any:
  """Return the tree of the dense model that `init` names, float32, on every process.

  Raises:
    UserError: it is not dense, or cannot be read.
  """
  params = {}
  if cluster.is_first():
    trained = open_pretrained(experiment.config, experiment.shape)
    params = trained.params
    factorized = sorted(params.keys() - layouts.dense_shapes(experiment.shape).keys())
    if factorized:
      raise UserError(
        f"config.init.distillation needs a dense teacher, and {trained.source} has "
        f"{factorized[0]}: name a dense model, or use 0"
      )
  return _from_first(experiment, params)


def _from_first(experiment: Experiment, params: dict[str, np.ndarray]) -> Any:
  """Return the tree of the first process's dense parameters, on every process."""
  if not cluster.is_first():
    shapes = layouts.dense_shapes(experiment.shape)
    params = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
  return cluster.from_first(layouts.nest(params))


def _roots(
  experiment: Experiment, params: dict[str, np.ndarray], source: Source, names: Sequence[str]
) -> Iterator[tuple[str, list[np.ndarray] | None]]:
  """Yield each layer with the roots of its inputs' second moments by rank bucket, or None.

  Layers are measured a few at a time, as far as `MOMENT_BYTES` allows.
  """
  config, plan = experiment.config, experiment.plan
  if config.init.compression != "whitened":
    yield from ((name, None) for name in names)
    return
  model = experiment.dense_model().clone(dtype=jnp.float32, remat=False, scan_blocks=False)
  objective = dataclasses.replace(experiment.objective(jax.local_devices()[:1]), model=model)
  dense = jax.device_put(layouts.nest(factors.merged(params)))
  timesteps = [np.flatnonzero(plan.bucket_of_timestep == b) for b in range(plan.num_buckets)]
  shapes = dit.layer_shapes(experiment.shape)
  size = max(4 * shapes[name][0] ** 2 for name in names) * plan.num_buckets if names else 1
  count = max(1, MOMENT_BYTES // size)
  for some in (names[first : first + count] for first in range(0, len(names), count)):
    settings = (config.init.whitening_examples, config.training.batch_size, config.seed)
    moments = [input_moments(objective, dense, source, some, t, *settings) for t in timesteps]
    for name in some:
      yield name, [factors.square_root(each[name]) for each in moments]
