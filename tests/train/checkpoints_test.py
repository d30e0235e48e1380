import copy
import errno
import os
import pathlib
import random
import shutil
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lrdit.rank.plan import dense_plan
from lrdit.runtime import parallel
from lrdit.runtime.errors import UserError
from lrdit.train import checkpoints as checkpoints_module
from lrdit.train import optimizer as optimizer_module
from lrdit.train.checkpoints import Checkpoints
from lrdit.train.muon import MuonOptions
from lrdit.train.state import create_train_state

CONFIG = {"seed": 0}


def make_state(step=0):
  """A small state of the real structure, different at every step."""
  fixed = dict(plan=dense_plan(10), muon=MuonOptions(()))
  optimizer = optimizer_module.make_optimizer("adamw", 0.0, 1.0, **fixed)
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


def test_saving_copies_no_array(tmp_path, monkeypatch):
  copied, deepcopy = [], copy.deepcopy

  def spy(value, *memo):
    copied.append(type(value))
    return deepcopy(value, *memo)

  monkeypatch.setattr(copy, "deepcopy", spy)
  before = ocp.type_handlers.get_type_handler(np.ndarray)
  save(tmp_path, 5)
  assert np.ndarray not in copied
  assert ocp.type_handlers.get_type_handler(np.ndarray) is before


def test_only_the_newest_are_kept(tmp_path):
  save(tmp_path, 1, 2, 3, 4, keep=2)
  assert Checkpoints(tmp_path, 2).steps() == [4, 3]


def test_multiples_of_keep_every_are_kept_and_any_step_can_be_read(tmp_path):
  checkpoints = Checkpoints(tmp_path, 1, keep_every=3)
  for step in (0, 1, 2, 3, 4, 5):
    checkpoints.save(make_state(step), CONFIG | {"at": step})
  checkpoints.wait()
  checkpoints.close()
  reader = Checkpoints(tmp_path)
  assert reader.steps() == [5, 3, 0]
  step, params = reader.restore_params(TEMPLATE.params, ["raw"], 3)
  assert step == 3
  assert_equal(params["raw"], make_state(3).params)
  assert reader.read_config(3) == CONFIG | {"at": 3}
  with pytest.raises(UserError, match=r"no checkpoint of step 4 .* the steps kept are 0, 3, 5"):
    reader.restore_params(TEMPLATE.params, ["raw"], 4)
  for file in all_files(tmp_path, "3/params"):
    truncate(file)
  with pytest.raises(UserError, match=r"checkpoint .*/3 is damaged .*use another step"):
    reader.restore_params(TEMPLATE.params, ["raw"], 3)


def test_raw_and_averaged_weights_are_told_apart(tmp_path):
  save(tmp_path, 5)
  state = make_state(5)
  expected = {"ema": state.ema_params, "raw": state.params}
  for weights in (["ema"], ["raw"], ["raw", "ema"]):
    step, params = Checkpoints(tmp_path).restore_params(TEMPLATE.params, weights)
    assert step == 5
    assert_equal(params, {name: expected[name] for name in weights})


def test_raw_and_averaged_weights_come_from_one_checkpoint(tmp_path, caplog, monkeypatch):
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


@pytest.mark.parametrize(
  "damage",
  [truncate, pytest.param(truncate_anywhere, marks=pytest.mark.slow), flip_a_byte, os.remove],
)
def test_damage_to_any_file_never_changes_what_is_restored(tmp_path, damage, caplog, monkeypatch):
  save(tmp_path / "whole", 1, 2)
  files = [f.relative_to(tmp_path / "whole") for f in all_files(tmp_path / "whole", 2)]
  fell_back = started_before = 0
  for i, file in enumerate(files):
    workdir = tmp_path / str(i)
    shutil.copytree(tmp_path / "whole", workdir)
    damage(workdir / file)
    step, config, params = Checkpoints(workdir).restore_run("raw")
    assert config == CONFIG
    assert_equal(params, make_state(step).params)
    started_before += step == 1
    caplog.clear()
    restored = Checkpoints(workdir, 2).restore_state(TEMPLATE)
    assert_equal(restored, make_state(int(restored.step)))
    if restored.step == 1:
      fell_back += 1
      assert caplog.text.count("is damaged") == 1
  # Some files say again what others say; those with the data must be noticed.
  assert fell_back >= 9, f"{fell_back} of {len(files)}"
  assert 4 <= started_before < fell_back


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


