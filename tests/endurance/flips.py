"""Checkpoints and latents in which a random bit was flipped, or which were cut there."""

import collections
import pathlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lrdit.data import latents
from lrdit.runtime.errors import UserError
from tests.fuzz import data_targets, run_targets

CUT = 0.3  # share of the damages that cut the file


def damage(path: pathlib.Path, rng: random.Random) -> None:
  """Flip a bit or cut the file there, at a random byte."""
  data = bytearray(path.read_bytes())
  place = rng.randrange(len(data))
  data[place] ^= 1 << rng.randrange(8)
  path.write_bytes(data[:place] if rng.random() < CUT else data)


def damaged_copies(directory: pathlib.Path, count: int, rng: random.Random) -> Iterator[str]:
  """Yield the name of a damaged file `count` times; each is whole again afterwards.

  Half of the files are drawn by their size.
  """
  files = {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
  files = {path: data for path, data in files.items() if data}
  sizes = [len(data) for data in files.values()]
  for _ in range(count):
    (path,) = rng.choices(list(files), sizes if rng.random() < 0.5 else None)
    damage(path, rng)
    yield path.name
    path.unlink()
    path.write_bytes(files[path])


def read_rows(directory: pathlib.Path) -> list[Any]:
  """Return all that training reads of latents."""
  found: list[Any] = []
  for split in latents.SPLITS:
    source = latents.open_latents(str(directory), split)
    rows = np.arange(len(source))
    for flip in (rows % 2 == 0, rows % 2 == 1):
      found += source.gather(rows, flip).values()
    found += [source.fingerprint, source.num_classes]
  return found


def read_checkpoint(directory: pathlib.Path) -> list[Any]:
  """Return nothing: what is read is compared with what was saved."""
  run_targets.read_checkpoint(directory)
  return []


KINDS: dict[str, tuple[Callable, Callable, str]] = {
  "latents": (data_targets.make_latents, read_rows, "."),
  "checkpoints": (run_targets.make_checkpoint, read_checkpoint, "checkpoints"),
}


def flip(kind: str, directory: pathlib.Path, count: int, seed: int) -> dict[str, int]:
  """Damage a file `count` times; return how often each was refused.

  Raises:
    AssertionError: something else was read than was written.
  """
  make, read, place = KINDS[kind]
  make(directory)
  expected, refused = read(directory), collections.Counter()
  for name in damaged_copies(directory / place, count, random.Random(seed)):
    try:
      found = read(directory)
    except UserError:
      refused[name] += 1
    else:
      for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=f"{kind}: {name}")
  return dict(refused)


def flips(output: pathlib.Path, count: int, seed: int) -> int:
  """Damage files of every kind `count` times; return the number of kinds with a finding."""
  found = 0
  for kind in KINDS:
    directory = output / kind
    directory.mkdir()
    try:
      refused = flip(kind, directory, count, seed)
    except AssertionError as error:
      print(f"{kind}: {error}", flush=True)
      found += 1
      continue
    read = count - sum(refused.values())
    print(f"{kind}: {count} damaged, {sum(refused.values())} refused, {read} read as written")
  return found
