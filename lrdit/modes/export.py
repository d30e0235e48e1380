"""Write a trained model for other programs, with its config and a model card: `--mode=export`."""

import json
import logging
import pathlib
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from lrdit.config.run_config import (
  checkpoint_config,
  choose_checkpoint,
  open_trained,
  trained_with,
)
from lrdit.experiment import Experiment
from lrdit.model import factors, flops, layouts, tensor_files
from lrdit.model.low_rank import slice_params
from lrdit.pretrained import OWN_WEIGHTS
from lrdit.rank.plan import dense_plan
from lrdit.runtime import store
from lrdit.runtime.errors import UserError
from lrdit.runtime.locks import owned
from lrdit.train import checkpoints, run_files

log = logging.getLogger("lrdit")

DIFFUSERS_VERSION = "0.42.1"  # whose outputs tests/golden/exported_dit.npz holds

CARD = """---
library_name: {library}
---

# {title}

{kernels} Step {step} of {num_steps}, {weights} parameters, float32.

| | |
|---|---|
{rows}

{use}
"""

USE_DIFFUSERS = """```python
from diffusers import DiTTransformer2DModel

model = DiTTransformer2DModel.from_pretrained("THIS_DIRECTORY")
for block in model.transformer_blocks:  # diffusers has 1, and this model was trained with {shift}
  block.norm1.emb.time_proj.downscale_freq_shift = {shift}
```

Its input has the size `sample_size`; the label `num_embeds_ada_norm` is that of no class."""
USE_OWN = """Begin a run with `--config.init.from_=THIS_DIRECTORY`. `model.safetensors` holds every
parameter by its path; y = (x @ down) @ up + bias where a layer has factors."""


def export(
  config: ConfigDict, workdir: str, output: str, format: str = "safetensors", checkpoint: str = ""
) -> None:
  """Run `--mode=export`: write the weights, config.json and README.md of a run to `output`.

  `sampling.use_ema` chooses the parameters, and `export.bucket` the rank bucket at which factors
  become kernels. `checkpoint` is that of `run_files.choose_checkpoint`.

  Raises:
    UserError: the bucket is not in the plan, or the model has no place in the format.
  """
  experiment, path = Experiment(config), open_trained(workdir, config)
  bucket = _bucket(experiment, format)
  chosen = choose_checkpoint(path, config, checkpoint)
  weights, template = "ema" if config.sampling.use_ema else "raw", experiment.params_template
  kinds = sorted({weights, "ema"})  # an evaluation has the digest of the latter
  step, restored = run_files.restore_params(chosen.run, template, kinds, chosen.step)
  num_steps = checkpoint_config(chosen.run, step).training.num_steps
  params = restored[weights]
  facts = {"checkpoint_step": step, "checkpoint_digest": checkpoints.digest(params)}
  facts |= {"weights": weights, "bucket": bucket, **trained_with(config)}
  directory = pathlib.Path(output)
  directory.mkdir(parents=True, exist_ok=True)
  with owned(directory, "export"):
    name, tensors, stored = _contents(experiment, params, bucket, format)
    metadata = {"format": "pt", "lrdit": json.dumps(store.as_json(facts))}
    tensor_files.write_safetensors(directory / name, tensors, metadata)
    store.write_json(directory / "config.json", stored | {"lrdit": facts})
    key = {"checkpoint_step": step, "checkpoint_digest": checkpoints.digest(restored["ema"])}
    figures = {"parameters in the file": f"{sum(tensor.size for tensor in tensors.values()):,}"}
    if bucket is None or experiment.plan.num_buckets == 1:  # else a timestep's ranks are others
      figures |= read_metrics(chosen.output / "evaluation.json", key, weights)
    card = model_card(experiment, facts, format, num_steps, figures)
    with store.atomic_path(directory / "README.md") as temporary:
      temporary.write_text(card)
  log.info("wrote step %d, %s weights, to %s", step, weights, directory)