# Sweeps make such names. Each broke orbax, tensorstore or their globs, or might.
ODD_NAMES = (
  "a\\b",
  "lr=[0-9]",
  "**",
  "gs:",
  "s3:",
  "\udcff",
  "a\nb",
  "-x",
  " x ",
  "é日😀",
  "a%20b#c?d",
  "!\"$&'()*+,-.:;<=>@^_`{|}~",
)


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_any_name_can_be_read_back(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  for workdir in (tmp_path / name, pathlib.Path(name) / "run"):
    save(workdir, 4, 8, 12, keep=2)
    assert_equal(Checkpoints(workdir, 2).restore_state(TEMPLATE), make_state(12))
    assert Checkpoints(workdir).restore_params(TEMPLATE.params, ["ema"])[0] == 12
    assert sorted(os.listdir(workdir / "checkpoints")) == ["12", "8"]


def test_a_name_that_cannot_be_read_back_is_refused_at_the_start(tmp_path, monkeypatch):
  exists = pathlib.Path.exists
  monkeypatch.setattr(pathlib.Path, "exists", lambda p: str(p) != "/proc/self/fd" and exists(p))
  with pytest.raises(UserError, match="use another --workdir, of letters, digits and any of"):
    Checkpoints(tmp_path / "a[1]", 2)
  Checkpoints(tmp_path / "a1", 2)


def test_stray_things_beside_checkpoints_change_nothing(tmp_path):
  save(tmp_path, 4, 8)
  directory = tmp_path / "checkpoints"
  for name in ("best", "8_backup", "step_99", "0099", "-3", "1e3", "9.0", "1_0", "\uff19", " 9"):
    shutil.copytree(directory / "8", directory / name)
  for name in ("notes.txt", ".DS_Store", "999"):
    (directory / name).write_text("x")
  (directory / "latest").symlink_to("8")
  (directory / "99").symlink_to("nowhere")
  checkpoints = Checkpoints(tmp_path, 2)
  assert_equal(checkpoints.restore_state(TEMPLATE), make_state(8))
  checkpoints.save(make_state(12), CONFIG)
  checkpoints.close()
  assert_equal(Checkpoints(tmp_path, 2).restore_state(TEMPLATE), make_state(12))
  assert Checkpoints(tmp_path).restore_params(TEMPLATE.params, ["raw"])[0] == 12


@pytest.mark.parametrize("put", [os.rename, shutil.copytree, os.symlink])
def test_a_directory_of_another_step_is_not_taken_for_its_name(tmp_path, put, told):
  save(tmp_path, 4, 8)
  directory = tmp_path / "checkpoints"
  put(directory / "8", directory / "999")
  newest = 4 if put is os.rename else 8
  assert Checkpoints(tmp_path).restore_params(TEMPLATE.params, ["raw"])[0] == newest
  checkpoints = Checkpoints(tmp_path, 2)
  assert_equal(checkpoints.restore_state(TEMPLATE), make_state(newest))
  assert "999 is damaged (it holds step 8: give the directory that name to use it)" in told.text
  checkpoints.save(make_state(12), CONFIG)
  checkpoints.close()
  assert_equal(Checkpoints(tmp_path, 2).restore_state(TEMPLATE), make_state(12))


def test_what_is_not_saved_is_an_error(tmp_path):
  save(tmp_path, 999)
  checkpoints = Checkpoints(tmp_path, 2)
  with pytest.raises(UserError, match=r"step 8 was not saved, as .*/999 was put there"):
    checkpoints.save(make_state(8), CONFIG)
  shutil.rmtree(tmp_path / "checkpoints" / "999")
  checkpoints = Checkpoints(tmp_path, 2)
  for _ in range(2):  # a run that is stopped at a step that was just saved
    checkpoints.save(make_state(8), CONFIG)
  checkpoints.close()
  assert Checkpoints(tmp_path).steps() == [8]


def test_a_damaged_manifest_is_damage_and_no_other_model(tmp_path, told):
  save(tmp_path / "whole", 1, 2)
  manifest = pathlib.Path("checkpoints", "2", "manifest", "metadata")
  text = (tmp_path / "whole" / manifest).read_text()
  for number, word in enumerate(('"params"', '"ema_params"', "layout", "contents", "crc32", "'a'")):
    assert word in text
    workdir = tmp_path / str(number)
    shutil.copytree(tmp_path / "whole", workdir)
    letter = next(c for c in word if c.isalnum())
    damaged = text.replace(word, word.replace(letter, chr(ord(letter) ^ 1), 1))
    (workdir / manifest).write_text(damaged)
    told.clear()
    assert Checkpoints(workdir).restore_params(TEMPLATE.params, ["raw"])[0] == 1
    assert_equal(Checkpoints(workdir, 2).restore_state(TEMPLATE), make_state(1))
    assert told.text.count("2 is damaged (its manifest changed)") == 2


def save_with_progress(workdir, monkeypatch, change):
  """A checkpoint of step 5, written by a version with other fields beside the model."""
  with monkeypatch.context() as patched:
    items_of = checkpoints_module._items

    def changed(state):
      items = items_of(state)
      change(items["progress"])
      return items

    patched.setattr(checkpoints_module, "_items", changed)
    save(workdir, 5)


def test_fields_that_accompany_a_run_may_come_and_go(tmp_path, monkeypatch, told):
  def change(fields):
    del fields["window"]["grad_norm"], fields["stage"]["best_loss"]
    fields["window"]["group_loss"] = np.zeros(7, np.float32)  # there are 3 groups
    fields["window"]["newer"] = np.ones((2, 3), np.float32)
    fields["newest"] = {"x": np.int32(1)}

  save_with_progress(tmp_path, monkeypatch, change)
  fresh = make_state(0)
  fresh = fresh.replace(stage=fresh.stage.replace(best_loss=np.float32(np.inf)))
  state, saved = Checkpoints(tmp_path, 2).restore_state(fresh), make_state(5)
  # All sums of a part begin together, as a mean over other steps than its sum's would be wrong.
  position = dict(number=saved.stage.number, first_step=saved.stage.first_step)
  assert_equal(state, saved.replace(window=fresh.window, stage=fresh.stage.replace(**position)))
  assert [told.text.count(f": the {part} begins anew") for part in ("window", "stage")] == [2, 1]
  assert told.text.count(": it is left out") == 2
  assert "progress['window']['grad_norm'] is missing there and float32[] here" in told.text


def test_surplus_fields_leave_the_others_as_they_were(tmp_path, monkeypatch):
  newer = {"newer": np.ones((2, 3), np.float32)}
  save_with_progress(tmp_path, monkeypatch, lambda fields: fields["window"].update(newer))
  assert_equal(Checkpoints(tmp_path, 2).restore_state(make_state(0)), make_state(5))


@pytest.mark.parametrize("lost", [("stage", "number"), ("stage", "first_step"), ("step",)])
def test_a_run_that_does_not_know_where_it_stands_is_refused(tmp_path, monkeypatch, lost):
  def change(fields):
    for name in lost[:-1]:
      fields = fields[name]
    del fields[lost[-1]]

  save_with_progress(tmp_path, monkeypatch, change)
  with pytest.raises(UserError, match="is of another model: progress"):
    Checkpoints(tmp_path, 2).restore_state(TEMPLATE)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_checkpoint_that_is_removed_before_it_is_read_is_not_missed(tmp_path, told, keep):
  writer = Checkpoints(tmp_path, keep)
  writer.save(make_state(1), CONFIG)
  writer.wait()
  reader = Checkpoints(tmp_path)
  read, later = reader._read, [2, 3]

  def while_training(step, **items):
    while later:  # the listing was made before
      writer.save(make_state(later.pop(0)), CONFIG)
      writer.wait()
    return read(step, **items)

  reader._read = while_training
  step, params = reader.restore_params(TEMPLATE.params, ["ema"])
  assert step == 3
  assert_equal(params["ema"], make_state(3).ema_params)
  assert "damaged" not in told.text


def test_a_damaged_checkpoint_on_another_disk_stays_on_it(tmp_path, monkeypatch, told):
  disk = tmp_path / "disk"
  disk.mkdir()
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "checkpoints").symlink_to(disk)
  save(tmp_path / "run", 1, 2)
  for file in all_files(tmp_path / "run", 2):
    truncate(file)
  replace = os.replace

  def replace_on_a_disk(source, target):
    if pathlib.Path(source).parent.resolve() != pathlib.Path(target).parent.resolve():
      raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    replace(source, target)

  monkeypatch.setattr(os, "replace", replace_on_a_disk)
  checkpoints = Checkpoints(tmp_path / "run", 2)
  assert_equal(checkpoints.restore_state(TEMPLATE), make_state(1))
  assert (disk / "damaged_2").is_dir()
  assert "the damaged checkpoint is kept as" in told.text
  checkpoints.save(make_state(2), CONFIG)
  checkpoints.close()
  assert_equal(Checkpoints(tmp_path / "run", 2).restore_state(TEMPLATE), make_state(2))


@pytest.mark.parametrize("damage", ["", '{"seed": 1}', '{"seed": 0, "more": 1}', '"seed"'])
def test_a_damaged_config_is_damage(tmp_path, told, damage):
  save(tmp_path, 1, 2)
  (tmp_path / "checkpoints" / "2" / "config" / "metadata").write_text(damage)
  reader = Checkpoints(tmp_path)
  assert reader.restore_run("ema")[:2] == (1, CONFIG)
  assert reader.restore_params(TEMPLATE.params, ["raw"])[0] == 1
  with pytest.raises(UserError, match=r"checkpoint .*/2 is damaged .*use another step"):
    reader.read_config(2)
  assert_equal(Checkpoints(tmp_path, 2).restore_state(TEMPLATE), make_state(1))
  assert told.text.count("2 is damaged") == 3
