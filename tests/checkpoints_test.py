import errno
import logging
import os
import pathlib
import random
import shutil
from unittest import mock

import jax
import numpy as np
import pytest

from lrdit import checkpoints as checkpoints_module
from lrdit import optimizer as optimizer_module
from lrdit import parallel
from lrdit.checkpoints import Checkpoints
from lrdit.errors import UserError
from lrdit.train_state import create_train_state

CONFIG = {"seed": 0}


def make_state(step=0):
  """A small state of the real structure, different at every step."""
  optimizer = optimizer_module.make_optimizer("adamw", 0.0, 1.0)
  params = {"a": {"down": np.ones((40, 8), np.float32), "bias": np.zeros(30, np.float32)}}
  state = parallel.to_host(create_train_state(params, optimizer, num_groups=3))
  rng = np.random.default_rng(step)
  noisy = jax.tree.map(lambda x: rng.integers(0, 10**6, x.shape).astype(x.dtype), state)
  return noisy.replace(step=np.asarray(step, np.int32))


TEMPLATE = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_state())


def save(workdir, *steps, keep=2):
  checkpoints = Checkpoints(workdir, keep)
  for step in steps:
    checkpoints.save(make_state(step), CONFIG)
  checkpoints.wait()
  checkpoints.close()


def assert_equal(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def test_a_restored_state_is_the_saved_one_to_the_bit(tmp_path):
  save(tmp_path, 5)
  assert_equal(Checkpoints(tmp_path, 2).restore_state(TEMPLATE), make_state(5))


def test_only_the_newest_are_kept(tmp_path):
  save(tmp_path, 1, 2, 3, 4, keep=2)
  assert Checkpoints(tmp_path, 2).steps() == [4, 3]


def test_raw_and_averaged_weights_are_told_apart(tmp_path):
  save(tmp_path, 5)
  state = make_state(5)
  expected = {"ema": state.ema_params, "raw": state.params}
  for weights in (["ema"], ["raw"], ["raw", "ema"]):
    step, params = Checkpoints(tmp_path).restore_params(TEMPLATE.params, weights)
    assert step == 5
    assert_equal(params, {name: expected[name] for name in weights})


def test_raw_and_averaged_weights_come_from_one_checkpoint(tmp_path, caplog, monkeypatch):
  monkeypatch.setattr(logging.getLogger("lrdit"), "propagate", True)
  save(tmp_path, 1, 2)
  for file in all_files(tmp_path, "2/ema_params"):
    truncate(file)
  step, params = Checkpoints(tmp_path).restore_params(TEMPLATE.params, ["raw", "ema"])
  assert step == 1
  assert_equal(params["raw"], make_state(1).params)
  assert caplog.text.count("is damaged") == 1


def test_no_checkpoint_is_a_fresh_start_or_an_error(tmp_path):
  checkpoints = Checkpoints(tmp_path, 2)
  assert checkpoints.restore_state(TEMPLATE) is None
  with pytest.raises(UserError, match="no checkpoint under"):
    checkpoints.restore_params(TEMPLATE.params, ["ema"])


def all_files(workdir, step):
  root = pathlib.Path(workdir) / "checkpoints" / str(step)
  return sorted(f for f in root.rglob("*") if f.is_file() and f.stat().st_size > 0)


def truncate(file):
  os.truncate(file, file.stat().st_size // 2)


def truncate_anywhere(file):
  size = file.stat().st_size
  os.truncate(file, random.Random(f"{file.name}{size}").randrange(size))


def flip_a_byte(file):
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 0xFF
  file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, truncate_anywhere, flip_a_byte, os.remove])
def test_damage_to_any_file_never_changes_what_is_restored(tmp_path, damage, caplog, monkeypatch):
  monkeypatch.setattr(logging.getLogger("lrdit"), "propagate", True)
  save(tmp_path / "whole", 1, 2)
  files = [f.relative_to(tmp_path / "whole") for f in all_files(tmp_path / "whole", 2)]
  fell_back = 0
  for i, file in enumerate(files):
    workdir = tmp_path / str(i)
    shutil.copytree(tmp_path / "whole", workdir)
    damage(workdir / file)
    caplog.clear()
    restored = Checkpoints(workdir, 2).restore_state(TEMPLATE)
    assert_equal(restored, make_state(int(restored.step)))
    if restored.step == 1:
      fell_back += 1
      assert caplog.text.count("is damaged") == 1
  # Some files say again what others say; those with the data must be noticed.
  assert fell_back >= 8, f"{fell_back} of {len(files)}"


