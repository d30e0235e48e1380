"""A sample of the fuzzer's inputs, its judge, and what it found, as small cases."""

import json
import pathlib
import re
import socket
import zipfile

import numpy as np
import pytest

from lrdit.analysis.unit_cache import UnitCache
from lrdit.config import run_config
from lrdit.data import tfds
from lrdit.model import tensor_files
from lrdit.report.runs import read_run
from lrdit.runtime import store
from lrdit.runtime.errors import UserError
from lrdit.runtime.text import LONGEST, one_line
from tests import tiny, workdirs
from tests.fuzz import data_targets, run_targets
from tests.fuzz.case import Case
from tests.fuzz.judge import judge
from tests.image_files import make_options

TARGETS = data_targets.TARGETS | run_targets.TARGETS
INPUTS = 20
# Of those that take longer than a few milliseconds; the command runs more of them.
FEW = {"checkpoint": 3, "vae": 3, "report": 6, "truncation": 8}
MARKS = dict.fromkeys(("analysis", "page", "tfrecord"), pytest.mark.slow)


@pytest.mark.parametrize("name", [pytest.param(n, marks=MARKS.get(n, ())) for n in TARGETS])
def test_a_damaged_file_is_read_or_refused_in_one_line(name, tmp_path):
  target = TARGETS[name]
  pytest.importorskip(target.needs)
  case = Case(name, target, tmp_path)
  for number in range(FEW.get(name, INPUTS)):
    verdict = case.run(case.changed(0, number))
    assert not verdict.fault, f"{name}, input {number}: {verdict.fault}\n{verdict.text}"


# The judge.


def spin(_):
  while True:
    pass


def connect(_):
  with socket.socket() as opened:
    opened.connect(("127.0.0.1", 9))


FAULTS = {
  "hangs": spin,
  "takes a gigabyte": lambda _: np.ones(1 << 28),
  "KeyError": lambda path: {}[path],
  "read /": lambda path: (path.parent / "outside").read_text(),
  "wrote /": lambda path: (path / ".." / "new").write_text(""),
  "wrote": lambda path: (path / "inside").rename(path.parent / "moved"),
  "unpickled": lambda path: np.load(path / "object.npy", allow_pickle=True),
  "socket.connect": connect,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_judge_sees(fault, tmp_path, monkeypatch):
  monkeypatch.setattr("tests.fuzz.judge.CPU_SECONDS", 0.2)
  directory = tmp_path / "files"
  directory.mkdir()
  (tmp_path / "outside").write_text("")
  (directory / "inside").write_text("")
  np.save(directory / "object.npy", np.array([pathlib.PurePath("x")], object), allow_pickle=True)
  assert fault in judge(FAULTS[fault], directory).fault
  assert not (tmp_path / "new").exists()
  assert not (tmp_path / "moved").exists()


def test_the_judge_lets_pass(tmp_path):
  def refuse(_):
    raise UserError("a cause: a fix")

  assert judge(refuse, tmp_path).text == "a cause: a fix"
  assert not judge(lambda path: (path / "x").write_text(""), tmp_path).refused


def test_an_input_is_the_same_whenever_it_is_made(tmp_path):
  cases = [Case("shards", TARGETS["shards"], tmp_path / str(i)) for i in range(2)]
  found = [[case.changed(3, number) for number in range(30)] for case in cases]
  assert found[0] == found[1]
  assert len({str(changed) for changed in found[0]}) > 25
  assert cases[0].changed(4, 0) != found[0][0]


# Found.


@pytest.mark.parametrize(
  "name", ["../m.safetensors", "/m.safetensors", "a/m.safetensors", "..", ""]
)
def test_an_index_that_names_a_file_elsewhere_is_refused(tmp_path, name):
  data_targets.make_shards(tmp_path)
  (tmp_path / "a").mkdir()
  for place in (tmp_path.parent, tmp_path / "a"):
    tensor_files.write_safetensors(place / "m.safetensors", {"c": np.zeros(2, np.float32)}, {})
  path = tmp_path / data_targets.INDEX
  workdirs.edit(path, lambda index: index["weight_map"].update(c=name))
  with pytest.raises(
    UserError, match=re.escape(f"names the file {name!r}, which is not beside it")
  ):
    tensor_files.read_shards(path)


def test_an_evaluation_that_names_samples_elsewhere_shows_none(tmp_path):
  workdirs.make_run(tmp_path / "run")
  workdirs.make_samples(tmp_path, "other")
  path = tmp_path / "run" / "evaluation.json"

  def climb(evaluation):
    evaluation["samples"]["../../samples/other"] = evaluation["samples"]["default"]

  workdirs.edit(path, climb)
  run = read_run(str(tmp_path / "run"))
  assert set(run.sample_sets) == {"default"}
  assert any("'../../samples/other', which no directory is named" in note for note in run.notes)


def test_a_prepared_dataset_whose_files_lie_elsewhere_is_refused(tmp_path):
  case = Case("tfrecord", TARGETS["tfrecord"], tmp_path)
  (path,) = case.directory.rglob("dataset_info.json")
  text = path.read_text()
  assert "{DATASET}-{SPLIT}" in text
  path.write_text(text.replace("{DATASET}-{SPLIT}", "../{DATASET}-{SPLIT}"))
  for file in path.parent.glob("*.tfrecord*"):
    file.rename(path.parents[1] / file.name)
  with pytest.raises(UserError, match=r"is not in .*3\.0\.2, as a split's files are"):
    tfds.load_tfds(tfds.DATASETS["cifar10"], "train", make_options(case.directory))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_LZMA])
