"""Runs that start from trained parameters."""

import contextlib
import dataclasses
import json
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrdit import pretrained
from lrdit.config.resolve import resolve_for_run
from lrdit.config.run_config import store_config
from lrdit.experiment import Experiment
from lrdit.model import factors, layouts, low_rank, tensor_files
from lrdit.modes import train
from lrdit.pretrained import open_pretrained, open_run, starting_params, teacher_params
from lrdit.runtime.errors import UserError
from lrdit.train import loss, moments
from lrdit.train.checkpoints import Checkpoints
from tests import tiny, trained

ADAPTIVE = "method=adaptive"


def config_of(path, arg="method=full", **fields):
  return tiny.tiny_config(arg, init__from_=str(path), **fields)


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
  """The workdir of a full arm."""
  config = tiny.tiny_config("method=full")
  return save(tmp_path_factory.mktemp("full"), config)


def save(path, config):
  store_config(path, config)
  trained.save_checkpoint(path, config, params=layouts.nest(params_of(config)))
  return path


def params_of(config):
  return trained.random_params(config)


def start(config):
  experiment = Experiment(config)
  return layouts.flat(starting_params(experiment, experiment.source("train")))


def assert_equal(got, expected):
  assert got.keys() == expected.keys()
  for path, value in expected.items():
    np.testing.assert_array_equal(got[path], value)


def write_file(tmp_path, layout, config):
  shape = Experiment(config).shape
  tensors = layouts.to_tensors(layout, params_of(config), shape)
  tensor_files.write_safetensors(tmp_path / "m.safetensors", tensors, {})
  if layout == layouts.DIFFUSERS:
    (tmp_path / "config.json").write_text(json.dumps(layouts.diffusers_config(shape)))
  return tmp_path / "m.safetensors"


def test_a_run_starts_from_a_workdir_or_one_of_its_checkpoints(full_run):
  expected = params_of(tiny.tiny_config("method=full"))
  assert_equal(start(config_of(full_run)), expected)
  assert_equal(start(config_of(full_run / "checkpoints" / "8")), expected)


@pytest.mark.parametrize("layout", [layouts.OFFICIAL, layouts.DIFFUSERS])
def test_a_run_starts_from_a_foreign_file(tmp_path, layout):
  config = tiny.tiny_config("method=full")
  path = write_file(tmp_path, layout, config)
  assert_equal(start(config_of(path)), params_of(config))


@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_run_starts_from_a_pipeline_of_diffusers(tmp_path, num_shards):
  config = tiny.tiny_config("method=full")
  directory = tmp_path / "transformer"
  directory.mkdir()
  path = write_file(directory, layouts.DIFFUSERS, config)
  (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
  if num_shards == 1:
    path.rename(directory / tensor_files.WEIGHTS_NAME)
  else:
    tensors, weight_map = tensor_files.read_tensors(path, "ema"), {}
    for number in range(num_shards):
      name, keys = f"part-{number}.safetensors", sorted(tensors)[number::num_shards]
      tensor_files.write_safetensors(directory / name, {key: tensors[key] for key in keys}, {})
      weight_map |= dict.fromkeys(keys, name)
    index = directory / (tensor_files.WEIGHTS_NAME + tensor_files.INDEX_SUFFIX)
    index.write_text(json.dumps({"weight_map": weight_map}))
    path.unlink()
  assert_equal(start(config_of(tmp_path)), params_of(config))


def test_a_pickle_needs_pytorch(tmp_path, monkeypatch):
  path = tmp_path / "DiT.pt"
  path.write_bytes(b"any")
  monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails
  config = config_of(path)
  with pytest.raises(UserError, match=r"DiT\.pt is a pickle of PyTorch, which is not installed"):
    open_pretrained(config, Experiment(config).shape)


def test_the_seed_stands_in_the_path(full_run, tmp_path):
  (tmp_path / "run3").symlink_to(full_run)
  config = config_of(tmp_path / "run{seed}", seed=3)
  assert open_pretrained(config, Experiment(config).shape).source.endswith("run3")


@pytest.mark.parametrize("compression", factors.COMPRESSIONS)
def test_kernels_become_factors_of_the_plan(full_run, compression):
  config = config_of(full_run, ADAPTIVE, init__compression=compression, init__whitening_examples=16)
  experiment, got = Experiment(config), start(config)
  dense = params_of(tiny.tiny_config("method=full"))
  template = layouts.flat(experiment.params_template)
  assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in template.items()}
  name = "blocks_0/mlp/fc1"
  rank = experiment.plan.by_name[name].max_rank
  sigma = np.linalg.svd(dense[f"{name}/kernel"], compute_uv=False)
  error = np.linalg.norm(dense[f"{name}/kernel"] - got[f"{name}/down"] @ got[f"{name}/up"])
  least = np.linalg.norm(sigma[rank:])
  assert (error == pytest.approx(least, rel=1e-3)) == (compression == "svd")
  assert least - 1e-4 < error < np.linalg.norm(sigma)