def test_a_change_to_any_array_changes_the_manifest():
  state = make_state(2)
  leaves, tree = jax.tree.flatten(state)
  for i in range(len(leaves)):
    changed = [leaf + 1 if i == j else leaf for j, leaf in enumerate(leaves)]
    items = checkpoints_module._items(jax.tree.unflatten(tree, changed))
    manifest = checkpoints_module._manifest(2, checkpoints_module._items(state))
    assert manifest != checkpoints_module._manifest(2, items)


def test_a_step_can_be_damaged_twice(tmp_path):
  save(tmp_path, 1)
  for _ in range(2):
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.restore_state(TEMPLATE)
    checkpoints.save(make_state(2), CONFIG)
    checkpoints.close()
    for file in all_files(tmp_path, 2):
      truncate(file)
    assert Checkpoints(tmp_path, 2).restore_state(TEMPLATE).step == 1
  assert len(list((tmp_path / "damaged_checkpoints").iterdir())) == 2


def test_resuming_moves_a_damaged_checkpoint_aside_and_can_save_its_step_again(tmp_path):
  save(tmp_path, 1, 2)
  for file in all_files(tmp_path, 2):
    truncate(file)
  checkpoints = Checkpoints(tmp_path, 2)
  assert checkpoints.restore_state(TEMPLATE).step == 1
  assert (tmp_path / "damaged_checkpoints" / "2").is_dir()
  checkpoints.save(make_state(2), CONFIG)
  checkpoints.wait()
  assert_equal(Checkpoints(tmp_path, 2).restore_state(TEMPLATE), make_state(2))


def test_nothing_intact_is_an_error_and_deletes_nothing(tmp_path):
  save(tmp_path, 1, 2)
  for step in (1, 2):
    for file in all_files(tmp_path, step):
      truncate(file)
  with pytest.raises(UserError, match="none of the checkpoints"):
    Checkpoints(tmp_path).restore_params(TEMPLATE.params, ["ema"])
  with pytest.raises(UserError, match="none of the checkpoints"):
    Checkpoints(tmp_path, 2).restore_state(TEMPLATE)
  assert Checkpoints(tmp_path).steps()


def test_a_checkpoint_of_another_model_is_not_called_damaged(tmp_path):
  save(tmp_path, 1, 2)
  wider = {"a": {"down": jax.ShapeDtypeStruct((40, 9), np.float32)}}
  message = r"2 is of another model: params\['a'\]\['bias'\] is float32\[30\] there and missing"
  with pytest.raises(UserError, match=message):
    Checkpoints(tmp_path).restore_params(wider, ["raw"])
  with pytest.raises(UserError, match="is of another model"):
    Checkpoints(tmp_path, 2).restore_state(TEMPLATE.replace(params=wider))
  assert Checkpoints(tmp_path).steps() == [2, 1]


@pytest.mark.parametrize("error", [MemoryError(), PermissionError(errno.EACCES, "denied", "x")])
def test_a_lack_of_the_machine_s_is_no_damage(tmp_path, monkeypatch, error):
  save(tmp_path, 1, 2)
  opened = Checkpoints(tmp_path, 2)
  monkeypatch.setattr(opened._manager, "restore", mock.Mock(side_effect=error))
  with pytest.raises(type(error)):
    opened.restore_state(TEMPLATE)
  assert opened.steps() == [2, 1]


def test_an_error_without_words_is_damage_all_the_same(tmp_path, monkeypatch):
  save(tmp_path, 1)
  opened = Checkpoints(tmp_path)
  monkeypatch.setattr(opened._manager, "restore", mock.Mock(side_effect=RuntimeError()))
  with pytest.raises(UserError, match="none of the checkpoints"):
    opened.restore_params(TEMPLATE.params, ["ema"])


@pytest.mark.parametrize("name", ["7", "7.orbax-checkpoint-tmp"])
def test_an_empty_or_unfinished_directory_is_no_checkpoint(tmp_path, name):
  save(tmp_path, 5)
  (tmp_path / "checkpoints" / name).mkdir()
  assert_equal(Checkpoints(tmp_path, 2).restore_state(TEMPLATE), make_state(5))
