import numpy as np
import pytest

from lrdit.runtime.store import crc32_of_json
from lrdit.train import manifest

ITEMS = {"params": {"a": {"down": np.ones((4, 2), np.float32), "bias": np.zeros(3, np.int32)}}}
CONFIG = {"seed": 0}


@pytest.mark.parametrize("name", ["down", "bias"])
def test_a_change_to_any_array_changes_the_manifest(name):
  layer = ITEMS["params"]["a"]
  changed = {"params": {"a": layer | {name: layer[name] + 1}}}
  made = [manifest.make_manifest(2, items, CONFIG) for items in (ITEMS, changed)]
  assert made[0] != made[1]


@pytest.mark.parametrize(
  ("step", "config", "message"),
  [
    (3, CONFIG, "it holds step 2"),
    (2, {"seed": 1}, "its config changed"),
    (2, None, "its config changed"),
  ],
)
def test_a_manifest_belongs_to_a_step_and_a_config(step, config, message):
  made = manifest.make_manifest(2, ITEMS, CONFIG)
  assert manifest.check_manifest(2, made, CONFIG).keys() == ITEMS.keys()
  with pytest.raises(manifest.DamagedCheckpoint, match=message):
    manifest.check_manifest(step, made, config)


@pytest.mark.parametrize(
  "contents",
  [
    [],
    {"step": 2},
    {"items": {}},
    {"step": 2, "items": {"params": 1}},
    {"step": 2, "items": {"params": {"layout": {"a": "int8[1]"}, "crc32": {}}}},
  ],
)
def test_a_manifest_that_lacks_something_is_damage(contents):
  made = {"contents": contents, "crc32": crc32_of_json(contents)}
  with pytest.raises(manifest.DamagedCheckpoint, match="its manifest is not complete"):
    manifest.check_manifest(2, made, CONFIG)


def test_paths_of_no_tree_are_damage():
  for paths in (("['a']", "['a']['b']"), ("['a']['b']", "['a']"), ("",)):
    with pytest.raises(manifest.DamagedCheckpoint, match="describes no tree"):
      manifest.zeros(dict.fromkeys(paths, "int8[1]"))


def test_a_manifest_of_an_earlier_version_does_not_know_its_config():
  contents = manifest.make_manifest(2, ITEMS, CONFIG)["contents"]
  del contents["config"]
  made = {"contents": contents, "crc32": crc32_of_json(contents)}
  assert manifest.check_manifest(2, made, {"seed": 1}).keys() == ITEMS.keys()


def test_a_layout_describes_a_tree():
  described = manifest.zeros(manifest.layout(ITEMS["params"]))
  assert manifest.layout(described) == manifest.layout(ITEMS["params"])


@pytest.mark.parametrize(
  "kind", ["float32", "float32[-1]", "float32[x]", "no[3]", f"int8[{1 << 80}]"]
)
def test_a_manifest_of_no_layout_is_damage(kind):
  with pytest.raises(manifest.DamagedCheckpoint, match="its manifest has"):
    manifest.zeros({"['a']": kind})
