"""Use a trained run in a notebook: `run = lrdit.open_run("runs/digits")`."""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict

from lrdit.config.resolve import resolve
from lrdit.config.run_config import stored_config
from lrdit.experiment import Experiment
from lrdit.rank.plan import RankPlan
from lrdit.runtime import parallel
from lrdit.runtime.errors import UserError
from lrdit.sampling.sampler import Sampler
from lrdit.train.run_files import read_vae_digest, restore_params


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """A trained run: its config, rank plan, parameters and samples."""

  workdir: pathlib.Path
  experiment: Experiment  # the model, objective, data and sampler that the config describes

  @property
  def config(self) -> ConfigDict:
    """The resolved config that the run was trained with."""
    return self.experiment.config

  @property
  def plan(self) -> RankPlan:
    """The rank of every layer at every timestep."""
    return self.experiment.plan

  def params(self, weights: str = "ema", step: int | None = None) -> Any:
    """Return a checkpoint's parameters on the host: "ema" (averaged) or "raw".

    It is the checkpoint of `step`, or else the newest intact one.
    """
    template = self.experiment.params_template
    return restore_params(self.workdir, template, [weights], step)[1][weights]

  def sample(
    self,
    n: int,
    labels: int | Sequence[int] | None = None,
    seed: int = 0,
    params: Any = None,
    **fields: Any,
  ) -> UInt8[np.ndarray, "n H W C"]:
    """Sample images with the sliced sampler on all local devices.

    Args:
      n: number of images; image i depends on the seed, not on n.
      labels: one class, n classes, or None for the config's `sampling.labels`.
      seed: seed of the noise and of random labels.
      params: from `params`; the averaged ones by default.
      fields: other fields of `sampling`, such as num_steps=20, solver="dpm++".

    Returns:
      (n, height, width, channels) uint8.
    """
    devices = parallel.all_devices()
    per_device = -(-min(n, self.config.sampling.batch_size) // len(devices))
    fields = {"seed": seed, "batch_size": per_device * len(devices)} | fields
    experiment, sampler = _make_sampler(self, tuple(sorted(fields.items())))
    rule = experiment.label_rule
    if labels is not None:
      given = _check_labels(labels, n, experiment.shape.num_classes)
      rule = functools.partial(np.take, given, mode="clip")  # the last batch is padded
    digest = read_vae_digest(self.workdir) if self.config.vae.downsample_factor else ""
    to_pixels = experiment.to_pixels(devices, digest)
    params = self.params() if params is None else params
    batches = [to_pixels(x_0) for x_0 in sampler.sample(params, rule, n)]
    if not all(are_finite.all() for _, are_finite in batches):
      raise UserError("samples are not finite: lower the guidance scale, or train longer")
    return np.concatenate([pixels for pixels, _ in batches])


@functools.lru_cache(maxsize=4)  # so that sampling again with the same fields compiles nothing
def _make_sampler(run: Run, fields: tuple[tuple[str, Any], ...]) -> tuple[Experiment, Sampler]:
  config = ConfigDict(run.config.to_dict())
  unknown = sorted(dict(fields).keys() - config.sampling.keys())
  if unknown:
    known = ", ".join(sorted(config.sampling.keys()))
    raise UserError(f"sampling has no field {unknown[0]}: use some of {known}")
  config.sampling.update(dict(fields))
  experiment = Experiment(resolve(config))
  return experiment, experiment.sampler(parallel.all_devices())


def _check_labels(labels: int | Sequence[int], n: int, num_classes: int) -> Int[np.ndarray, " n"]:
  """Return the labels of n images; raise a UserError unless the model has such labels."""
  if not num_classes:
    raise UserError("labels are given, and the model has no classes: leave them out")
  given = np.asarray(labels)
  if given.shape not in ((), (n,)):
    raise UserError(f"labels of shape {given.shape} are given for {n} images: give one, or {n}")
  bad = given[~np.isin(given, np.arange(num_classes))]
  if bad.size:
    raise UserError(f"label {bad[0]} is not a class: use whole numbers from 0 to {num_classes - 1}")
  return np.broadcast_to(given.astype(np.int32), (n,))


def open_run(workdir: str | pathlib.Path) -> Run:
  """Open a trained run's workdir; raise a UserError if it is none or its config is damaged."""
  logging.getLogger("absl").setLevel(logging.ERROR)  # orbax warns about read-only checkpoints
  path = pathlib.Path(workdir).expanduser()
  return Run(path, Experiment(resolve(stored_config(path))))
