"""`--mode=export`, and the modes on a chosen checkpoint."""

import importlib.util
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrdit.config import flags
from lrdit.config.run_config import store_config
from lrdit.experiment import Experiment
from lrdit.model import flops, layouts, low_rank, tensor_files
from lrdit.modes import analyze, dry_run, evaluate, export, sample
from lrdit.pretrained import open_pretrained, starting_params
from lrdit.rank.plan import dense_plan
from lrdit.runtime import parallel
from lrdit.runtime.errors import UserError
from lrdit.train import checkpoints
from tests import tiny, trained


def save(path, arg, *steps, **fields):
  """A workdir with checkpoints of random parameters; returns its config."""
  config = tiny.tiny_config(arg, **fields)
  path.mkdir()
  store_config(path, config)
  params = layouts.nest(trained.random_params(config))
  for step in steps or (8,):
    trained.save_checkpoint(path, config, step, scale=step / 8, params=params, keep=9)
  return config


def outputs(config, params, bucket=0):
  experiment = Experiment(config)
  shape = experiment.shape
  x = jax.random.normal(jax.random.key(3), (3, shape.image_size, shape.image_size, shape.channels))
  t, y = jnp.array([0, 400, 999]), jnp.array([1, 0, shape.num_classes])
  selection = low_rank.RankSelection(bucket)
  params = jax.tree.map(jnp.asarray, params)
  return experiment.model().apply({"params": params}, x, t, y, selection)


@pytest.mark.parametrize("layout", flags.FORMATS)
def test_an_exported_full_arm_comes_back_with_the_same_outputs(tmp_path, layout):
  config = save(tmp_path / "run", "method=full", model__frequency_shift=1)
  export.export(config, str(tmp_path / "run"), str(tmp_path / "out"), layout)
  again = tiny.tiny_config(
    "method=full", model__frequency_shift=1, init__from_=str(tmp_path / "out")
  )
  experiment = Experiment(again)
  params = starting_params(experiment, experiment.source("train"))
  expected = layouts.nest(trained.random_params(config))
  np.testing.assert_allclose(outputs(again, params), outputs(config, expected), atol=1e-5)
  other = tiny.tiny_config("method=full", init__from_=str(tmp_path / "out"))
  with pytest.raises(UserError, match=r"frequency_shift=0 is not what .*: use 1"):
    open_pretrained(other, Experiment(other).shape)


def exported_and_inputs(tmp_path, frequency_shift):
  """A full arm's directory in diffusers' layout, its config, and inputs of its model (NHWC)."""
  config = save(tmp_path / "run", "method=full", model__frequency_shift=frequency_shift)
  export.export(config, str(tmp_path / "run"), str(tmp_path / "out"), "diffusers")
  shape, rng = Experiment(config).shape, np.random.default_rng(5)
  size = (4, shape.image_size, shape.image_size, shape.channels)
  x = rng.standard_normal(size, np.float32)
  return tmp_path / "out", config, (x, np.array([0, 17, 500, 999]), np.array([0, 3, 9, 10]))


def own_outputs(config, inputs):
  params = jax.tree.map(jnp.asarray, layouts.nest(trained.random_params(config)))
  x, t, y = (jnp.asarray(array) for array in inputs)
  selection = low_rank.RankSelection()
  ids = (t.astype(jnp.int32), y.astype(jnp.int32))
  return np.asarray(Experiment(config).model().apply({"params": params}, x, *ids, selection))


@pytest.mark.parametrize("shift", [0, 1])
def test_diffusers_computes_what_we_do_with_an_export(tmp_path, shift):
  """`LRDIT_WRITE_GOLDEN=1` writes what diffusers computes where it is installed."""
  golden = tiny.GOLDEN / "exported_dit.npz"
  directory, config, inputs = exported_and_inputs(tmp_path, shift)
  outputs = dict(np.load(golden)) if golden.exists() else {}
  if importlib.util.find_spec("diffusers") and importlib.util.find_spec("torch"):
    found = outputs_of_diffusers(directory, inputs, shift)
    if os.environ.get("LRDIT_WRITE_GOLDEN"):
      np.savez(golden, **outputs | {f"shift_{shift}": found})
    outputs[f"shift_{shift}"] = found
  stored = json.loads((directory / "config.json").read_text())
  # What diffusers computes hangs on these, and the golden outputs are of these.
  assert stored["norm_eps"] == 1e-6
  assert stored["activation_fn"] == "gelu-approximate"
  assert stored["norm_type"] == "ada_norm_zero"
  assert (stored["attention_bias"], stored["norm_elementwise_affine"]) == (True, False)
  assert np.abs(outputs[f"shift_{shift}"]).max() > 0.1
  np.testing.assert_allclose(own_outputs(config, inputs), outputs[f"shift_{shift}"], atol=1e-5)


