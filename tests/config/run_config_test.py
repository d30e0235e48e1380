"""Which fields of a run's config may change, and what config.json and changes.jsonl say of it."""

import json
import logging

import pytest

from lrdit.config import run_config
from lrdit.runtime.errors import UserError
from lrdit.runtime.store import flatten, remove_directory
from tests.tiny import tiny_config


def begin(path, config):
  """A workdir as training leaves it at its first checkpoint."""
  opened = run_config.open_workdir(path, config, create=True)
  run_config.store_config(opened, config)
  (opened / "checkpoints" / "4").mkdir(parents=True)
  return opened


def test_a_run_that_never_saved_may_be_corrected(tmp_path):
  run_config.store_config(
    run_config.open_workdir(tmp_path, tiny_config(), create=True), tiny_config()
  )
  corrected = tiny_config(training__batch_size=8)
  assert run_config.open_workdir(tmp_path, corrected, create=True) == tmp_path


def test_training_stores_the_config_and_others_find_it(tmp_path):
  path = begin(tmp_path / "a" / "b", tiny_config())
  stored = json.loads((path / "config.json").read_text())
  assert stored["model"]["hidden_size"] == 32
  assert stored["model"]["patch_size"] == 2  # resolved from the variant
  assert run_config.open_workdir(path, tiny_config(), create=False) == path


@pytest.mark.parametrize(
  "change",
  [
    {"sampling__num_steps": 3},
    {"checkpoint__keep": 7},
    {"training__num_steps": 9},
    {"training__log_every_steps": 5},
  ],
)
def test_fields_that_do_not_make_another_run_may_change(tmp_path, change):
  begin(tmp_path, tiny_config())
  assert run_config.open_workdir(tmp_path, tiny_config(**change), create=False) == tmp_path


@pytest.mark.parametrize(
  ("change", "field"),
  [
    ({"model__depth": 2}, "model.depth"),
    ({"rank__ratio": 0.4}, "rank.ratio"),
    ({"seed": 1}, "seed"),
    ({"diffusion__prediction": "epsilon"}, "diffusion.prediction"),
    ({"training__batch_size": 32}, "training.batch_size"),
    ({"rank__dense_layers": ("patch_embed", "final_layer")}, "rank.dense_layers"),
  ],
)
@pytest.mark.parametrize("create", [True, False])
def test_another_run_is_refused_by_the_name_of_the_field(tmp_path, change, field, create):
  begin(tmp_path, tiny_config())
  before = (tmp_path / "config.json").read_text()
  with pytest.raises(UserError, match=f"holds another run: {field} "):
    run_config.open_workdir(tmp_path, tiny_config(**change), create=create)
  assert (tmp_path / "config.json").read_text() == before


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"seed": 0}'])
def test_a_damaged_config_is_named(tmp_path, content):
  (begin(tmp_path, tiny_config()) / "config.json").write_text(content)
  with pytest.raises(UserError, match=r"is damaged|holds another run"):
    run_config.open_workdir(tmp_path, tiny_config(), create=True)


@pytest.mark.parametrize("has_copy", [True, False])
def test_the_fix_named_for_a_damaged_config_works(tmp_path, has_copy):
  config = tiny_config()
  begin(tmp_path, config)
  copy = tmp_path / "checkpoints" / "4" / "config" / "metadata"
  if has_copy:
    copy.parent.mkdir()
    copy.write_text(json.dumps(config.to_dict()))
  (tmp_path / "config.json").write_text("{")
  fix = f"copy {copy} over it" if has_copy else f"delete {tmp_path / 'checkpoints'} to start again"
  with pytest.raises(UserError, match=fix):
    run_config.open_workdir(tmp_path, config, create=True)
  if has_copy:
    (tmp_path / "config.json").write_text(copy.read_text())
  else:
    remove_directory(tmp_path / "checkpoints")
  run_config.open_workdir(tmp_path, config, create=True)


def test_checkpoints_on_a_disk_that_is_not_there_are_no_fresh_start(tmp_path):
  config = tiny_config()
  begin(tmp_path, config)
  (tmp_path / "checkpoints" / "4").rmdir()
  (tmp_path / "checkpoints").rmdir()
  (tmp_path / "checkpoints").symlink_to(tmp_path / "unmounted")
  with pytest.raises(UserError, match=r"is a link to .*/unmounted, which is not there: mount it"):
    run_config.open_workdir(tmp_path, config, create=True)