def test_every_bucket_is_whitened_by_inputs_at_its_own_timesteps(full_run, monkeypatch):
  seen, measure = [], pretrained.input_moments

  def note(*args):
    seen.append(args[4].tolist())
    return measure(*args)

  monkeypatch.setattr(pretrained, "input_moments", note)
  fields = {"init__compression": "whitened", "init__whitening_examples": 16}
  config = config_of(full_run, ADAPTIVE, **fields)
  start(config)
  bucket = Experiment(config).plan.bucket_of_timestep
  assert seen == [np.flatnonzero(bucket == b).tolist() for b in range(2)]


def test_moments_are_of_the_noisy_patches_at_the_given_timesteps():
  config = tiny.tiny_config("method=full")
  experiment, t = Experiment(config), np.array([100, 900])
  objective, source = experiment.objective(jax.devices()[:1]), experiment.source("train")
  settings, name = (16, config.seed), "patch_embed"
  params = jax.tree.map(jnp.asarray, layouts.nest(params_of(config)))
  got = moments.input_moments(objective, params, source, [name], t, 32, *settings)
  rng, expected = np.random.default_rng([config.seed, 100]), 0
  for number in range(2):
    x_t, at, y = moments.noisy_batch(objective, source, t, number, 16, rng, config.seed)
    assert (np.bincount(at, minlength=1000)[t] == 8).all()
    assert y.shape == (16,)
    patches = x_t.reshape(16, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 4)
    expected = expected + patches.T @ patches / len(patches) / 2
  np.testing.assert_allclose(got[name], expected, rtol=1e-4, atol=1e-5)
  assert [*got] == [name]


def test_a_run_of_lower_rank_takes_the_prefix(tmp_path):
  large = tiny.tiny_config(ADAPTIVE)
  save(tmp_path, large)
  got, whole = start(config_of(tmp_path, ADAPTIVE, rank__ratio=0.3)), params_of(large)
  for path, value in got.items():
    part = value.shape
    np.testing.assert_array_equal(value, whole[path][tuple(map(slice, part))])
  with pytest.raises(UserError, match=r"at rank \d+, and this model needs \d+: lower config"):
    start(config_of(tmp_path, ADAPTIVE, rank__ratio=0.7))


@pytest.mark.parametrize(("compression", "energy"), [("svd", 0.4), ("whitened", 0.97)])
def test_energy_chooses_the_rank_of_every_layer(full_run, tmp_path, compression, energy):
  fields = dict(init__energy=energy, init__compression=compression, init__whitening_examples=16)
  fields |= dict(rank__match="total", training__num_steps=0, training__num_epochs=None)
  config = config_of(full_run, ADAPTIVE, **fields)
  with pytest.raises(UserError, match=r"energy=\S* chooses the ranks when training begins"):
    Experiment(config)
  experiment = open_run(config)[0]
  ranks = experiment.plan.by_name
  if compression == "svd":
    dense = params_of(tiny.tiny_config("method=full"))
    for name, found in ranks.items():
      asked = factors.rank_by_energy(dense[f"{name}/kernel"], energy, config.rank.multiple_of)
      assert found.static_rank == found.max_rank == asked
  assert len({r.static_rank for r in ranks.values()}) > 2  # not one ratio
  train.train(config, str(tmp_path), jax.devices()[:1])
  kept = resolve_for_run(config, str(tmp_path))
  assert Experiment(kept).plan == experiment.plan
  other = config_of(full_run, ADAPTIVE, **fields | dict(init__energy=0.5))
  assert not resolve_for_run(other, str(tmp_path)).rank.layer_ranks


def test_energy_needs_dense_trained_parameters(full_run, tmp_path):
  save(tmp_path, tiny.tiny_config(ADAPTIVE))
  with pytest.raises(UserError, match=r"energy needs dense parameters, and .* has t_embedder/fc1"):
    open_run(config_of(tmp_path, ADAPTIVE, init__energy=0.4))
  with pytest.raises(UserError, match=r"energy=0\.999 saves no parameters in any layer"):
    open_run(config_of(full_run, ADAPTIVE, init__energy=0.999))
  with pytest.raises(UserError, match=r"init\.energy=0\.9 needs trained parameters"):
    tiny.tiny_config(init__energy=0.9)
  for ranks in ((2,), (0,) * 8, (33,) * 8):
    with pytest.raises(UserError, match=r"layer_ranks=.* must be the ranks of \d+ layers"):
      Experiment(tiny.tiny_config(ADAPTIVE, rank__layer_ranks=ranks))


