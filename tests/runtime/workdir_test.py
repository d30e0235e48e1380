import json

import pytest

from lrdit.runtime import workdir
from lrdit.runtime.errors import UserError


def test_damaged_data_json_is_written_by_the_training_that_its_message_names(tmp_path):
  (tmp_path / "checkpoints" / "4").mkdir(parents=True)
  (tmp_path / "data.json").write_text("{")
  with pytest.raises(UserError, match="run --mode=train with the same --workdir, which writes it"):
    workdir.read_data(tmp_path)
  workdir.check_data(tmp_path, {"train": {"name": "digits"}})
  assert workdir.read_data(tmp_path) == {"train": {"name": "digits"}}
  with pytest.raises(UserError, match="holds a run on other data"):
    workdir.check_data(tmp_path, {"train": {"name": "other"}})


def test_a_link_to_a_directory_is_emptied_and_removed(tmp_path):
  (tmp_path / "disk" / "below").mkdir(parents=True)
  (tmp_path / "disk" / "file").touch()
  (tmp_path / "png").symlink_to("disk")
  workdir.remove_directory(tmp_path / "png")
  assert [path.name for path in tmp_path.rglob("*")] == ["disk"]
  workdir.remove_directory(tmp_path / "png")  # nothing is there


def test_a_failed_write_leaves_the_old_json(tmp_path):
  path = tmp_path / "x.json"
  workdir.write_json(path, {"a": 1})
  with pytest.raises(TypeError):
    workdir.write_json(path, {"a": object()})
  assert json.loads(path.read_text()) == {"a": 1}
  assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
