import json

import pytest

from lrdit import workdir
from lrdit.errors import UserError
from tests.tiny import tiny_config


def begin(path, config):
  """A workdir as training leaves it at its first checkpoint."""
  opened = workdir.open_workdir(path, config, create=True)
  workdir.store_config(opened, config)
  (opened / "checkpoints" / "4").mkdir(parents=True)
  return opened


def test_a_run_that_never_saved_may_be_corrected(tmp_path):
  workdir.store_config(workdir.open_workdir(tmp_path, tiny_config(), create=True), tiny_config())
  corrected = tiny_config(training__batch_size=8)
  assert workdir.open_workdir(tmp_path, corrected, create=True) == tmp_path


def test_training_stores_the_config_and_others_find_it(tmp_path):
  path = begin(tmp_path / "a" / "b", tiny_config())
  stored = json.loads((path / "config.json").read_text())
  assert stored["model"]["hidden_size"] == 32
  assert stored["model"]["patch_size"] == 2  # resolved from the variant
  assert workdir.open_workdir(path, tiny_config(), create=False) == path


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
  assert workdir.open_workdir(tmp_path, tiny_config(**change), create=False) == tmp_path


@pytest.mark.parametrize(
  ("change", "field"),
  [
    ({"model__depth": 1}, "model.depth"),
    ({"rank__ratio": 0.4}, "rank.ratio"),
    ({"seed": 1}, "seed"),
    ({"optimizer__learning_rate": 1.0}, "optimizer.learning_rate"),
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
    workdir.open_workdir(tmp_path, tiny_config(**change), create=create)
  assert (tmp_path / "config.json").read_text() == before


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"seed": 0}'])
def test_a_damaged_config_is_named(tmp_path, content):
  (begin(tmp_path, tiny_config()) / "config.json").write_text(content)
  with pytest.raises(UserError, match=r"is damaged|holds another run"):
    workdir.open_workdir(tmp_path, tiny_config(), create=True)


def test_a_failed_write_leaves_the_old_json(tmp_path):
  path = tmp_path / "x.json"
  workdir.write_json(path, {"a": 1})
  with pytest.raises(TypeError):
    workdir.write_json(path, {"a": object()})
  assert json.loads(path.read_text()) == {"a": 1}
  assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