WRONG = [
  (dict(model__frequency_shift=1), r"config\.model\.frequency_shift=1 is not what .* use 0"),
  (dict(diffusion__prediction="epsilon"), r"prediction='epsilon' is not what .*use 'v'"),
  (dict(model__hidden_size=16), r"\d+ of another shape: patch_embed/kernel"),
]


@pytest.mark.parametrize(("fields", "words"), WRONG)
def test_a_run_of_another_model_is_refused(full_run, fields, words):
  config = config_of(full_run, **fields)
  with pytest.raises(UserError, match=words):
    open_pretrained(config, Experiment(config).shape)


def test_published_weights_need_the_published_variance(tmp_path):
  config = tiny.tiny_config("method=full", model__learn_sigma=True)
  path = write_file(tmp_path, layouts.OFFICIAL, config)
  other = config_of(path, model__learn_sigma=True)
  with pytest.raises(UserError, match=r"variance_floor='beta' is not what .* use 'posterior'"):
    open_pretrained(other, Experiment(other).shape)


UNTOLD = r"diffusion\.num_train_timesteps, diffusion\.noise_schedule, diffusion\.prediction, which"
OTHERS = (
  r"published models have diffusion\.noise_schedule='linear' and diffusion\.prediction='epsilon', "
  r"and this run has 'squaredcos_cap_v2' and 'v'$"
)


def unknown_of(config):
  return open_pretrained(config, Experiment(config).shape).unknown


def test_a_warning_says_what_a_foreign_file_does_not_tell(full_run, tmp_path):
  fields = dict(model__learn_sigma=True, diffusion__variance_floor="posterior")
  path = write_file(tmp_path, layouts.OFFICIAL, config_of("", **fields))
  found = unknown_of(config_of(path, **fields))
  assert re.search(rf"does not tell model\.num_heads, {UNTOLD}.*{OTHERS}", found)
  published = dict(diffusion__noise_schedule="linear", diffusion__prediction="epsilon")
  assert "published" not in unknown_of(config_of(path, **fields | published))
  path = write_file(tmp_path, layouts.DIFFUSERS, config_of("", **fields))
  found = unknown_of(config_of(path, **fields))
  assert re.search(rf"does not tell model\.frequency_shift, {UNTOLD}.*{OTHERS}", found)
  assert not unknown_of(config_of(full_run))


@pytest.mark.parametrize("is_sharded", [False, True])
def test_the_half_precision_variant_of_diffusers_is_read(tmp_path, is_sharded):
  config = tiny.tiny_config("method=full")
  path = write_file(tmp_path, layouts.DIFFUSERS, config)
  tensors = tensor_files.read_tensors(path, "ema")
  path.unlink()
  half = {key: tensor.astype(np.float16) for key, tensor in tensors.items()}
  name = "diffusion_pytorch_model.fp16.safetensors"
  if is_sharded:
    index, name = "diffusion_pytorch_model.safetensors.index.fp16.json", "shard.fp16.safetensors"
    weight_map = json.dumps({"weight_map": dict.fromkeys(half, name)})
    (tmp_path / index).write_text(weight_map)
  tensor_files.write_safetensors(tmp_path / name, half, {})
  given = config_of(tmp_path)
  found = open_pretrained(given, Experiment(given).shape).params
  assert_equal(found, {k: np.float32(np.float16(v)) for k, v in params_of(config).items()})


def test_a_path_without_weights_is_refused(tmp_path):
  for path, words in ((tmp_path, "neither checkpoints nor"), (tmp_path / "no", "does not exist")):
    config = config_of(path)
    with pytest.raises(UserError, match=words):
      open_pretrained(config, Experiment(config).shape)


@pytest.mark.parametrize("num_steps", [0, 1])
def test_training_starts_from_the_trained_parameters(full_run, tmp_path, num_steps):
  fields = {"training__num_steps": num_steps, "init__from_": str(full_run)}
  fields["init__distillation"] = 1e4
  trained.train_one_device(tmp_path, checkpoint__keep_every=1, **fields)
  # The distance from the teacher, which the cut leaves, is almost all of the loss.
  assert all(line["train/loss"] > 100 for line in tiny.read_metrics(tmp_path))
  with contextlib.closing(Checkpoints(tmp_path)) as opened:
    assert opened.steps() == [1, 0][1 - num_steps :]
    template = Experiment(tiny.tiny_config(**fields)).params_template
    _, found = opened.restore_params(template, ["raw", "ema"], step=0)
  start_params = start(tiny.tiny_config(**fields))
  for weights in found.values():
    assert_equal(layouts.flat(weights), start_params)


