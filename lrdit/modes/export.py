"""Write a trained model for other programs, with its config and a model card: `--mode=export`."""

import json
import logging
import pathlib
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from lrdit.config.run_config import open_trained
from lrdit.experiment import Experiment
from lrdit.model import factors, flops, layouts, tensor_files
from lrdit.model.low_rank import slice_params
from lrdit.pretrained import OWN_WEIGHTS, trained_with
from lrdit.runtime import store
from lrdit.runtime.errors import UserError
from lrdit.runtime.locks import owned
from lrdit.train import checkpoints, run_files

log = logging.getLogger("lrdit")

DIFFUSERS_VERSION = "0.42.0"  # whose outputs tests/golden/exported_dit.npz holds

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
  chosen = run_files.choose_checkpoint(path, checkpoint)
  weights, template = "ema" if config.sampling.use_ema else "raw", experiment.params_template
  step, restored = run_files.restore_params(chosen.run, template, [weights], chosen.step)
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
    card = model_card(experiment, facts, format, chosen.output / "evaluation.json")
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
  experiment: Experiment, facts: dict[str, Any], format: str, evaluation: pathlib.Path
) -> str:
  """Return README.md, with the figures of evaluation.json if they are of the same checkpoint."""
  config, shape, plan = experiment.config, experiment.shape, experiment.plan
  bucket = facts["bucket"]
  if not plan.layers:
    kernels = "A dense model."
  elif bucket is None:
    kernels = "The layers' kernels are factors, of which a timestep uses the first r(t) components."
  else:
    t = np.flatnonzero(plan.bucket_of_timestep == bucket)
    kernels = f"Factors are merged to kernels at rank bucket {bucket} of {plan.num_buckets}, "
    kernels += f"which serves timesteps {t[0]} to {t[-1]}: other timesteps compute otherwise."
  merged = plan if bucket is None else experiment.plan.at_bucket(bucket)
  rows = {
    "arm": config.method,
    "data": f"{config.data.name}, {shape.num_classes} classes",
    "input": f"{shape.image_size} x {shape.image_size} x {shape.channels}",
    "blocks, width, heads": f"{shape.depth}, {shape.hidden_size}, {shape.num_heads}",
    "parameters as factors"
    if plan.layers
    else "parameters": f"{flops.num_parameters(shape, merged):,}",
    "MACs of a forward pass": f"{flops.mean_forward_macs(shape, merged):,.0f}",
    "prediction": config.diffusion.prediction,
    "noise schedule": f"{config.diffusion.noise_schedule}, T = {plan.num_train_timesteps}",
  } | _figures(evaluation, facts)
  use = USE_DIFFUSERS.format(shift=config.model.frequency_shift)
  return CARD.format(
    library="diffusers" if format == layouts.DIFFUSERS else "lrdit",
    title=f"DiT-{config.model.variant}, {config.method}, on {config.data.name}",
    kernels=kernels,
    step=facts["checkpoint_step"],
    num_steps=config.training.num_steps,
    weights="averaged" if facts["weights"] == "ema" else "raw",
    rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
    use=use if format == layouts.DIFFUSERS else USE_OWN,
  )


def _figures(path: pathlib.Path, facts: dict[str, Any]) -> dict[str, str]:
  """Return the figures of an evaluation of the exported parameters, by name; {} if there is none.

  They were measured with the ranks of every timestep's own bucket.
  """
  if not path.exists():
    return {}
  found = store.read_json(path, "measure it again, or delete it")
  if found.get("checkpoint_step") != facts["checkpoint_step"]:
    return {}
  held_out = found.get("held_out", {}).get(facts["weights"], {})
  figures = {"held-out loss": f"{held_out['loss']:.5f}"} if "loss" in held_out else {}
  for name, samples in found.get("samples", {}).items():
    if samples.get("metadata", {}).get("weights") == facts["weights"]:
      figures |= {f"{key}, samples {name!r}": f"{v:.6g}" for key, v in samples["figures"].items()}
  return figures
