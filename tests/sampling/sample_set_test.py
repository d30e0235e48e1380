"""A sample set on disk, with random numbers as samples."""

import json
import os
import resource
import shutil
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from lrdit.runtime import store
from lrdit.runtime.errors import UserError
from lrdit.sampling import sample_set
from tests.kills import Killed, KilledProcess

SETTINGS = {"seed": 0, "rank_table": {"blocks_0/qkv": [2, 4]}, "checkpoint_digest": "ab"}
SOFTWARE = {"jax": "1"}
BATCH = 4


def label_rule(index):
  return (index % 3).astype(np.int32)


def sample(index, size, seed):
  """Return (B, size, size, 1) uint8 samples that depend on the index alone."""
  images = [np.random.default_rng((seed, i)).integers(0, 256, (size, size, 1)) for i in index]
  return np.array(images, np.uint8)


def write(
  directory,
  count=10,
  settings=SETTINGS,
  software=SOFTWARE,
  png=True,
  batch=BATCH,
  rule=label_rule,
  size=4,
):
  """Write a set as `--mode=sample` does, and return the indices that were sampled."""
  sampled = []
  with sample_set.SampleSetWriter(directory, settings, software, count, size, batch, png) as writer:
    if not writer.is_finished:
      for first in range(writer.num_done, count, batch):
        index = range(first, min(first + batch, count))
        writer.append(sample(index, size, settings["seed"]))
        sampled += index
      writer.finish(rule, {"num_devices": 1})
  return sampled


def contents(directory):
  """Return the files' bytes, the parsed metadata, and the metadata that depend on restarts."""
  files = {
    str(path.relative_to(directory)): path.read_bytes()
    for path in directory.rglob("*")
    if path.is_file()
  }
  metadata = json.loads(files.pop("metadata.json"))
  history = [metadata.pop(name) for name in ("num_drawn", "wall_clock_seconds", "num_starts")]
  return files, metadata, history


def assert_same_set(directory, reference):
  (got, metadata, _), (expected, expected_metadata, _) = contents(directory), contents(reference)
  assert got.keys() == expected.keys()
  assert [name for name in expected if got[name] != expected[name]] == []
  assert metadata == expected_metadata


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  directory = tmp_path_factory.mktemp("undisturbed") / "export"
  assert write(directory) == list(range(10))
  return directory


def read_all(directory, batch_size=3):
  metadata, batches = sample_set.read_sample_set(directory, batch_size)
  samples, labels = zip(*batches, strict=True)
  return metadata, samples, labels


