"""A sample set on disk, which is kept as it grows and read back by batches.

samples.npz: arr_0 (N, H, W, 3) uint8 in index order; arr_1 (N,) int64, for a model with classes.
It is stored without compression, as numpy and the ADM evaluator read it.
png/000000.png and so on, if requested. grid.png: the first images.
metadata.json: settings and statistics. It is written last: a set without it is unfinished.

An unfinished set has samples.part, its rows without a header, and progress.json: how many rows
are safely on disk, their checksum, and the settings that they were sampled with.

Axes: N images, B images of a batch, H W image, C channels.
"""

import contextlib
import dataclasses
import logging
import math
import pathlib
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from lrdit.data import images
from lrdit.runtime import store
from lrdit.runtime.errors import UserError
from lrdit.runtime.locks import owned
from lrdit.runtime.npz_stream import read_npz, write_member

log = logging.getLogger("lrdit")

GRID_SIZE = 100
GRID_COLUMNS = 10
LABEL_CHUNK = 1 << 16  # number of labels computed at once
MAX_SATURATED_SHARE = 0.5  # share of pixel values at 0 or 255 above which a warning is logged
AGAIN = "run the same command with --mode=sample again"

LabelRule = Callable[[np.ndarray], np.ndarray]  # from sample indices to labels
# A batch is images and labels, or None without classes.
Batches = Iterator[tuple[UInt8[np.ndarray, "B H W 3"], Int[np.ndarray, " B"] | None]]


@dataclasses.dataclass(frozen=True)
class Progress:
  """The state of a sample set.

  Attributes:
    num_done: images safely on disk.
    crc32: of their bytes.
    num_drawn: images sampled by all starts together, some of them perhaps twice.
    wall_clock_seconds: time that sampling and writing those took.
    num_starts: number of processes that worked on it.
  """

  num_done: int = 0
  crc32: int = 0
  num_drawn: int = 0
  wall_clock_seconds: float = 0.0
  num_starts: int = 0

  @classmethod
  def from_record(cls, record: dict[str, Any], path: pathlib.Path) -> "Progress":
    """Take the fields from a record, or raise a StoreError if one is missing or not a number."""
    fields = dataclasses.fields(cls)
    if not all(isinstance(record.get(f.name), f.type) for f in fields):
      raise store.StoreError(f"{path} is damaged", AGAIN)
    return cls(**{f.name: record[f.name] for f in fields})


def _read_metadata(directory: pathlib.Path) -> dict[str, Any]:
  """Return metadata.json, with the fields that describe samples.npz checked."""
  path = directory / "metadata.json"
  metadata = store.read_json(path, AGAIN)
  if [type(metadata.get(name)) for name in ("num_samples", "has_labels")] != [int, bool]:
    raise store.StoreError(f"{path} is damaged", AGAIN)
  return metadata


def _read_batches(path: pathlib.Path, metadata: dict[str, Any], batch_size: int) -> Batches:
  """Yield the images and labels of a samples.npz."""
  kinds = {"arr_0": (np.uint8, 4)} | ({"arr_1": (np.int64, 1)} if metadata["has_labels"] else {})
  for samples, *labels in read_npz(path, kinds, metadata["num_samples"], batch_size, AGAIN):
    yield samples, labels[0] if labels else None


class _PngFiles:
  """A sample set's PNG files, one for each image, or none.

  Each is written atomically, so that files of an earlier start need not be read.
  """

  def __init__(self, directory: pathlib.Path, are_wanted: bool):
    self.directory, self.are_wanted = directory, are_wanted

  def write(self, rows: UInt8[np.ndarray, "B H W 3"], first: int, only_missing: bool) -> None:
    """Write the images whose indices begin at `first`."""
    if self.are_wanted:
      self.directory.mkdir(exist_ok=True)
      for index, row in enumerate(rows, first):
        path = self.directory / f"{index:06d}.png"
        if not (only_missing and path.exists()):
          images.write_png(path, row)

  def remove_beyond(self, count: int) -> None:
    """Remove the files of images beyond a cut, and what a kill left of one."""
    for path in self.directory.iterdir() if self.are_wanted else ():
      stem = path.name.removesuffix(".png")
      if not stem.isdecimal() or int(stem) >= count:
        path.unlink()


