"""Runs that start from trained parameters."""

import contextlib
import json

import numpy as np
import pytest

from lrdit.config.run_config import store_config
from lrdit.experiment import Experiment
from lrdit.model import factors, layouts, tensor_files
from lrdit.pretrained import open_pretrained, starting_params
from lrdit.runtime.errors import UserError
from lrdit.train.checkpoints import Checkpoints
from tests import tiny, trained

ADAPTIVE = "method=adaptive"


def config_of(path, arg="method=full", **fields):
  return tiny.tiny_config(arg, init__from_=str(path), **trained.SHALLOW | fields)


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
  """The workdir of a full arm."""
  config = tiny.tiny_config("method=full", **trained.SHALLOW)
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
  expected = params_of(tiny.tiny_config("method=full", **trained.SHALLOW))
  assert_equal(start(config_of(full_run)), expected)
  assert_equal(start(config_of(full_run / "checkpoints" / "8")), expected)


@pytest.mark.parametrize("layout", [layouts.OFFICIAL, layouts.DIFFUSERS])
def test_a_run_starts_from_a_foreign_file(tmp_path, layout):
  config = tiny.tiny_config("method=full", **trained.SHALLOW)
  path = write_file(tmp_path, layout, config)
  assert_equal(start(config_of(path)), params_of(config))


def test_the_seed_stands_in_the_path(full_run, tmp_path):
  (tmp_path / "run3").symlink_to(full_run)
  config = config_of(tmp_path / "run{seed}", seed=3)
  assert open_pretrained(config, Experiment(config).shape).source.endswith("run3")


@pytest.mark.parametrize("compression", factors.COMPRESSIONS)
def test_kernels_become_factors_of_the_plan(full_run, compression):
  config = config_of(full_run, ADAPTIVE, init__compression=compression, init__whitening_examples=16)
  experiment, got = Experiment(config), start(config)
  dense = params_of(tiny.tiny_config("method=full", **trained.SHALLOW))
  template = layouts.flat(experiment.params_template)
  assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in template.items()}
  name = "blocks_0/mlp/fc1"
  rank = experiment.plan.by_name[name].max_rank
  sigma = np.linalg.svd(dense[f"{name}/kernel"], compute_uv=False)
  error = np.linalg.norm(dense[f"{name}/kernel"] - got[f"{name}/down"] @ got[f"{name}/up"])
  least = np.linalg.norm(sigma[rank:])
  assert (error == pytest.approx(least, rel=1e-3)) == (compression == "svd")
  assert least - 1e-4 < error < np.linalg.norm(sigma)


def test_a_run_of_lower_rank_takes_the_prefix(tmp_path):
  large = tiny.tiny_config(ADAPTIVE, **trained.SHALLOW)
  save(tmp_path, large)
  got, whole = start(config_of(tmp_path, ADAPTIVE, rank__ratio=0.3)), params_of(large)
  for path, value in got.items():
    part = value.shape
    np.testing.assert_array_equal(value, whole[path][tuple(map(slice, part))])
  with pytest.raises(UserError, match=r"at rank \d+, and this model needs \d+: lower config"):
    start(config_of(tmp_path, ADAPTIVE, rank__ratio=0.7))


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
  config = tiny.tiny_config("method=full", model__learn_sigma=True, **trained.SHALLOW)
  path = write_file(tmp_path, layouts.OFFICIAL, config)
  other = config_of(path, model__learn_sigma=True)
  with pytest.raises(UserError, match=r"variance_floor='beta' is not what .* use 'posterior'"):
    open_pretrained(other, Experiment(other).shape)


def test_a_path_without_weights_is_refused(tmp_path):
  for path, words in ((tmp_path, "neither checkpoints nor"), (tmp_path / "no", "does not exist")):
    config = config_of(path)
    with pytest.raises(UserError, match=words):
      open_pretrained(config, Experiment(config).shape)


@pytest.mark.parametrize("num_steps", [0, 1])
def test_training_starts_from_the_trained_parameters(full_run, tmp_path, num_steps):
  fields = trained.SHALLOW | {"training__num_steps": num_steps, "init__from_": str(full_run)}
  trained.train_one_device(tmp_path, checkpoint__keep_every=1, **fields)
  with contextlib.closing(Checkpoints(tmp_path)) as opened:
    assert opened.steps() == [1, 0][1 - num_steps :]
    template = Experiment(tiny.tiny_config(**fields)).params_template
    _, found = opened.restore_params(template, ["raw", "ema"], step=0)
  start_params = start(tiny.tiny_config(**fields))
  for weights in found.values():
    assert_equal(layouts.flat(weights), start_params)


def test_no_steps_need_trained_parameters():
  with pytest.raises(UserError, match=r"num_steps=0 needs trained parameters"):
    tiny.tiny_config(training__num_steps=0)
