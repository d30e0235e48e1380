import json
import pathlib

import numpy as np
import pytest

from lrdit.analysis.unit_cache import UnitCache

KEY = {"step": 8, "boundaries": (0, 44, 1000)}


def test_a_unit_is_there_again(tmp_path):
  record, arrays = {"rank": 3, "values": [0.1, 1e-300]}, {"left": np.arange(6.0).reshape(2, 3)}
  UnitCache(tmp_path / "weights", KEY).save("blocks_0/attn/qkv", record, arrays)
  parts = UnitCache(tmp_path / "weights", KEY)  # as after an interruption; tuples are lists in JSON
  loaded, loaded_arrays = parts.load("blocks_0/attn/qkv")
  assert loaded == record
  assert list(loaded_arrays) == ["left"]
  np.testing.assert_array_equal(loaded_arrays["left"], arrays["left"])
  assert parts.load("blocks_0/attn/proj") is None


def test_a_unit_without_arrays(tmp_path):
  parts = UnitCache(tmp_path / "weights", KEY)
  parts.save("patch_embed", {"loss": 0.5})
  assert parts.load("patch_embed") == ({"loss": 0.5}, {})


def test_another_key_empties(tmp_path):
  UnitCache(tmp_path / "weights", KEY).save("patch_embed", {"loss": 0.5})
  assert UnitCache(tmp_path / "weights", KEY | {"step": 9}).load("patch_embed") is None
  assert UnitCache(tmp_path / "weights", KEY).load("patch_embed") is None  # nor do old ones return


@pytest.mark.parametrize("text", ["", '{"step": 8', None])
def test_a_damaged_key_empties(tmp_path, text):
  UnitCache(tmp_path / "weights", KEY).save("patch_embed", {"loss": 0.5})
  path = tmp_path / "weights" / "key.json"
  path.unlink() if text is None else path.write_text(text)
  assert UnitCache(tmp_path / "weights", KEY).load("patch_embed") is None
  assert json.loads(path.read_text()) == json.loads(json.dumps(KEY))


def test_a_torn_write_leaves_nothing(tmp_path, monkeypatch):
  parts = UnitCache(tmp_path / "weights", KEY)
  parts.save("kept", {"loss": 0.5})

  def torn(file, **arrays):
    file.write(b"PK\x03\x04 the first bytes")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(np, "savez", torn)
  for unit in ("lost", "kept"):
    with pytest.raises(OSError, match="No space left"):
      parts.save(unit, {"loss": 0.25})
  monkeypatch.undo()
  again = UnitCache(tmp_path / "weights", KEY)
  assert again.load("lost") is None
  assert again.load("kept") == ({"loss": 0.5}, {})  # the whole one that was there before
  assert sorted(p.name for p in pathlib.Path(again.directory).iterdir()) == ["kept.npz", "key.json"]


def test_what_a_kill_leaves_behind_is_not_a_unit(tmp_path):
  parts = UnitCache(tmp_path / "weights", KEY)
  (tmp_path / "weights" / "lost.npz.tmp").write_bytes(b"PK\x03\x04 the first bytes")
  assert parts.load("lost") is None
  parts.save("lost", {"loss": 0.5})
  assert parts.load("lost") == ({"loss": 0.5}, {})


def test_removal_takes_all(tmp_path):
  parts = UnitCache(tmp_path / "weights", KEY)
  parts.save("patch_embed", {})
  parts.remove()
  assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize("keep", [0, 10, 200])
def test_a_damaged_unit_is_missing(tmp_path, keep):
  parts = UnitCache(tmp_path / "weights", KEY)
  parts.save("layer", {"loss": 0.5}, {"left": np.arange(1000.0)})
  path = tmp_path / "weights" / "layer.npz"
  path.write_bytes(path.read_bytes()[:keep])
  assert parts.load("layer") is None
  parts.save("layer", {"loss": 0.25})
  assert parts.load("layer") == ({"loss": 0.25}, {})
