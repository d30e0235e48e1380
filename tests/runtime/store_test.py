"""What is kept on disk: JSON, arrays, and files that grow by rows."""

import json
import zlib

import numpy as np
import pytest

from lrdit.runtime import store
from lrdit.runtime.errors import UserError


def test_a_link_to_a_directory_is_emptied_and_removed(tmp_path):
  (tmp_path / "disk" / "below").mkdir(parents=True)
  (tmp_path / "disk" / "file").touch()
  (tmp_path / "png").symlink_to("disk")
  store.remove_directory(tmp_path / "png")
  assert [path.name for path in tmp_path.rglob("*")] == ["disk"]
  store.remove_directory(tmp_path / "png")  # nothing is there


def test_a_failed_write_leaves_the_old_json(tmp_path):
  path = tmp_path / "x.json"
  store.write_json(path, {"a": 1})
  with pytest.raises(TypeError):
    store.write_json(path, {"a": object()})
  assert json.loads(path.read_text()) == {"a": 1}
  assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "\udcff"])
def test_missing_and_damaged_json_is_refused_with_the_fix(tmp_path, text):
  path = tmp_path / "x.json"
  if text is not None:
    path.write_text(text, errors="surrogateescape")
  with pytest.raises(
    store.StoreError, match=r"x\.json is (missing|damaged \(.*\)): write it again$"
  ):
    store.read_json(path, "write it again")


def test_arrays_come_back_and_a_damaged_archive_is_refused(tmp_path):
  path, arrays = tmp_path / "x.npz", {"a": np.arange(6).reshape(2, 3), "b/c": np.ones(2)}
  store.save_arrays(path, arrays)
  np.testing.assert_equal(store.load_arrays(path, "write it again"), arrays)
  path.write_bytes(path.read_bytes()[:-30])
  with pytest.raises(store.StoreError, match=r"x\.npz is damaged \(.*: write it again$"):
    store.load_arrays(path, "write it again")


def test_differences_are_named_a_few_at_most():
  ours = {"a": (1, 2), "b": {"c": 1, "d": 2}}
  store.check_same("it is other", ours, {"a": [1, 2], "b": {"c": 1, "d": 2}}, "go away")
  with pytest.raises(store.StoreError) as error:
    store.check_same("it is other", ours, {"a": [1], "b": {"c": 1}, "e": 0, "f": 0}, "go away")
  assert str(error.value) == (
    "it is other: a ([1] there, [1, 2] asked for); b.d (None there, 2 asked for); "
    "e (0 there, None asked for) and 1 more: go away"
  )


def test_weights_that_are_not_finite_are_named():
  store.check_finite("it", {"a": np.ones(2), "b": np.array(3)}, "train again")
  with pytest.raises(UserError, match=r"it has .* not finite \(1 of 2 arrays, such as a\): train"):
    store.check_finite("it", {"a": np.array([1, np.nan]), "b": np.ones(1)}, "train again")


def test_rows_go_on_where_their_record_says(tmp_path):
  rows = np.arange(21, dtype=np.float32).reshape(7, 3)
  path, header = tmp_path / "rows.npy", store.npy_header((7, 3), np.float32)

  def file():
    return store.RowFile(path, (3,), np.float32, "write it again", header)

  first = file()
  first.open(0, 0)
  first.append(rows[:2])
  first.sync()
  kept = first.num_rows, first.crc32
  first.append(rows[2:4] + 1)  # never counted
  first.close()
  second = file()
  second.open(*kept)
  second.append(rows[2:])
  second.close()
  np.testing.assert_array_equal(np.load(path), rows)
  assert (second.num_rows, second.crc32) == (7, zlib.crc32(rows.tobytes()))
  second.verify(7, second.crc32)
  np.testing.assert_array_equal(np.concatenate(list(file().read(5))), rows[:5])
  with pytest.raises(store.StoreError, match="has changed since it was written: write it again"):
    list(file().read(7, second.crc32 + 1))
  with pytest.raises(store.StoreError, match="has changed since"):
    file().verify(6, zlib.crc32(rows[:6].tobytes()))
  with pytest.raises(store.StoreError, match="has lost data: write it again"):
    file().open(8, 0)


def test_what_is_renamed_is_on_the_disk(tmp_path, monkeypatch):
  events = []
  monkeypatch.setattr(store, "sync", lambda path: events.append((path.name, path.read_text())))
  store.write_json(tmp_path / "a", 1)
  assert events == [("a.tmp", "1\n")]