def _bucket(experiment: Experiment, format: str) -> int | None:
  """Return the rank bucket to merge at, or None to keep the factors."""
  bucket, plan = experiment.config.export.bucket, experiment.plan
  if bucket is not None and bucket >= plan.num_buckets:
    raise UserError(f"config.export.bucket={bucket} is not one of 0 to {plan.num_buckets - 1}")
  if format != layouts.DIFFUSERS:
    return bucket if plan.layers else None
  if not experiment.shape.num_classes:
    raise UserError("a DiT of diffusers has classes, and this model has none: use another --format")
  return plan.num_buckets - 1 if bucket is None else bucket


def _contents(
  experiment: Experiment, params: Any, bucket: int | None, format: str
) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
  """Return the name of the file of weights, its tensors, and config.json."""
  config, shape = experiment.config.to_dict(), experiment.shape
  if bucket is None:
    return OWN_WEIGHTS, layouts.flat(params), config
  dense = factors.merged(layouts.flat(slice_params(params, experiment.plan, bucket)))
  if format == layouts.DIFFUSERS:
    stored = layouts.diffusers_config(shape) | {"_diffusers_version": DIFFUSERS_VERSION}
    return tensor_files.WEIGHTS_NAME, layouts.to_tensors(format, dense, shape), stored
  method = "narrow" if config["method"] == "narrow" else "full"
  return OWN_WEIGHTS, dense, config | {"method": method}


def model_card(
  experiment: Experiment,
  facts: dict[str, Any],
  format: str,
  num_steps: int,
  figures: dict[str, str],
) -> str:
  """Return README.md of a checkpoint of a run of `num_steps`, with `figures` in its table."""
  config, shape, plan = experiment.config, experiment.shape, experiment.plan
  bucket = facts["bucket"]
  if not plan.layers:
    kernels = "A dense model."
  elif bucket is None:
    kernels = "The layers' kernels are factors, of which a timestep uses the first r(t) components."
  else:
    t = np.flatnonzero(plan.bucket_of_timestep == bucket)
    kernels = f"Factors are merged to kernels at rank bucket {bucket} of {plan.num_buckets}, "
    kernels += f"which serves timesteps {t[0]} to {t[-1]}."
    if plan.num_buckets > 1:
      kernels += " The run's metrics are not of this file: other timesteps have other ranks."
  written = plan if bucket is None else dense_plan(plan.num_train_timesteps)
  rows = {
    "arm": config.method,
    "data": f"{config.data.name}, {shape.num_classes} classes",
    "input": f"{shape.image_size} x {shape.image_size} x {shape.channels}",
    "blocks, width, heads": f"{shape.depth}, {shape.hidden_size}, {shape.num_heads}",
    "MACs of a forward pass, mean over t": f"{flops.mean_forward_macs(shape, written):,.0f}",
    "prediction": config.diffusion.prediction,
    "noise schedule": f"{config.diffusion.noise_schedule}, T = {plan.num_train_timesteps}",
  } | figures
  use = USE_DIFFUSERS.format(shift=config.model.frequency_shift)
  return CARD.format(
    library="diffusers" if format == layouts.DIFFUSERS else "lrdit",
    title=f"DiT-{config.model.variant}, {config.method}, on {config.data.name}",
    kernels=kernels,
    step=facts["checkpoint_step"],
    num_steps=num_steps,
    weights="averaged" if facts["weights"] == "ema" else "raw",
    rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
    use=use if format == layouts.DIFFUSERS else USE_OWN,
  )


def read_metrics(path: pathlib.Path, key: dict[str, Any], weights: str) -> dict[str, str]:
  """Return the metrics of "raw" or "ema" weights in evaluation.json, by name.

  There are none unless the file has the "checkpoint_step" and "checkpoint_digest" of `key`, where
  the digest is that of the averaged weights. They were measured with the ranks of every timestep's
  own bucket.
  """
  if not path.exists():
    return {}
  found = store.read_json(path, "measure it again, or delete it")
  if any(found.get(name) != value for name, value in key.items()):
    return {}
  held_out = found.get("held_out", {}).get(weights, {})
  figures = {"held-out loss": f"{held_out['loss']:.5f}"} if "loss" in held_out else {}
  for name, samples in found.get("samples", {}).items():
    if samples.get("metadata", {}).get("weights") == weights:
      figures |= {f"{key}, samples {name!r}": f"{v:.6g}" for key, v in samples["figures"].items()}
  return figures
