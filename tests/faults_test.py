"""Disks that fail at random moments, and files in which random bytes changed."""

import random

import pytest

from lrdit.runtime.errors import UserError, as_user_error
from tests.endurance import flips
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


FLIPS = [
  ("latents", 100),
  ("checkpoints", 10),
  pytest.param("latents", 200, marks=pytest.mark.slow),
  pytest.param("checkpoints", 200, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "count"), FLIPS)
def test_files_with_a_damaged_byte_are_refused_or_unchanged(tmp_path, record_property, kind, count):
  refused = flips.flip(kind, tmp_path, count, seed=1)
  # Of latents, every kind of file; of two checkpoints, one is whole and is read.
  assert len(refused) == {"latents": 7, "checkpoints": 0}[kind]
  record_property("flips", count)