class SampleSetWriter:
  """Writer of one sample set, in one process, that resumes where it was stopped.

  `is_finished` is set if nothing is left to do.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    settings: dict[str, Any],
    software: dict[str, Any],
    num_samples: int,
    image_size: int,
    batch_size: int,
    png_files: bool,
  ):
    """Make the directory, or resume it if it holds the same samples.

    A larger N appends; a smaller N truncates. Appending restarts at a batch boundary, so every
    image is computed in the same batch and is bit-equal. A finished set of N is read through, and
    given the PNG files that it lacks.

    Args:
      settings: those that, with its index, determine a sample, as JSON. If one differs, the set
        is started over.
      software: versions that change a sample's last digits, as JSON. They must agree only if
        samples are added.

    Raises:
      UserError: another process writes the directory, or it is not writable.
    """
    self.directory, self.num_samples, self.is_finished = directory, num_samples, False
    self._settings, self._software = store.as_json(settings), store.as_json(software)
    self._shape, self._batch_size = (image_size, image_size, 3), batch_size
    self._rows = store.RowFile(directory / "samples.part", self._shape, np.uint8, AGAIN)
    self._pngs = _PngFiles(directory / "png", png_files)
    self._progress = Progress()
    with self._explaining_os_errors(), contextlib.ExitStack() as opened:
      directory.mkdir(parents=True, exist_ok=True)
      opened.enter_context(owned(directory, "sample"))
      opened.callback(self._rows.close)
      for path in directory.glob("*.tmp"):  # A killed process left it.
        path.unlink()
      try:
        self._take_up()
      except store.StoreError as error:
        log.info("%s: starting over, as %s", directory, error.reason)
        self._start_over()
      self._opened = opened.pop_all()
    self.start_clock()

  def __enter__(self) -> "SampleSetWriter":
    return self

  def __exit__(self, *_: Any) -> None:
    self._opened.close()

  @property
  def num_done(self) -> int:
    """Return the number of images safely on disk, the index at which `append` begins."""
    return self._progress.num_done

  @contextlib.contextmanager
  def _explaining_os_errors(self) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      raise UserError(
        f"cannot write under {self.directory}: {error.strerror}: make space or make it writable, "
        "then run the same command again, which goes on from what is there"
      ) from error

  def _take_up(self) -> None:
    """Use what is there, or raise a StoreError if it cannot be used."""
    if (self.directory / "metadata.json").exists():
      metadata = _read_metadata(self.directory)
      self._check_settings(metadata, metadata["num_samples"])
      if metadata["num_samples"] == self.num_samples:
        self._check_finished(metadata)
        return
      self._reopen(metadata)
    path = self.directory / "progress.json"
    if not path.exists():
      self._start_over()
      return
    record = store.read_json(path, AGAIN)
    progress = Progress.from_record(record, path)
    self._check_settings(record, progress.num_done)
    self._resume(progress)

  def _check_settings(self, record: dict[str, Any], num_done: int) -> None:
    wanted = dict(self._settings)
    if num_done < self.num_samples:
      wanted |= self._software
    else:  # No samples are added.
      self._software = {name: record.get(name) for name in self._software}
    found = {name: record[name] for name in wanted if name in record}
    store.check_same("it holds other samples", wanted, found, AGAIN)

  def _start_over(self) -> None:
    """Remove the set's files, first the one that marks it as finished."""
    own = ("metadata.json", "progress.json", "samples.npz", "samples.part", "grid.png")
    for name in (*own, "path.png", "path.json"):
      (self.directory / name).unlink(missing_ok=True)
    store.remove_directory(self._pngs.directory)
    self._rows.path.touch()
    self._resume(Progress())

  def _resume(self, progress: Progress) -> None:
    """Check the rows that are there, and open the file behind those that are kept."""
    kept = min(progress.num_done, self.num_samples)
    if kept < self.num_samples:
      kept -= kept % self._batch_size
    if not self._pngs.are_wanted:
      store.remove_directory(self._pngs.directory)
    kept_crc = first = 0
    for rows in self._rows.read(progress.num_done, progress.crc32):
      kept_rows = rows[: max(0, kept - first)]
      kept_crc = zlib.crc32(kept_rows, kept_crc)
      self._pngs.write(kept_rows, first, only_missing=True)
      first += len(rows)
    # Write the record before truncating; otherwise a kill would leave fewer rows than it counts.
    self._keep(progress, num_done=kept, crc32=kept_crc, num_starts=progress.num_starts + 1)
    self._rows.open(kept, kept_crc)

  def _reopen(self, metadata: dict[str, Any]) -> None:
    """Turn a finished set into the unfinished one that it was at its end."""
    with store.atomic_path(self._rows.path) as temporary:
      part = store.RowFile(temporary, self._shape, np.uint8, AGAIN)
      part.open(0, 0)
      with contextlib.closing(part):
        for rows in self._read_finished(metadata):
          part.append(rows)
        part.sync()
    record = metadata | {"num_done": part.num_rows, "crc32": part.crc32}
    self._keep(Progress.from_record(record, self.directory / "metadata.json"))
    (self.directory / "metadata.json").unlink()
    (self.directory / "samples.npz").unlink()

  def _check_finished(self, metadata: dict[str, Any]) -> None:
    """Read a finished set to its last byte, and add the PNG files that it lacks."""
    first = 0
    for rows in self._read_finished(metadata):
      self._pngs.write(rows, first, only_missing=True)
      first += len(rows)
    self._remove_leftovers()
    self._progress = dataclasses.replace(self._progress, num_done=self.num_samples)
    self.is_finished = True

  def _read_finished(self, metadata: dict[str, Any]) -> Iterator[UInt8[np.ndarray, "B H W 3"]]:
    path = self.directory / "samples.npz"
    for rows, _ in _read_batches(path, metadata, self._rows.chunk_rows):
      if rows.shape[1:] != self._shape:
        raise store.StoreError(f"its images are of shape {rows.shape[1:]}", AGAIN)
      yield rows

  def _keep(self, progress: Progress, **changed: Any) -> None:
    """Write the progress, with some fields changed."""
    self._progress = dataclasses.replace(progress, **changed)
    record = self._settings | self._software | dataclasses.asdict(self._progress)
    store.write_json(self.directory / "progress.json", record)

  def start_clock(self) -> None:
    """Exclude the time until now, such as compilation, from `wall_clock_seconds`."""
    self._clock = time.perf_counter()

  def append(self, samples: UInt8[np.ndarray, "B H W C"]) -> None:
    """Add the next samples, gray or RGB, which are safe against a kill on return.

    Write grid.png as soon as all of its images are there.
    """
    rows, num_before = images.to_rgb(samples), self.num_done
    with self._explaining_os_errors():
      self._rows.append(rows)
      self._rows.sync()
      self._pngs.write(rows, self.num_done, only_missing=False)
      before = self._clock
      self.start_clock()
      self._keep(
        self._progress,
        num_done=self._rows.num_rows,
        crc32=self._rows.crc32,
        num_drawn=self._progress.num_drawn + len(rows),
        wall_clock_seconds=self._progress.wall_clock_seconds + (self._clock - before),
      )
      if num_before < GRID_SIZE <= self.num_done < self.num_samples:  # `finish` is far
        self._write_grid()
        log.info("%s: grid.png shows the first %d samples", self.directory, GRID_SIZE)

  def _write_grid(self) -> None:
    pixels = np.concatenate(list(self._rows.read(min(GRID_SIZE, self.num_done))))
    images.write_grid(self.directory / "grid.png", pixels, GRID_COLUMNS)

  def finish(self, label_rule: LabelRule | None, facts: dict[str, Any]) -> dict[str, Any]:
    """Write samples.npz, grid.png and, last, metadata.json with `facts`, and return it.

    Until samples.part is removed, the images take their space twice.
    """
    metadata = self._settings | self._software | facts
    metadata |= {"num_samples": self.num_samples, "has_labels": label_rule is not None}
    kept = ("num_drawn", "wall_clock_seconds", "num_starts")
    metadata |= {name: getattr(self._progress, name) for name in kept}
    try:
      with self._explaining_os_errors():
        metadata |= self._write_npz(metadata, label_rule)
        self._write_grid()
        self._pngs.remove_beyond(self.num_samples)
        store.write_json(self.directory / "metadata.json", metadata)
        self._remove_leftovers()
    except store.StoreError as error:
      raise UserError(
        f"what was written under {self.directory} has changed ({error.reason}): check the disk, "
        "then run the same command again"
      ) from error
    return metadata

  def _write_npz(self, metadata: dict[str, Any], label_rule: LabelRule | None) -> dict[str, Any]:
    """Write samples.npz, and return the metadata of its saturated pixels."""
    count, num_saturated = self.num_samples, 0

    def rows() -> Iterator[np.ndarray]:
      nonlocal num_saturated
      for chunk in self._rows.read(count, self._progress.crc32):
        num_saturated += int(np.count_nonzero((chunk == 0) | (chunk == 255)))
        yield chunk

    with store.atomic_path(self.directory / "samples.npz") as temporary:
      with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        write_member(archive, "arr_0", np.uint8, (count, *self._shape), rows())
        if label_rule is not None:
          write_member(archive, "arr_1", np.int64, (count,), _labels(label_rule, count))
      for _ in _read_batches(temporary, metadata, self._rows.chunk_rows):
        pass  # Reading compares the checksums.
    share = num_saturated / (count * math.prod(self._shape))
    if share > MAX_SATURATED_SHARE:
      log.warning(
        "%s: %.1f %% of all pixel values are 0 or 255, which is right only for images that are "
        "mostly pure black and white: lower config.sampling.guidance_scale, or use another solver "
        "or more steps",
        self.directory,
        100 * share,
      )
    return {"saturated_share": share, "is_mostly_saturated": share > MAX_SATURATED_SHARE}

  def _remove_leftovers(self) -> None:
    self._rows.path.unlink(missing_ok=True)
    (self.directory / "progress.json").unlink(missing_ok=True)


def _labels(label_rule: LabelRule, count: int) -> Iterator[Int[np.ndarray, " B"]]:
  for first in range(0, count, LABEL_CHUNK):
    yield label_rule(np.arange(first, min(first + LABEL_CHUNK, count))).astype(np.int64)


def read_sample_set(directory: pathlib.Path, batch_size: int) -> tuple[dict[str, Any], Batches]:
  """Return the metadata and, without holding all of it, the contents of a finished sample set.

  Raises:
    UserError: the set is missing or unfinished. Damage is raised while iterating, at the latest at
      the last batch.
  """
  if (directory / "metadata.json").exists():
    metadata = _read_metadata(directory)
    return metadata, _read_batches(directory / "samples.npz", metadata, batch_size)
  if (directory / "progress.json").exists():
    raise UserError(f"unfinished samples under {directory}: {AGAIN} to go on")
  raise UserError(f"no samples under {directory}: run the same command with --mode=sample first")
