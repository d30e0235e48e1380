"""The schema: its page, configs of older versions, and None on the command line."""

import json

import jax
import jax.numpy as jnp
import pytest

from configs import cifar10, digits
from lrdit.config import docs, run_config, schema
from lrdit.config.field import Role
from lrdit.config.flags import parse_flags
from lrdit.config.resolve import resolve
from lrdit.config.schema import FIELDS, fields_of, upgrade
from lrdit.experiment import Experiment
from lrdit.runtime.errors import UserError
from lrdit.runtime.store import flatten
from tests import tiny

# What a version without None and without the newer fields stored.
ZEROS = {
  "vae.downsample_factor": 0,
  "rank.first_n_blocks": 0,
  "rank.last_n_blocks": 0,
  "optimizer.grad_clip_norm": 0.0,
  "training.eval_every_steps": 0,
  "training.sample_every_steps": 0,
  "evaluation.classifier_steps": 0,
  "benchmark.sampling_runs": 0,
  "benchmark.matmul_size": 0,
}
NEW = {
  "rank": ("logistic_steepness", "logistic_midpoint"),
  "diffusion": ("min_snr_gamma",),
  "optimizer": ("beta1", "beta2", "epsilon"),
  "training": ("profile_steps",),
}


def old_config(config):
  """Return the config.json that an older version stored for a config."""
  stored = json.loads(json.dumps(config.to_dict()))
  for field, zero in ZEROS.items():
    group, _, key = field.rpartition(".")
    assert stored[group][key] is None or field == "benchmark.sampling_runs"
    stored[group][key] = zero
  for group, keys in NEW.items():
    for key in keys:
      del stored[group][key]
  return stored


def test_the_page_of_fields_is_fresh():
  """`python -m lrdit.config.docs` writes it."""
  assert docs.PATH.read_text() == docs.render()


def test_a_workdir_of_an_older_version_opens_and_stays_the_same_run(tmp_path):
  config = tiny.tiny_config(optimizer__grad_clip_norm=None, benchmark__sampling_runs=None)
  stored = old_config(config)
  assert upgrade(stored) == json.loads(json.dumps(config.to_dict()))
  (tmp_path / "config.json").write_text(json.dumps(stored))
  (tmp_path / "checkpoints" / "4").mkdir(parents=True)
  for create in (True, False):
    run_config.open_workdir(tmp_path, config, create=create)
  run_config.begin_config(tmp_path, config, 4)
  assert run_config.read_changes(tmp_path) == []
  assert run_config.read_config(tmp_path) == upgrade(stored)
  assert stored == old_config(config)  # not changed in place


@pytest.mark.parametrize("stored", [{}, {"seed": 0}, {"model": 3, "rank": []}])
def test_upgrading_a_damaged_config_leaves_what_it_cannot_read(stored):
  assert {key: value for key, value in upgrade(stored).items() if key in stored} == stored


def flags_of(*fields):
  argv = ["main.py", "--config=configs/digits.py", "--workdir=w", *fields]
  return flatten(parse_flags(argv).config.to_dict())


def test_the_last_value_of_a_field_wins(monkeypatch):
  monkeypatch.chdir(tiny.ROOT)
  field, seed = "evaluation.extractors", ("--config.seed=1", "--config.seed=2")
  for last in (("classifier",), ("pixel",), ()):
    found = flags_of(f"--config.{field}=('pixel',)", f"--config.{field}={last}", *seed)
    assert (found[field], found["seed"]) == ([*last], 2)


@pytest.mark.parametrize("field", [name for name, field in FIELDS.items() if field.none])
def test_none_is_a_value_on_the_command_line_where_a_field_may_have_it(field, monkeypatch):
  monkeypatch.chdir(tiny.ROOT)
  assert flags_of(f"--config.{field}=None")[field] is None
  assert flags_of(f"--config.{field}=None", f"--config.{field}", "1")[field] == 1
  assert flags_of(f"--config.{field}=1", f"--config.{field}=None")[field] is None


def test_every_field_has_one_line_and_its_default_fits():
  config = schema.get_default_config("full", "S/2")
  assert set(flatten(config.to_dict())) == set(FIELDS)
  for name, field in FIELDS.items():
    assert field.meaning and "\n" not in field.meaning
    if name not in ("data.name", "data.image_size"):  # a recipe's to set
      field.check(name, schema.get(config, name))
  roles = [fields_of(role) for role in Role]
  assert sum(map(len, roles)) == len(FIELDS)


@pytest.mark.parametrize("field", ["muon_layers", "galore_rank", "factor_update"])
def test_fields_that_shape_the_optimizer_s_state_cannot_change_in_a_run(tmp_path, field):
  value = {"muon_layers": ("blocks_0",), "galore_rank": 4, "factor_update": "bands"}[field]
  run_config.store_config(tmp_path, tiny.tiny_config(optimizer__name="muon"))
  (tmp_path / "checkpoints" / "4").mkdir(parents=True)  # the run has begun
  changed = tiny.tiny_config(optimizer__name="muon", **{f"optimizer__{field}": value})
  with pytest.raises(UserError, match=rf"holds another run: optimizer\.{field}"):
    run_config.check_workdir(tmp_path, changed, create=True)  # as training does


@pytest.mark.parametrize(
  ("recipe", "arg", "name"),
  [
    (digits, "", "muon"),
    (digits, "recipe=dissertation", "adamw"),
    (cifar10, "", "adamw"),
    (cifar10, "variant=XS/4", "muon"),
    (cifar10, "variant=S/4,recipe=muon", "muon"),
    (cifar10, "variant=XS/4,recipe=dissertation", "adamw"),
  ],
)
def test_recipes_choose_the_optimizer(recipe, arg, name):
  assert resolve(recipe.get_config(arg)).optimizer.name == name


@pytest.mark.parametrize("method", ["full", "narrow", "static", "adaptive"])
def test_the_small_recipe_s_rate_is_the_best_of_its_arm(method):
  rate = {"full": 0.008, "narrow": 0.008, "static": 0.004, "adaptive": 0.004}[method]
  config = cifar10.get_config(f"method={method},variant=XS/4")
  assert resolve(config).optimizer.learning_rate == rate


def test_constants_of_one_s_own_reach_the_run():
  def made(**fields):
    return Experiment(tiny.tiny_config("method=adaptive", **fields))

  params, gradients = {"w": jnp.ones((2, 2))}, {"w": jnp.full((2, 2), 0.1)}

  def second_update(experiment):
    optimizer, state = experiment.optimizer, experiment.optimizer.init(params)
    for scale in (1.0, 3.0):
      scaled = jax.tree.map(lambda g, scale=scale: g * scale, gradients)
      updates, state = optimizer.update(scaled, state, params)
    return updates["w"][0, 0]

  plain = made()
  for field in ("beta1", "beta2", "epsilon"):
    assert second_update(made(**{f"optimizer__{field}": 0.5})) != second_update(plain)
  for name, beta2 in (("adamw", 0.999), ("lion", 0.99)):
    explicit = made(optimizer__name=name, optimizer__beta2=beta2)
    assert second_update(explicit) == second_update(made(optimizer__name=name))
  for field in ("steepness", "midpoint"):
    assert made(**{f"rank__logistic_{field}": 0.9}).plan != plain.plan
  capped = made(diffusion__loss_weighting="min_snr", diffusion__min_snr_gamma=2.0)
  assert capped.objective(jax.devices()[:1]).min_snr_gamma == 2.0