RATES = [
  {"optimizer__learning_rate": 1.0},
  {"optimizer__warmup_steps": 7},
  {"optimizer__decay": "constant"},
  {"optimizer__weight_decay": 0.1},
  {"optimizer__grad_clip_norm": None},
  {"optimizer__ema_decay": 0.5},
  {"optimizer__factor_rates": "fan_in"},
  {"curriculum__patience": 1},
  {"curriculum__check_every_steps": 1},
]


@pytest.mark.parametrize("change", RATES, ids=lambda change: "".join(change))
def test_training_may_go_on_at_another_rate_and_others_must_know_it(tmp_path, change):
  begin(tmp_path, tiny_config())
  changed = tiny_config(**change)
  run_config.open_workdir(tmp_path, changed, create=True)
  with pytest.raises(UserError, match="holds another run"):
    run_config.open_workdir(tmp_path, changed, create=False)
  run_config.begin_config(tmp_path, changed, first_step=4)
  run_config.open_workdir(tmp_path, changed, create=False)
  (field,) = (name.replace("__", ".") for name in change)
  assert [change.field for change in run_config.read_changes(tmp_path)] == [field]


PROCESS = {
  "model__dtype": "bfloat16",
  "model__remat": True,
  "model__scan_blocks": True,
  "rank__compute": "masked",
}


def test_how_a_process_computes_is_told_and_refused_by_no_mode(tmp_path, caplog, monkeypatch):
  caplog.set_level(logging.INFO, logger="lrdit")
  begin(tmp_path, tiny_config())
  for name, value in PROCESS.items():
    config = tiny_config(**{name: value})
    for create in (True, False):
      run_config.log_process_fields(
        run_config.open_workdir(tmp_path, config, create=create), config
      )
    field = name.replace("__", ".")
    assert caplog.text.count(f"than the run's training: {field} (") == 2
  caplog.clear()
  run_config.log_process_fields(tmp_path, tiny_config())
  assert not caplog.text


def field(workdir_path, name):
  return flatten(json.loads((workdir_path / "config.json").read_text()))[name]


def test_changes_on_the_way_are_noted_as_long_as_their_steps_last(tmp_path):
  def go_on(first_step, **fields):
    config = tiny_config(training__num_steps=20, **fields)
    run_config.begin_config(tmp_path, config, first_step)
    changes = run_config.read_changes(tmp_path)
    return [(change.step, change.before, change.after) for change in changes]

  rate = "optimizer__learning_rate"
  assert go_on(0) == []
  assert go_on(0, **{rate: 2.0}) == []  # before the first checkpoint
  assert go_on(4, **{rate: 1.0}) == [(4, 2.0, 1.0)]
  assert go_on(4, **{rate: 3.0}) == [(4, 2.0, 3.0)]  # no step was saved at 1.0
  assert go_on(8, **{rate: 3.0}) == [(4, 2.0, 3.0)]
  assert go_on(8, **{rate: 3.0}, model__remat=True) == [(4, 2.0, 3.0), (8, False, True)]
  assert go_on(8, **{rate: 2.0}) == [(4, 2.0, 3.0), (8, 3.0, 2.0)]
  assert go_on(4, **{rate: 2.0}) == []  # the steps at 3.0 are lost
  (tmp_path / "changes.jsonl").write_bytes(b"\xff{\n[1]\n{}\n")
  assert go_on(8, **{rate: 2.0}) == []


def test_what_nothing_is_trained_with_is_refused_or_not_the_run_s(tmp_path):
  config = tiny_config()
  run_config.begin_config(tmp_path, config, 0)
  with pytest.raises(UserError, match=r"finished, after 8 steps.*Raise config.training.num_steps"):
    run_config.begin_config(tmp_path, tiny_config(optimizer__learning_rate=1.0), 8)
  run_config.begin_config(tmp_path, tiny_config(model__dtype="bfloat16", checkpoint__keep=9), 8)
  assert (field(tmp_path, "model.dtype"), field(tmp_path, "checkpoint.keep")) == ("float32", 9)
  longer = dict(optimizer__learning_rate=1.0, model__dtype="bfloat16", training__num_steps=9)
  run_config.begin_config(tmp_path, tiny_config(**longer), 8)
  assert field(tmp_path, "model.dtype") == "bfloat16"
  assert len(run_config.read_changes(tmp_path)) == 2
