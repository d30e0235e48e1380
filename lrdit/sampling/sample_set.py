"""An export's directory: samples go to disk as they are drawn, and are read back by batches.

samples.npz: arr_0 (N, H, W, 3) uint8 in index order; arr_1 (N,) int64 where there are classes.
Stored, not compressed: what numpy and the ADM evaluator read.
png/000000.png and so on, where asked for. grid.png: the first images.
metadata.json: what the samples are; written when all of the above is whole, so an export
without it is unfinished, and one with it is finished whatever else lies there.

While samples are drawn: samples.part, rows without a header, and progress.json, how many of
them are safely on disk, their checksum, and the settings they were drawn with.

Axes: N images, B images of a batch, H W image, C channels.
"""

import contextlib
import dataclasses
import io
import json
import logging
import math
import os
import pathlib
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from lrdit.data import images
from lrdit.runtime.errors import UserError
from lrdit.runtime.locks import owned
from lrdit.runtime.npz_stream import DamagedArchive, read_npz, write_member
from lrdit.runtime.workdir import atomic_path, changes, remove_directory, write_json

log = logging.getLogger("lrdit")

GRID_SIZE = 100
GRID_COLUMNS = 10
CHUNK_BYTES = 1 << 20  # read at once
LABEL_CHUNK = 1 << 16  # labels computed at once
SHOWN_CHANGES = 3
MAX_SATURATED_SHARE = 0.5  # of pixel values at 0 or 255: more is told of

# Labels of sample indices.
LabelRule = Callable[[np.ndarray], np.ndarray]


class DamagedExport(Exception):
  """Files of an export that are not as they were written."""


@dataclasses.dataclass(frozen=True)
class Progress:
  """How far an export is.

  Attributes:
    num_done: images safely on disk.
    crc32: of their bytes.
    num_drawn: images that all starts together drew, some of them perhaps twice.
    wall_clock_seconds: that drawing and writing those took.
    num_starts: how often it was begun or gone on with.
  """

  num_done: int = 0
  crc32: int = 0
  num_drawn: int = 0
  wall_clock_seconds: float = 0.0
  num_starts: int = 0

  @classmethod
  def from_record(cls, record: dict[str, Any]) -> "Progress":
    """Those fields of a progress.json.

    Raises:
      DamagedExport: they are missing or no numbers.
    """
    fields = dataclasses.fields(cls)
    if not all(isinstance(record.get(f.name), f.type) for f in fields):
      raise DamagedExport("progress.json is damaged")
    return cls(**{f.name: record[f.name] for f in fields})