@pytest.mark.parametrize(
  ("num_saturated", "share", "warns"), [(8, 0.5, False), (9, 0.5625, True), (0, 0.0, False)]
)
def test_saturated_pixels_are_logged(tmp_path, told, num_saturated, share, warns):
  samples = np.full(16, 128, np.uint8)
  samples[:num_saturated] = [0, 255] * (num_saturated // 2) + [0] * (num_saturated % 2)
  samples = samples.reshape(4, 2, 2, 1)
  with sample_set.SampleSetWriter(tmp_path, SETTINGS, SOFTWARE, 4, 2, 1, False) as writer:
    writer.append(samples[:3])
  # After a restart all images count, whichever process sampled them.
  with sample_set.SampleSetWriter(tmp_path, SETTINGS, SOFTWARE, 4, 2, 1, False) as writer:
    writer.append(samples[writer.num_done :])
    metadata = writer.finish(None, {})
  assert (metadata["saturated_share"], metadata["is_mostly_saturated"]) == (share, warns)
  assert any("% of all pixel values are 0 or 255" in line for line in told.messages) == warns


def test_the_files_are_plain_npz_and_png(undisturbed):
  expected = np.repeat(sample(range(10), 4, seed=0), 3, axis=-1)
  with np.load(undisturbed / "samples.npz") as arrays:
    assert list(arrays) == ["arr_0", "arr_1"]
    np.testing.assert_array_equal(arrays["arr_0"], expected)
    assert (arrays["arr_0"].dtype, arrays["arr_1"].dtype) == (np.uint8, np.int64)
    assert arrays["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
  with zipfile.ZipFile(undisturbed / "samples.npz") as archive:
    assert archive.testzip() is None
    assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
  names = ["grid.png", "metadata.json", "png", "samples.npz"]
  assert sorted(p.name for p in undisturbed.iterdir()) == names
  assert len(list((undisturbed / "png").iterdir())) == 10
  for i, image in enumerate(expected):
    with Image.open(undisturbed / "png" / f"{i:06d}.png") as png:
      np.testing.assert_array_equal(png, image)
  metadata = json.loads((undisturbed / "metadata.json").read_text())
  assert metadata.items() >= (SETTINGS | SOFTWARE | {"num_samples": 10, "num_starts": 1}).items()


def test_it_is_read_back_in_batches(undisturbed):
  metadata, samples, labels = read_all(undisturbed)
  assert metadata["num_samples"] == 10
  assert [len(batch) for batch in samples] == [len(batch) for batch in labels] == [3, 3, 3, 1]
  with np.load(undisturbed / "samples.npz") as arrays:
    np.testing.assert_array_equal(np.concatenate(samples), arrays["arr_0"])
    np.testing.assert_array_equal(np.concatenate(labels), arrays["arr_1"])


def test_without_classes_there_are_no_labels(tmp_path):
  write(tmp_path, rule=None)
  with np.load(tmp_path / "samples.npz") as arrays:
    assert list(arrays) == ["arr_0"]
  assert read_all(tmp_path)[2] == (None,) * 4


# id: (the set there before, number of its images that are kept, least number of disk changes).
BEFORE = {
  "nothing": (None, 0, 40),
  "fewer": (dict(count=6), 4, 30),
  "more": (dict(count=14), 10, 15),
  "others": (dict(settings=SETTINGS | {"seed": 1}), 0, 40),
  "no PNG files": (dict(png=False), 10, 10),
}


@pytest.mark.parametrize(("before", "kept", "least"), BEFORE.values(), ids=BEFORE.keys())
def test_a_kill_at_any_moment_changes_nothing(
  undisturbed, tmp_path, monkeypatch, told, before, kept, least
):
  if before:
    write(tmp_path / "before", **before)
  moment, killed = 0, True
  while killed:
    directory = tmp_path / f"killed{moment}"
    if before:
      shutil.copytree(tmp_path / "before", directory)
    with monkeypatch.context() as patch:
      KilledProcess(patch, moment)
      try:
        write(directory)
        killed = False
      except Killed:
        pass
    if (directory / "metadata.json").exists():  # a set with metadata is complete
      metadata, samples, _ = read_all(directory)
      assert sum(map(len, samples)) == metadata["num_samples"]
    elif (directory / "samples.part").exists():
      with pytest.raises(UserError, match=r"--mode=sample (again to go on|first)"):
        sample_set.read_sample_set(directory, 4)
    assert min(write(directory), default=10) >= kept, "kept images are sampled again"
    assert_same_set(directory, undisturbed)
    assert not write(directory), "a finished set is sampled again"
    shutil.rmtree(directory)
    moment += 1
  assert moment > least
  if before != BEFORE["others"][0]:
    assert not [line for line in told.messages if "starting over" in line]


def test_the_grid_of_a_large_set_is_there_before_its_end(undisturbed, tmp_path, monkeypatch):
  monkeypatch.setattr(sample_set, "GRID_SIZE", 6)
  for kept, is_there in ((4, False), (8, True)):
    stop_after(monkeypatch, tmp_path, kept)
    assert (tmp_path / "grid.png").exists() == is_there
  early = (tmp_path / "grid.png").read_bytes()
  write(tmp_path)
  assert (tmp_path / "grid.png").read_bytes() == early != (undisturbed / "grid.png").read_bytes()


@pytest.mark.parametrize("kept", [0, 4, 8])
def test_only_missing_images_are_sampled(undisturbed, tmp_path, monkeypatch, kept):
  stop_after(monkeypatch, tmp_path, kept)
  with (tmp_path / "samples.part").open("ab") as file:
    file.write(b"a write that tore")
  assert write(tmp_path) == list(range(kept, 10))
  assert_same_set(tmp_path, undisturbed)
  metadata = json.loads((tmp_path / "metadata.json").read_text())
  assert (metadata["num_starts"], metadata["num_drawn"]) == (2, 10)


def stop_after(monkeypatch, directory, kept, **arguments):
  """Write a set until it is killed when `kept` images are on the disk."""
  append = sample_set.SampleSetWriter.append

  def dying(writer, samples):
    if writer.num_done >= kept:
      raise Killed
    append(writer, samples)

  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(sample_set.SampleSetWriter, "append", dying)
    write(directory, **arguments)


def test_wall_clock_seconds_add_up_over_restarts(tmp_path, monkeypatch):
  clock = iter(np.arange(0.0, 1000.0, 10.0))
  monkeypatch.setattr(sample_set.time, "perf_counter", lambda: float(next(clock)))
  stop_after(monkeypatch, tmp_path, 8)
  write(tmp_path)
  metadata = json.loads((tmp_path / "metadata.json").read_text())
  assert metadata["wall_clock_seconds"] == 30.0  # three batches; time lost by a kill does not count


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
  "changed",
  [
    dict(settings=SETTINGS | {"seed": 1}),
    dict(settings=SETTINGS | {"rank_table": {"blocks_0/qkv": [2, 3]}}),
    dict(settings=SETTINGS | {"checkpoint_digest": "cd"}),
    dict(size=2),
  ],
  ids=["seed", "rank", "checkpoint", "size"],
)
def test_changed_settings_start_over(tmp_path, monkeypatch, told, changed, finished):
  write(tmp_path / "reference", **changed)
  if finished:
    write(tmp_path / "export")
  else:
    stop_after(monkeypatch, tmp_path / "export", 4)
  assert write(tmp_path / "export", **changed) == list(range(10))
  assert len([line for line in told.messages if "starting over" in line]) == 1
  assert_same_set(tmp_path / "export", tmp_path / "reference")
  assert contents(tmp_path / "export")[2][0] == 10


def test_a_set_of_an_unknown_checkpoint_starts_over(undisturbed, tmp_path, told):
  write(tmp_path, settings={k: v for k, v in SETTINGS.items() if k != "checkpoint_digest"})
  assert write(tmp_path) == list(range(10))
  assert "checkpoint_digest (None there, 'ab' asked for)" in told.messages[-1]
  assert_same_set(tmp_path, undisturbed)


def test_other_software_restarts_an_unfinished_set_and_keeps_a_finished_one(
  tmp_path, monkeypatch, told
):
  stop_after(monkeypatch, tmp_path, 4)
  assert write(tmp_path, software={"jax": "2"}) == list(range(10))
  assert "holds other samples: jax ('1' there, '2' asked for)" in told.messages[-1]
  assert not write(tmp_path)
  assert not write(tmp_path, 7)
  assert json.loads((tmp_path / "metadata.json").read_text())["jax"] == "2"


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(("count", "sampled"), [(15, range(8, 15)), (5, ()), (8, ())])
def test_another_number_extends_or_cuts_the_set(tmp_path, monkeypatch, count, sampled, finished):
  if finished:
    write(tmp_path / "export")
  else:
    stop_after(monkeypatch, tmp_path / "export", 8, count=9)
  assert write(tmp_path / "export", count) == list(sampled)
  write(tmp_path / "reference", count)
  assert_same_set(tmp_path / "export", tmp_path / "reference")


def test_another_batch_size_resumes_at_a_multiple_of_it(undisturbed, tmp_path, monkeypatch):
  stop_after(monkeypatch, tmp_path, 8)
  assert write(tmp_path, batch=5) == list(range(5, 10))
  assert_same_set(tmp_path, undisturbed)


def test_a_finished_set_is_left_alone(tmp_path):
  write(tmp_path)
  before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
  assert not write(tmp_path)
  assert not write(tmp_path, png=False)
  assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_png_files_are_added_for_all_images_or_none(undisturbed, tmp_path, monkeypatch):
  write(tmp_path / "a", png=False)
  assert not (tmp_path / "a" / "png").exists()
  assert not write(tmp_path / "a")
  assert_same_set(tmp_path / "a", undisturbed)
  stop_after(monkeypatch, tmp_path / "b", 4, png=False)
  assert write(tmp_path / "b") == list(range(4, 10))
  assert_same_set(tmp_path / "b", undisturbed)
  stop_after(monkeypatch, tmp_path / "c", 4)
  write(tmp_path / "c", png=False)
  assert not (tmp_path / "c" / "png").exists()


def damage(path, position):
  data = bytearray(path.read_bytes())
  data[int(position * len(data))] ^= 0x10
  path.write_bytes(data)


def test_a_changed_byte_is_noticed_or_harmless(undisturbed, tmp_path):
  """Some bytes of an archive carry no data; a change to any other is noticed."""
  directory = tmp_path / "export"
  shutil.copytree(undisturbed, directory)
  npz, noticed = directory / "samples.npz", 0
  data, expected = npz.read_bytes(), read_all(directory)
  for position in range(len(data)):
    changed = bytearray(data)
    changed[position] ^= 1 << position % 8
    npz.write_bytes(changed)
    try:
      got = read_all(directory)
    except UserError as error:
      noticed += "is damaged" in str(error)
      continue
    np.testing.assert_equal(got, expected)
  assert noticed > 0.8 * len(data)


@pytest.mark.parametrize("position", [0.3, 0.6, "half", "empty", "none"])
def test_damage_is_found_and_fixed(undisturbed, tmp_path, told, position):
  directory = tmp_path / "export"
  shutil.copytree(undisturbed, directory)
  npz = directory / "samples.npz"
  if position == "none":
    npz.unlink()
  elif isinstance(position, str):
    os.truncate(npz, {"half": npz.stat().st_size // 2, "empty": 0}[position])
  else:
    damage(npz, position)
  with pytest.raises(UserError, match=r"is (damaged|missing).*: run the same command"):
    read_all(directory)
  assert write(directory) == list(range(10))
  assert "starting over" in told.messages[-1]
  assert_same_set(directory, undisturbed)


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"num_samples": "10"}'])
def test_damaged_metadata_is_refused_and_fixed(undisturbed, tmp_path, text):
  directory = tmp_path / "export"
  shutil.copytree(undisturbed, directory)
  (directory / "metadata.json").write_text(text)
  with pytest.raises(UserError, match=r"metadata\.json is damaged"):
    sample_set.read_sample_set(directory, 4)
  write(directory)
  assert_same_set(directory, undisturbed)


@pytest.mark.parametrize("name", ["samples.part", "progress.json"])
@pytest.mark.parametrize("how", ["changed", "shorter", "missing"])
def test_a_damaged_unfinished_set_starts_over(undisturbed, tmp_path, monkeypatch, name, how):
  stop_after(monkeypatch, tmp_path, 8)
  path = tmp_path / name
  if how == "missing":
    path.unlink()
  elif how == "shorter":
    os.truncate(path, path.stat().st_size - 5)
  elif name == "samples.part":
    damage(path, 0.5)
  else:
    path.write_text(path.read_text().replace('"num_done": 8', '"num_done": null'))
  assert write(tmp_path) == list(range(10))
  assert_same_set(tmp_path, undisturbed)


def test_a_missing_set_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"no samples under .* --mode=sample first"):
    sample_set.read_sample_set(tmp_path / "none", 4)


@pytest.mark.parametrize(
  ("file", "kept"),
  [("progress.json", 0), ("samples.part", 8), ("samples.npz", 10), ("grid.png", 10)],
)
def test_a_full_disk_raises_one_line_and_keeps_finished_images(undisturbed, tmp_path, file, kept):
  """A limit on file size stops writes half-way, like a full disk."""
  sizes = {path.name: path.stat().st_size for path in undisturbed.iterdir()}
  sizes |= {"progress.json": 100, "samples.part": 10 * 4 * 4 * 3}
  limit = sizes[file] - 1
  _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    with pytest.raises(UserError, match="File too large: make space or make it writable") as error:
      write(tmp_path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
  assert "\n" not in str(error.value)
  assert not (tmp_path / "metadata.json").exists()
  assert write(tmp_path) == list(range(kept, 10))
  assert_same_set(tmp_path, undisturbed)


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path, monkeypatch):
  """Writing, resuming, finishing and reading hold at most one chunk."""
  monkeypatch.setattr(store, "CHUNK_BYTES", 1 << 16)
  monkeypatch.setattr(sample_set, "LABEL_CHUNK", 1 << 8)
  batch = np.random.default_rng(0).integers(0, 256, (250, 8, 8, 3), np.uint8)

  def peak(name, count):
    tracemalloc.start()
    for stop in (count // 2, count):
      with sample_set.SampleSetWriter(tmp_path / name, {}, {}, count, 8, 250, False) as writer:
        while writer.num_done < stop:
          writer.append(batch)
        if stop == count:
          writer.finish(label_rule, {})
    read = sum(len(samples) for samples, _ in sample_set.read_sample_set(tmp_path / name, 250)[1])
    assert read == count
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak

  peak("warm", 500)
  small, large = peak("small", 1000), peak("large", 20_000)
  # The images take 3.8 MB, and each of their 59 chunks has a line of metadata.
  assert large < small + 100_000
