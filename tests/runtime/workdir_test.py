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


def test_a_save_that_did_not_end_has_not_begun_a_run(tmp_path):
  (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp-1").mkdir(parents=True)
  assert not workdir.has_begun(tmp_path)
  (tmp_path / "checkpoints" / "5").mkdir()
  assert workdir.has_begun(tmp_path)