def test_a_start_reports_its_loss_before_and_after_compression(full_run, tmp_path):
  losses = {}
  for arm in ("full", "adaptive"):
    fields = {"init__from_": str(full_run), "training__num_steps": 0}
    config = tiny.tiny_config(f"method={arm}", training__eval_every_steps=1, **fields)
    train.train(config, str(tmp_path / arm), jax.devices()[:1])
    (line,) = tiny.read_metrics(tmp_path / arm)
    losses[arm] = {name: line[name] for name in line if name.endswith("/loss")}
  full, adaptive = losses["full"], losses["adaptive"]
  assert [*full] == ["eval/loss"] and [*adaptive] == ["eval/loss", "init/loss"]
  np.testing.assert_allclose(adaptive["init/loss"], full["eval/loss"], rtol=1e-6)
  assert abs(adaptive["eval/loss"] / full["eval/loss"] - 1) > 1e-3
  assert_one_start(tmp_path / "adaptive", config)


def assert_one_start(workdir, config):
  """A run that starts again at step 0 keeps its line, and one without a checkpoint replaces it."""
  path = workdir / "metrics.jsonl"
  first = path.read_text()
  marked = first.replace('"step": 0', '"step": 0, "first": 1')
  path.write_text(marked)
  train.train(config, str(workdir), jax.devices()[:1])
  assert path.read_text() == marked
  shutil.rmtree(workdir / "checkpoints")
  train.train(config, str(workdir), jax.devices()[:1])
  assert path.read_text() == first


def test_distillation_adds_the_distance_from_the_teacher_to_the_loss(full_run):
  config = config_of(full_run, "", init__distillation=0.5)
  experiment = Experiment(config)
  objective = experiment.objective(jax.devices()[:1])
  given = dict(teacher=experiment.dense_model(), distillation=config.init.distillation)
  objective = dataclasses.replace(objective, **given)
  teacher = jax.tree.map(jnp.asarray, teacher_params(experiment))
  params = jax.tree.map(jnp.asarray, layouts.nest(trained.random_params(config)))
  size, rng = config.training.batch_size, np.random.default_rng(0)
  x_0, eps = (jnp.asarray(rng.standard_normal((size, 8, 8, 1), np.float32)) for _ in range(2))
  y = jnp.arange(size, dtype=jnp.int32) % 10
  t = jnp.arange(size, dtype=jnp.int32) * (1000 // size)
  noise = loss.StepNoise(t, eps, jnp.zeros(size, bool), eps)

  @jax.jit
  def measure(params, teacher):
    alone, taught = (
      loss.example_losses(params, objective, x_0, y, noise, given) for given in (None, teacher)
    )
    signal, sigma = (
      jnp.asarray(x**0.5, jnp.float32)[t][:, None, None, None]
      for x in (experiment.alphas_cumprod, 1 - experiment.alphas_cumprod)
    )
    x_t = signal * x_0 + sigma * eps
    outputs = [
      loss.predict(objective, params, x_t, t, y),
      objective.teacher.apply({"params": teacher}, x_t, t, y, low_rank.RankSelection()),
    ]
    return taught - alone, 0.5 * jnp.square(outputs[0] - outputs[1]).mean((1, 2, 3))

  added, expected = measure(params, teacher)
  assert expected.min() > 1e-3
  np.testing.assert_allclose(added, expected, rtol=1e-3)


def test_distillation_needs_a_dense_teacher(tmp_path):
  save(tmp_path, tiny.tiny_config(ADAPTIVE))
  with pytest.raises(UserError, match=r"needs a dense teacher, and .* has blocks_0/adaln/down"):
    teacher_params(Experiment(config_of(tmp_path, ADAPTIVE, init__distillation=1.0)))
  with pytest.raises(UserError, match=r"init\.distillation=1\.0 needs trained parameters"):
    tiny.tiny_config(init__distillation=1.0)


def test_a_run_keeps_its_teacher(tmp_path):
  teacher, fields = tmp_path / "teacher", {"init__distillation": 1.0}
  teacher.mkdir()
  save(teacher, tiny.tiny_config("method=full"))
  fields |= {"init__from_": str(teacher), "training__num_steps": 0}
  trained.train_one_device(tmp_path / "run", **fields)
  trained.train_one_device(tmp_path / "run", **fields)
  config = tiny.tiny_config("method=full")
  params = layouts.nest({name: 2 * array for name, array in params_of(config).items()})
  trained.save_checkpoint(teacher, config, step=9, params=params)
  with pytest.raises(UserError, match=r"on other data: teacher\.digest \(.*Use another"):
    trained.train_one_device(tmp_path / "run", **fields)


def test_no_steps_need_trained_parameters():
  with pytest.raises(UserError, match=r"num_steps=0 needs trained parameters"):
    tiny.tiny_config(training__num_steps=0)
