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


def test_a_manifest_belongs_to_a_step_and_a_config():
  made = manifest.make_manifest(2, ITEMS, CONFIG)
  assert manifest.check_manifest(2, made, CONFIG).keys() == ITEMS.keys()
  for step, config in ((3, CONFIG), (2, {"seed": 1}), (2, None)):
    with pytest.raises(manifest.DamagedCheckpoint, match=r"it holds step 2|its config changed"):
      manifest.check_manifest(step, made, config)


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