def outputs_of_diffusers(directory, inputs, shift):
  """What diffusers computes as the model card has it, NHWC."""
  import diffusers
  import torch

  model = diffusers.DiTTransformer2DModel.from_pretrained(directory)
  for block in model.transformer_blocks:
    block.norm1.emb.time_proj.downscale_freq_shift = shift
  x, t, y = (torch.from_numpy(array) for array in inputs)
  with torch.no_grad():
    out = model.eval()(x.permute(0, 3, 1, 2), timestep=t, class_labels=y).sample
  return out.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("bucket", [0, None])
def test_factors_are_kept_or_merged_at_a_bucket(tmp_path, bucket):
  config = save(tmp_path / "run", "method=adaptive", export__bucket=bucket)
  export.export(config, str(tmp_path / "run"), str(tmp_path / "out"))
  stored = trained.random_params(config)
  written = tensor_files.read_tensors(tmp_path / "out" / "model.safetensors", "ema")
  fields = json.loads((tmp_path / "out" / "config.json").read_text())
  assert fields["lrdit"]["bucket"] == bucket
  if bucket is None:
    assert fields["method"] == "adaptive"
    assert written.keys() == stored.keys()
    return
  assert fields["method"] == "full"
  dense = tiny.tiny_config("method=full")
  at_bucket = outputs(config, layouts.nest(stored), bucket)
  np.testing.assert_allclose(outputs(dense, layouts.nest(written)), at_bucket, atol=1e-5)


def test_the_diffusers_layout_needs_classes_and_a_bucket_of_the_plan(tmp_path):
  config = save(tmp_path / "run", "method=adaptive", data__num_classes=0)
  with pytest.raises(UserError, match="this model has none"):
    export.export(config, str(tmp_path / "run"), str(tmp_path / "out"), "diffusers")
  config = tiny.tiny_config("method=adaptive", export__bucket=2, data__num_classes=0)
  with pytest.raises(UserError, match=r"export\.bucket=2 is not one of 0 to 1"):
    export.export(config, str(tmp_path / "run"), str(tmp_path / "out"))


def test_the_card_has_the_figures_of_the_exported_parameters(tmp_path):
  config = save(tmp_path / "run", "method=full")
  figures = {
    "checkpoint_step": 8,
    "checkpoint_digest": digest_of(config),
    "held_out": {"ema": {"loss": 0.123456}, "raw": {"loss": 7.0}},
    "samples": {"default": {"metadata": {"weights": "ema"}, "figures": {"pixel_x": 4.5}}},
  }
  (tmp_path / "run" / "evaluation.json").write_text(json.dumps(figures))
  export.export(config, str(tmp_path / "run"), str(tmp_path / "out"), "diffusers")
  card = (tmp_path / "out" / "README.md").read_text()
  for line in ("held-out loss | 0.12346", "pixel_x, samples 'default' | 4.5", "A dense model."):
    assert line in card
  assert "downscale_freq_shift = 0" in card
  for stale in ({"checkpoint_step": 4}, {"checkpoint_digest": "0"}):
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps(figures | stale))
    export.export(config, str(tmp_path / "run"), str(tmp_path / "out"), "diffusers")
    assert "0.12346" not in (tmp_path / "out" / "README.md").read_text()


def digest_of(config):
  """That of a checkpoint of step 8, as an evaluation has it."""
  return checkpoints.digest(layouts.nest(trained.random_params(config)))


@pytest.mark.parametrize("use_ema", [False, True])
@pytest.mark.parametrize("bucket", [0, None])
def test_the_card_of_a_merged_model_has_no_metrics_of_another(tmp_path, bucket, use_ema):
  fields = dict(export__bucket=bucket, sampling__use_ema=use_ema)
  config = save(tmp_path / "run", "method=adaptive", **fields)
  losses = {"held_out": {"ema": {"loss": 0.123456}, "raw": {"loss": 7.0}}}
  losses |= {"checkpoint_step": 8, "checkpoint_digest": digest_of(config)}
  (tmp_path / "run" / "evaluation.json").write_text(json.dumps(losses))
  # A run of epochs stores their steps.
  epochs = dict(training__num_steps=None, training__num_epochs=1)
  config = tiny.tiny_config("method=adaptive", **fields | epochs)
  export.export(config, str(tmp_path / "run"), str(tmp_path / "out"))
  card = (tmp_path / "out" / "README.md").read_text()
  written = tensor_files.read_tensors(tmp_path / "out" / "model.safetensors", "ema")
  assert f"parameters in the file | {sum(x.size for x in written.values()):,} |" in card
  assert "Step 8 of 8," in card
  loss = f"held-out loss | {0.12346 if use_ema else '7.00000'}"
  assert (loss in card) == (bucket is None)
  assert ("The run's metrics are not of this file" in card) == (bucket is not None)
  shape, plan = Experiment(config).shape, Experiment(config).plan
  plan = plan if bucket is None else dense_plan(plan.num_train_timesteps)
  assert f"mean over t | {flops.mean_forward_macs(shape, plan):,.0f} |" in card


