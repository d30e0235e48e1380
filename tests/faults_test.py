"""Disks that fail at random moments, and files in which random bytes changed."""

import random

import numpy as np
import pytest

from lrdit.data import latents
from lrdit.runtime.errors import UserError, as_user_error
from tests.fuzz import data_targets, run_targets
from tests.kills import FullDisk, ReadOnlyDisk

MOMENTS = 20


def contents(directory):
  """The files' bytes, apart from those that tell times and numbers of starts."""
  paths = (path for path in directory.rglob("*") if path.is_file())
  return {path.name: path.read_bytes() for path in paths if path.name != "metadata.json"}


MAKERS = {"latents": data_targets.make_latents, "samples": run_targets.make_samples}


@pytest.mark.parametrize("disk", [FullDisk, ReadOnlyDisk])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_disk_that_fails_costs_one_line_and_nothing_else(tmp_path, record_property, kind, disk):
  """Once it is right again, the same command makes what it makes undisturbed."""
  make = MAKERS[kind]
  (tmp_path / "good").mkdir()
  make(tmp_path / "good")
  (tmp_path / "count").mkdir()
  with pytest.MonkeyPatch.context() as patch:
    counting = disk(patch, 10**6)
    make(tmp_path / "count")
  last, refused = 10**6 - counting.left, 0
  for number, moment in enumerate(random.Random(0).choices(range(last), k=MOMENTS)):
    directory = tmp_path / str(number)
    directory.mkdir()
    with pytest.MonkeyPatch.context() as patch:
      disk(patch, moment)
      try:
        make(directory)  # a lock may be left without a word
      except (UserError, OSError) as error:
        assert as_user_error(error) is not None
        refused += 1
    make(directory)
    assert contents(directory) == contents(tmp_path / "good")
  assert refused > MOMENTS // 2
  record_property("disks", MOMENTS)


def damage(path, rng):
  """Flip a bit or cut the file there, at a random byte."""
  data = bytearray(path.read_bytes())
  place = rng.randrange(len(data))
  data[place] ^= 1 << rng.randrange(8)
  path.write_bytes(data[:place] if rng.random() < 0.3 else data)


def damaged_copies(directory, count, tmp_path):
  """Yield the directory `count` times, each time with another file damaged."""
  rng = random.Random(1)
  files = {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
  sizes = [len(data) for data in files.values()]
  for _ in range(count):
    (path,) = rng.choices(list(files), sizes if rng.random() < 0.5 else None)
    if files[path]:
      damage(path, rng)
      yield path.name
      path.unlink()
      path.write_bytes(files[path])


def read_latents(directory):
  latents.verify(directory)
  found = []
  for split in latents.SPLITS:
    source = latents.open_latents(str(directory), split)
    rows = np.arange(len(source))
    found += [*source.gather(rows, rows % 2 == 0).values(), source.fingerprint, source.num_classes]
  return found


def test_latents_with_a_damaged_byte_are_refused_or_unchanged(tmp_path, record_property):
  data_targets.make_latents(tmp_path)
  expected, refused = read_latents(tmp_path), set()
  for name in damaged_copies(tmp_path, 100, tmp_path):
    try:
      found = read_latents(tmp_path)
    except UserError:
      refused.add(name)
    else:
      for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
  assert len(refused) == 5
  record_property("flips", 100)


@pytest.mark.parametrize("count", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_checkpoints_with_a_damaged_byte_are_refused_or_unchanged(tmp_path, record_property, count):
  run_targets.make_checkpoint(tmp_path)
  for _ in damaged_copies(tmp_path / "checkpoints", count, tmp_path):
    run_targets.read_checkpoint(tmp_path)  # one of two checkpoints is whole; what it reads is equal
  record_property("flips", count)