def _read_record(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object.

  Raises:
    DamagedExport: it is none.
  """
  try:
    record = json.loads(path.read_text())
  except ValueError as error:
    raise DamagedExport(f"{path.name} is damaged") from error
  if not isinstance(record, dict):
    raise DamagedExport(f"{path.name} is damaged")
  return record


def _write_all(file: io.FileIO, data: np.ndarray) -> None:
  """Unbuffered, as a full disk must raise here and not when the file is closed."""
  view = memoryview(data).cast("B")
  while view:
    view = view[file.write(view) :]


def _npz_layout(metadata: dict[str, Any]) -> tuple[int, bool]:
  """(number of images, whether with labels) of a samples.npz, by its metadata.

  Raises:
    DamagedExport: it does not say.
  """
  layout = metadata.get("num_samples"), metadata.get("has_labels")
  if [type(value) for value in layout] != [int, bool]:
    raise DamagedExport("metadata.json is damaged")
  return layout


def _read_samples(
  path: pathlib.Path, num_samples: int, has_labels: bool, batch_size: int
) -> Iterator[tuple[UInt8[np.ndarray, "B H W 3"], Int[np.ndarray, " B"] | None]]:
  """`read_npz`, its damage being the export's.

  Raises:
    DamagedExport: the file is not as it was written.
  """
  try:
    yield from read_npz(path, num_samples, has_labels, batch_size)
  except DamagedArchive as error:
    raise DamagedExport(str(error)) from error


class ExportWriter:
  """Writes one export, and goes on where it was stopped.

  One process writes; it knows nothing of how samples are drawn.

  Attributes:
    num_done: images that need not be drawn again; the next `append` begins there.
    is_finished: nothing is left to do.
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
    """Makes the directory or takes it up again, as far as it holds the same samples.

    More samples than there are go on from those; fewer are cut. A finished export that
    has all of them is read through and given the PNG files it lacks.

    Args:
      directory: of the export.
      settings: all that defines a sample beside its index, as JSON. Where one differs, the
        export starts over.
      software: what else changes a sample's last digits, as JSON; must agree only where
        samples are added.
      num_samples: N.
      image_size: H = W.
      batch_size: of the sampler. It goes on at a multiple, so that images meet the same
        others in the same places, and come out equal to the bit.
      png_files: write PNG files too.

    Raises:
      UserError: another process has the directory, or it cannot be written.
    """
    self.directory, self.num_samples = directory, num_samples
    self._settings, self._software = (json.loads(json.dumps(x)) for x in (settings, software))
    self._shape = (image_size, image_size, 3)
    self._batch_size, self._png_files = batch_size, png_files
    self._part = directory / "samples.part"
    self._npz = directory / "samples.npz"
    self._png = directory / "png"
    self._file: io.FileIO | None = None
    self._progress = Progress()
    self.is_finished = False
    with self._telling_how_to_go_on(), contextlib.ExitStack() as opened:
      directory.mkdir(parents=True, exist_ok=True)
      opened.enter_context(owned(directory, "sample"))
      for path in directory.glob("*.tmp"):  # of a killed process
        path.unlink()
      try:
        self._take_up()
      except DamagedExport as reason:
        log.info("%s: starting over, as %s", directory, reason)
        self._start_over()
      self._opened = opened.pop_all()
    self._clock = time.perf_counter()

  def __enter__(self) -> "ExportWriter":
    return self

  def __exit__(self, *_: Any) -> None:
    if self._file is not None:
      self._opened.callback(self._file.close)
    self._opened.close()

  @property
  def num_done(self) -> int:
    """Images safely on disk."""
    return self._progress.num_done

  def _take_up(self) -> None:
    """Finds out what is there.

    Raises:
      DamagedExport: nothing that can be used.
    """
    if (self.directory / "metadata.json").exists():
      metadata = _read_record(self.directory / "metadata.json")
      count, _ = _npz_layout(metadata)
      self._check_settings(metadata, count)
      if count == self.num_samples:
        self._check_finished(metadata)
        return
      self._reopen(metadata)
    if not (self.directory / "progress.json").exists():
      self._start_over()
      return
    record = _read_record(self.directory / "progress.json")
    progress = Progress.from_record(record)
    self._check_settings(record, progress.num_done)
    self._resume(progress)

  def _check_settings(self, record: dict[str, Any], num_done: int) -> None:
    wanted = dict(self._settings)
    if num_done < self.num_samples:
      wanted |= self._software
    else:  # nothing is added
      self._software = {name: record.get(name) for name in self._software}
    differing = changes(wanted, {name: record[name] for name in wanted if name in record})
    if differing:
      more = len(differing) - SHOWN_CHANGES
      shown = ", ".join(differing[:SHOWN_CHANGES]) + (f" and {more} more" if more > 0 else "")
      raise DamagedExport(f"it holds other samples: {shown}")

  def _start_over(self) -> None:
    """Removes all of an export, first what says that it is one."""
    for name in ("metadata.json", "progress.json", "samples.npz", "samples.part", "grid.png"):
      (self.directory / name).unlink(missing_ok=True)
    remove_directory(self._png)
    self._part.touch()
    self._resume(Progress())

  def _resume(self, progress: Progress) -> None:
    """Checks the rows that are there, and opens the file behind those that are kept.

    Raises:
      DamagedExport: they are not what was written.
    """
    kept = min(progress.num_done, self.num_samples)
    if kept < self.num_samples:
      kept -= kept % self._batch_size
    if not self._png_files:
      remove_directory(self._png)  # it would hold some of the images only
    crc = kept_crc = first = 0
    for rows in self._read_part(progress.num_done):
      crc = zlib.crc32(rows, crc)
      kept_rows = rows[: max(0, kept - first)]
      kept_crc = zlib.crc32(kept_rows, kept_crc)
      self._add_missing_pngs(kept_rows, first)
      first += len(rows)
    if crc != progress.crc32:
      raise DamagedExport(f"{self._part.name} is damaged")
    self._progress = dataclasses.replace(
      progress, num_done=kept, crc32=kept_crc, num_starts=progress.num_starts + 1
    )
    self._keep_progress()
    # Not before: a kill in between must find the rows that the old record tells of.
    os.truncate(self._part, kept * math.prod(self._shape))
    self._file = self._part.open("ab", buffering=0)

  def _reopen(self, metadata: dict[str, Any]) -> None:
    """Turns a finished export into the unfinished one that it was at its end.

    Raises:
      DamagedExport: it is not as it was written.
    """
    count, crc = metadata["num_samples"], 0
    with atomic_path(self._part) as temporary, temporary.open("wb", buffering=0) as file:
      for rows in self._read_finished(metadata):
        _write_all(file, rows)
        crc = zlib.crc32(rows, crc)
      os.fsync(file.fileno())
    self._progress = Progress.from_record(metadata | {"num_done": count, "crc32": crc})
    self._keep_progress()
    (self.directory / "metadata.json").unlink()
    self._npz.unlink()

  def _check_finished(self, metadata: dict[str, Any]) -> None:
    """Reads a finished export to its last byte, and adds PNG files that are asked for.

    Raises:
      DamagedExport: it is not as it was written.
    """
    first = 0
    for rows in self._read_finished(metadata):
      self._add_missing_pngs(rows, first)
      first += len(rows)
    self._remove_leftovers()
    self._progress = dataclasses.replace(self._progress, num_done=self.num_samples)
    self.is_finished = True

  def _read_finished(self, metadata: dict[str, Any]) -> Iterator[UInt8[np.ndarray, "B H W 3"]]:
    count, has_labels = _npz_layout(metadata)
    for rows, _ in _read_samples(self._npz, count, has_labels, self._rows_per_chunk()):
      if rows.shape[1:] != self._shape:
        raise DamagedExport(f"its images are of shape {rows.shape[1:]}")
      yield rows

  def _rows_per_chunk(self) -> int:
    return max(1, CHUNK_BYTES // math.prod(self._shape))

  def _read_part(self, count: int) -> Iterator[UInt8[np.ndarray, "B H W 3"]]:
    """The first rows of samples.part by chunks.

    Raises:
      DamagedExport: there are fewer.
    """
    if not self._part.exists():
      raise DamagedExport(f"{self._part.name} is missing")
    with self._part.open("rb") as file:
      for first in range(0, count, self._rows_per_chunk()):
        shape = (min(self._rows_per_chunk(), count - first), *self._shape)
        data = file.read(math.prod(shape))
        if len(data) < math.prod(shape):
          raise DamagedExport(f"{self._part.name} has lost data")
        yield np.frombuffer(data, np.uint8).reshape(shape)

  def _keep_progress(self) -> None:
    record = self._settings | self._software | dataclasses.asdict(self._progress)
    write_json(self.directory / "progress.json", record)

  def _png_path(self, index: int) -> pathlib.Path:
    return self._png / f"{index:06d}.png"

  def _add_missing_pngs(self, rows: UInt8[np.ndarray, "B H W 3"], first: int) -> None:
    """PNG files are whole or not there, so those that are need not be looked into."""
    if self._png_files:
      self._png.mkdir(exist_ok=True)
      for index, row in enumerate(rows, first):
        if not self._png_path(index).exists():
          images.write_png(self._png_path(index), row)

  @contextlib.contextmanager
  def _telling_how_to_go_on(self) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      raise UserError(
        f"cannot write under {self.directory}: {error.strerror}: make space or make it writable, "
        f"then run the same command again, which goes on from what is there"
      ) from error

  def start_clock(self) -> None:
    """The time until now, of compiling say, is none of `wall_clock_seconds`."""
    self._clock = time.perf_counter()

  def append(self, samples: UInt8[np.ndarray, "B H W C"]) -> None:
    """Adds the next samples, safe against a kill when it returns.

    Args:
      samples: (B, H, W, 1 or 3) of the indices from `num_done`.

    Raises:
      UserError: the disk is full or not writable.
    """
    rows = np.ascontiguousarray(images.to_rgb(samples))
    with self._telling_how_to_go_on():
      _write_all(self._file, rows)
      os.fsync(self._file.fileno())
      if self._png_files:
        self._png.mkdir(exist_ok=True)
        for index, row in enumerate(rows, self.num_done):
          images.write_png(self._png_path(index), row)
      now = time.perf_counter()
      self._progress = dataclasses.replace(
        self._progress,
        num_done=self.num_done + len(rows),
        crc32=zlib.crc32(rows, self._progress.crc32),
        num_drawn=self._progress.num_drawn + len(rows),
        wall_clock_seconds=self._progress.wall_clock_seconds + now - self._clock,
      )
      self._clock = now
      self._keep_progress()

  def finish(self, label_rule: LabelRule | None, facts: dict[str, Any]) -> dict[str, Any]:
    """Writes samples.npz, grid.png and, last, metadata.json, which it returns.

    Needs the space of the images a second time, until samples.part is removed.

    Args:
      label_rule: labels of indices; None without classes.
      facts: what else the metadata says, as JSON.

    Raises:
      UserError: the disk is full or not writable, or changed what was written.
    """
    metadata = self._settings | self._software | facts
    metadata |= {"num_samples": self.num_samples, "has_labels": label_rule is not None}
    for name in ("num_drawn", "wall_clock_seconds", "num_starts"):
      metadata[name] = getattr(self._progress, name)
    try:
      with self._telling_how_to_go_on():
        metadata |= self._saturation(self._write_npz(label_rule))
        grid = np.concatenate(list(self._read_part(min(GRID_SIZE, self.num_samples))))
        images.write_grid(self.directory / "grid.png", grid, GRID_COLUMNS)
        self._remove_other_pngs()
        write_json(self.directory / "metadata.json", metadata)
        self._remove_leftovers()
    except DamagedExport as error:
      raise UserError(
        f"what was written under {self.directory} has changed ({error}): check the disk, then "
        "run the same command again"
      ) from error
    return metadata

  def _saturation(self, saturated_share: float) -> dict[str, Any]:
    """Return what the metadata says of pixels at 0 or 255, and warn where most are."""
    is_saturated = saturated_share > MAX_SATURATED_SHARE
    if is_saturated:
      log.warning(
        "%s: %.1f %% of all pixel values are 0 or 255, which is right only for images that are "
        "mostly pure black and white: lower config.sampling.guidance_scale, or use another "
        "solver or more steps",
        self.directory,
        100 * saturated_share,
      )
    return {"saturated_share": saturated_share, "is_mostly_saturated": is_saturated}

  def _write_npz(self, label_rule: LabelRule | None) -> float:
    """Write samples.npz and return the share of its pixel values that are 0 or 255."""
    count, crc, saturated = self.num_samples, 0, 0

    def rows() -> Iterator[np.ndarray]:
      nonlocal crc, saturated
      for chunk in self._read_part(count):
        crc = zlib.crc32(chunk, crc)
        saturated += int(np.count_nonzero((chunk == 0) | (chunk == 255)))
        yield chunk

    with atomic_path(self._npz) as temporary:
      with temporary.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
          write_member(archive, "arr_0.npy", np.uint8, (count, *self._shape), rows())
          if label_rule is not None:
            write_member(archive, "arr_1.npy", np.int64, (count,), _labels(label_rule, count))
        file.flush()
        os.fsync(file.fileno())
      if crc != self._progress.crc32:
        raise DamagedExport(f"{self._part.name} is damaged")
      has_labels = label_rule is not None
      for _ in _read_samples(temporary, count, has_labels, self._rows_per_chunk()):
        pass  # the checksums of what the disk gives back
    return saturated / (count * math.prod(self._shape))

  def _remove_other_pngs(self) -> None:
    """PNG files beyond a cut, and what a kill left of one."""
    if self._png_files:
      with os.scandir(self._png) as entries:
        for entry in entries:
          stem = entry.name.removesuffix(".png")
          number = int(stem) if stem.isdecimal() else self.num_samples
          if number >= self.num_samples:
            os.unlink(entry.path)

  def _remove_leftovers(self) -> None:
    self._part.unlink(missing_ok=True)
    (self.directory / "progress.json").unlink(missing_ok=True)


def _labels(label_rule: LabelRule, count: int) -> Iterator[Int[np.ndarray, " B"]]:
  for first in range(0, count, LABEL_CHUNK):
    yield label_rule(np.arange(first, min(first + LABEL_CHUNK, count))).astype(np.int64)


def iterate_export(
  directory: pathlib.Path, batch_size: int
) -> tuple[
  dict[str, Any], Iterator[tuple[UInt8[np.ndarray, "B H W 3"], Int[np.ndarray, " B"] | None]]
]:
  """Reads a finished export without holding all of it.

  Args:
    directory: of the export.
    batch_size: images at a time.

  Returns:
    metadata: what metadata.json says.
    batches: (at most B, H, W, 3) uint8 and (at most B,) int64, or None without classes.
      Damage raises a UserError, at the latest in place of the last batch.

  Raises:
    UserError: there is no export, it is unfinished, or its metadata is damaged.
  """
  again = "run the same command with --mode=sample"
  path = directory / "metadata.json"
  if not path.exists():
    state = "unfinished" if (directory / "progress.json").exists() else "no"
    raise UserError(
      f"{state} samples under {directory}: {again} "
      f"{'again to go on' if state == 'unfinished' else 'first'}"
    )

  def damaged(error: DamagedExport) -> UserError:
    return UserError(f"the samples under {directory} are damaged ({error}): {again} again")

  try:
    metadata = _read_record(path)
    layout = _npz_layout(metadata)
  except DamagedExport as error:
    raise damaged(error) from error

  def batches() -> Iterator[Any]:
    try:
      yield from _read_samples(directory / "samples.npz", *layout, batch_size)
    except DamagedExport as error:
      raise damaged(error) from error

  return metadata, batches()