OTHER_MODELS = [
  ({"diffusion__prediction": "epsilon"}, r"prediction \('epsilon' there, 'v' asked for\)"),
  ({"diffusion__noise_schedule": "linear"}, r"noise_schedule \('linear' there, '"),
  ({"model__num_heads": 4}, r"num_heads \(4 there, 2 asked for\)"),
]


@pytest.mark.parametrize(("fields", "words"), OTHER_MODELS)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, fields, words):
  config = save(tmp_path / "run", "method=full")
  save(tmp_path / "other", "method=full", 4, **fields)
  checkpoint = str(tmp_path / "other" / "checkpoints" / "4")
  for mode in (evaluate.evaluate, sample.sample, analyze.analyze):
    with pytest.raises(UserError, match=rf"checkpoints/4 is the checkpoint of another.*{words}"):
      mode(config, str(tmp_path / "run"), jax.devices()[:1], checkpoint=checkpoint)
  with pytest.raises(UserError, match=words):
    export.export(config, str(tmp_path / "run"), str(tmp_path / "out"), checkpoint=checkpoint)
  assert not (tmp_path / "out").exists()
  assert not (tmp_path / "run" / "steps").exists()


def test_a_chosen_checkpoint_is_measured_beside_the_newest(tmp_path, monkeypatch):
  config = save(tmp_path / "run", "method=full", 4, 8, evaluation__extractors=())
  write_data(tmp_path / "run", config)
  workdir, devices = str(tmp_path / "run"), jax.devices()[:1]
  evaluate.evaluate(config, workdir, devices)
  evaluate.evaluate(config, workdir, devices, checkpoint="4")
  newest = json.loads((tmp_path / "run" / "evaluation.json").read_text())
  first = json.loads((tmp_path / "run" / "steps" / "4" / "evaluation.json").read_text())
  assert [newest["checkpoint_step"], first["checkpoint_step"]] == [8, 4]
  assert first["held_out"]["raw"]["loss"] != newest["held_out"]["raw"]["loss"]
  (tmp_path / "run" / "steps" / "4" / "evaluation.json").unlink()
  made, pmap = [], parallel.pmap
  monkeypatch.setattr(parallel, "pmap", lambda *args: made.append(pmap(*args)) or made[-1])
  evaluate.evaluate(config, workdir, devices, checkpoint="all")
  assert len(made) == 1  # jax never frees a pmapped function
  curves = json.loads((tmp_path / "run" / "steps" / "losses.json").read_text())
  assert curves["steps"] == [4, 8]
  assert curves["raw"]["loss"] == [x["held_out"]["raw"]["loss"] for x in (first, newest)]
  assert (tmp_path / "run" / "steps" / "losses.png").stat().st_size > 10_000
  other = pathlib.Path(save_other(tmp_path))
  evaluate.evaluate(config, workdir, devices, checkpoint=str(other / "checkpoints" / "4"))
  found = json.loads((tmp_path / "run" / "steps" / "other_4" / "evaluation.json").read_text())
  assert found["held_out"] == first["held_out"]
  with pytest.raises(UserError, match=r"no checkpoint of step 5"):
    evaluate.evaluate(config, workdir, devices, checkpoint="5")
  with pytest.raises(UserError, match=r"--checkpoint=x is neither a step nor"):
    evaluate.evaluate(config, workdir, devices, checkpoint="x")
  with pytest.raises(UserError, match=r"--checkpoint=~nobody-x/.* no home directory"):
    evaluate.evaluate(config, workdir, devices, checkpoint="~nobody-x/checkpoints/4")


def save_other(tmp_path):
  save(tmp_path / "other", "method=full", 4)
  return tmp_path / "other"


def write_data(workdir, config):
  experiment = Experiment(config)
  found = {split: experiment.source(split).fingerprint for split in ("train", "eval")}
  (workdir / "data.json").write_text(json.dumps(found))


def test_flags_of_the_modes(tmp_path, capsys):
  given = ["main.py", "--config=configs/digits.py", f"--workdir={tmp_path}", "--mode=export"]
  values = flags.parse_flags([*given, "--output=o", "--format=diffusers", "--checkpoint=4"])
  positional, named = flags.arguments_of(values)
  assert positional[1:] == [str(tmp_path), "o"]
  assert named == {"checkpoint": "4", "format": "diffusers"}
  with pytest.raises(UserError, match=r"--output is missing: --mode=export needs"):
    flags.parse_flags(given)
  with pytest.raises(UserError, match=r"--format is not used by --mode=sample"):
    flags.parse_flags([*given[:-1], "--mode=sample", "--format=diffusers"])
  with pytest.raises(UserError, match=r"--checkpoint is not used by --mode=train"):
    flags.parse_flags([*given[:-1], "--checkpoint=4"])
  config = save(tmp_path / "run", "method=full")
  dry_run.dry_run("export", config, str(tmp_path / "run"), "o", **named)
  assert "below o: weights, config.json, README.md" in capsys.readouterr().out