def test_an_archive_that_asks_for_more_than_it_holds_is_refused(tmp_path, method):
  count = 5 << 20  # lzma makes a thousandth of a thousandth of zeros
  rows = count if method == zipfile.ZIP_LZMA else 0
  with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
    archive.writestr("image.npy", store.npy_header((count,), np.uint8) + bytes(rows))
  with pytest.raises(store.StoreError, match=r"image\.npy is larger than its file"):
    store.load_arrays(tmp_path / "a.npz", "")


def test_json_that_is_nested_too_deeply_is_damaged():
  assert store.parse_json('{"a": [[1]]}') == {"a": [[1]]}
  for depth in (200, 100_000):
    for text in ("[" * depth + "]" * depth, '{"a":' * depth + "0" + "}" * depth):
      with pytest.raises(ValueError, match="nested too deeply"):
        store.parse_json(text)


@pytest.mark.parametrize(
  "lines",
  [
    '{"step": Infinity, "field": "seed", "before": 0, "after": 1}',
    '{"step": 1, "field": ["seed"], "before": 0, "after": 1}',
    "[" * 2000,
  ],
)
def test_a_damaged_line_of_changes_harms_nobody(tmp_path, lines):
  (tmp_path / run_config.CHANGES).write_text(lines)
  assert all(isinstance(change.field, str) for change in run_config.read_changes(tmp_path))


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"model": "x"}, "it has no group model"),
    ({"a.b": 1}, "does not accept dots"),
    ({"rank": {"dense_layers": [{}]}}, r"dense_layers=.* must be"),
    ({"curriculum": {"boundaries": 3}}, r"boundaries=3 must be of type tuple"),
    ({"model": {"remat": "yes"}}, r"remat='yes' must be of type bool"),
    ({"analysis": {"ranks": 3}}, r"ranks=3 must be rising"),
  ],
)
def test_a_config_of_other_types_is_refused(tmp_path, change, words):
  stored = tiny.tiny_config().to_dict()
  for key, value in change.items():
    stored[key] = stored[key] | value if isinstance(value, dict) else value
  (tmp_path / "config.json").write_text(json.dumps(stored))
  with pytest.raises(UserError, match=words):
    run_targets.open_run(tmp_path)


def test_an_analysis_of_another_form_is_named(tmp_path):
  run_targets.read_analysis(tmp_path)
  workdirs.edit(tmp_path / "weights.json", lambda found: found.pop("kinds"))
  with pytest.raises(UserError, match=r"weights\.json is damaged .*delete it to make it again"):
    run_targets.read_analysis(tmp_path)


def test_a_message_is_one_line_that_a_terminal_can_show():
  assert one_line("a\n b\x1b[31m\ud800\0é") == "a b\\x1b[31m\\ud800\\x00é"
  long = one_line("cause " + "x" * 10**6 + " fix")
  assert len(long) < LONGEST + 10
  assert (long[:6], long[-4:]) == ("cause ", " fix")


# Nothing is unpickled.


class Bomb:
  """Runs code when it is unpickled."""

  def __reduce__(self):
    return pathlib.Path.touch, (pathlib.Path("exploded"),)


@pytest.mark.parametrize("name", ["npz", "latents", "features", "samples"])
def test_objects_in_arrays_are_refused(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  case, bomb = Case(name, TARGETS[name], tmp_path / "case"), np.array([Bomb()], object)
  arrays = [path for path in case.directory.iterdir() if path.suffix in (".npy", ".npz")]
  assert arrays
  for path in arrays:
    before = path.read_bytes()
    if path.suffix == ".npy":
      np.save(path, bomb, allow_pickle=True)
    else:
      with np.load(path) as file:
        names = file.files
      np.savez(path, **dict.fromkeys(names, bomb))
    with pytest.raises(UserError):
      TARGETS[name].read(case.directory)
    path.write_bytes(before)
  assert not (tmp_path / "exploded").exists()


def test_objects_in_a_unit_s_cache_are_made_again(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  cache = UnitCache(tmp_path / "parts", {})
  np.savez(tmp_path / "parts" / "a.npz", record=np.array([Bomb()], object))
  assert cache.load("a") is None
  assert not (tmp_path / "exploded").exists()
