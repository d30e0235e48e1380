"""A directory of VAE latents: written once, in order; read at random, memory-mapped.

DIR/train.npy, DIR/eval.npy: (N, copies, 2, h, w, c) float32; copy 1, where there
is one, is of the mirrored image; the 2 are mean and log-variance, unscaled.
DIR/train_labels.npy, DIR/eval_labels.npy: (N,) int32.
DIR/progress.json: how many rows of a directory under way are safely written.
DIR/manifest.json: what was encoded and with what; there once all of it is.

Axes: N examples, b examples asked for, h w latent, c channels.
"""

import dataclasses
import json
import mmap
import os
import pathlib
import zlib
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from lrdit.data.source import Source
from lrdit.model.vae import VaeConfig, scale_latents
from lrdit.runtime.errors import UserError
from lrdit.runtime.locks import lock_path
from lrdit.runtime.workdir import write_json

SPLITS = ("train", "eval")
CRC_CHUNK_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True, eq=False)
class LatentSource(Source):
  """A split of latents.

  Attributes:
    images: (N, copies, 2, h, w, c) float32, memory-mapped.
    vae_config: of the VAE, for its scaling.
  """

  vae_config: VaeConfig

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(h, w, c)."""
    return tuple(self.images.shape[3:])

  def gather(self, index: Int[np.ndarray, " b"], flip: Bool[np.ndarray, " b"]) -> dict[str, Any]:
    """Reads latents as the model works on them, scaled.

    Args:
      index: (b,) in [0, N).
      flip: (b,) which to take of the mirrored image; all False without copies.

    Returns:
      "image" the mean and "std" the standard deviation of the VAE's posterior,
      (b, h, w, c) float32, and "label" (b,) int32.
    """
    moments = self.images[index, flip.astype(np.intp)]
    return {
      "image": scale_latents(self.vae_config, moments[:, 0]),
      "std": np.exp(0.5 * moments[:, 1]) * self.vae_config.scaling_factor,
      "label": self.labels[index],
    }


def _paths(directory: pathlib.Path, split: str) -> tuple[pathlib.Path, pathlib.Path]:
  return directory / f"{split}.npy", directory / f"{split}_labels.npy"


def _read_record(path: pathlib.Path) -> dict[str, Any] | None:
  """A manifest or progress, with all that is read of it there; None without the file."""
  try:
    record = json.loads(path.read_text())
    if not isinstance(record["description"], dict):
      raise ValueError("description is no object")
    for split in SPLITS:
      entry = record["splits"][split]
      if not all(isinstance(number, int) for number in (entry["done"], *entry["crc32"])):
        raise ValueError("splits are no numbers")
    return record
  except FileNotFoundError:
    return None
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(
      f"{path} is damaged ({error}): delete {path.parent}, and encode again"
    ) from error


class _RowFile:
  """An .npy file of known final shape that grows by rows and can be continued.

  Plain writes, not a memory map, as a full disk must raise an error.
  """

  def __init__(self, path: pathlib.Path, shape: tuple[int, ...], dtype: Any, done: int, crc: int):
    """Opens a file after its first `done` rows, whose checksum is `crc`."""
    self._dtype, self.crc = np.dtype(dtype), crc
    self._file = path.open("r+b" if done else "wb")
    np.lib.format.write_array_header_1_0(
      self._file, {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
    )
    row_bytes = self._dtype.itemsize * int(np.prod(shape[1:]))
    end = self._file.tell() + done * row_bytes
    if done and os.path.getsize(path) < end:
      self._file.close()
      raise UserError(f"{path} has lost data: delete {path.parent}, and encode again")
    self._file.seek(end)
    self._file.truncate()

  def append(self, rows: np.ndarray) -> None:
    data = np.ascontiguousarray(rows, self._dtype)
    self._file.write(data)
    self.crc = zlib.crc32(data, self.crc)

  def sync(self) -> None:
    self._file.flush()
    os.fsync(self._file.fileno())

  def close(self) -> None:
    self._file.close()


class LatentWriter:
  """Writes one directory, split after split, and goes on where it was stopped."""

  def __init__(
    self, directory: pathlib.Path, description: dict[str, Any], num_examples: dict[str, int]
  ):
    """Makes the directory or takes it up again.

    Args:
      directory: where to write.
      description: what is encoded with what, as JSON: the later manifest.
        "latent_shape" is [copies, 2, h, w, c].
      num_examples: rows of each split.

    Raises:
      UserError: the directory holds something else.
    """
    self.directory, self._description = directory, description
    self._num_examples = num_examples
    directory.mkdir(parents=True, exist_ok=True)
    self._progress = _read_record(directory / "progress.json")
    found = self._progress or _read_record(directory / "manifest.json")
    own = ("progress.json.tmp", lock_path(directory, "encode").name)
    if found is None and any(path.name not in own for path in directory.iterdir()):
      raise UserError(f"{directory} is not empty and holds no latents: use another --output")
    if found is not None:
      _check_same(directory, found.get("description"), description)
    self.is_complete = found is not None and self._progress is None
    if found is None:
      fresh = {split: {"done": 0, "crc32": [0, 0]} for split in num_examples}
      self._progress = {"description": description, "splits": fresh}
      write_json(directory / "progress.json", self._progress)

  def done(self, split: str) -> int:
    """How many rows of a split are safely written."""
    return (
      self._num_examples[split] if self.is_complete else self._progress["splits"][split]["done"]
    )

  def open_split(self, split: str) -> tuple[_RowFile, _RowFile]:
    """The files of latents and labels, ready for the next row."""
    entry, count = self._progress["splits"][split], self._num_examples[split]
    shapes = ((count, *self._description["latent_shape"]), (count,))
    return tuple(
      _RowFile(path, shape, dtype, entry["done"], crc)
      for path, shape, dtype, crc in zip(
        _paths(self.directory, split), shapes, ("<f4", "<i4"), entry["crc32"], strict=True
      )
    )

  def keep(self, split: str, files: tuple[_RowFile, _RowFile], done: int) -> None:
    """Makes the first `done` rows safe against a kill."""
    for file in files:
      file.sync()
    self._progress["splits"][split] = {"done": done, "crc32": [file.crc for file in files]}
    write_json(self.directory / "progress.json", self._progress)

  def finish(self) -> None:
    """Turns the progress into the manifest."""
    write_json(self.directory / "manifest.json", self._progress)
    (self.directory / "progress.json").unlink()


def _check_same(directory: pathlib.Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
  """Refuses a directory that was made from something else."""
  ours = json.loads(json.dumps(ours))  # tuples become lists
  for field in sorted(ours.keys() | theirs.keys()):
    if ours.get(field) != theirs.get(field):
      raise UserError(
        f"{directory} holds other latents: {field} is {theirs.get(field)!r} there and "
        f"{ours.get(field)!r} here; use another directory, or delete it and encode again"
      )


def read_manifest(directory: str) -> dict[str, Any]:
  """The manifest of a finished directory.

  Raises:
    UserError: there is no such directory, or it is unfinished or damaged.
  """
  path = pathlib.Path(directory)
  progress = _read_record(path / "progress.json")
  if progress is not None:
    counts = ", ".join(f"{entry['done']} {name}" for name, entry in progress["splits"].items())
    raise UserError(
      f"the latents under {path} are unfinished ({counts} images so far): run the same "
      f"--mode=encode --output={path} again to go on"
    )
  manifest = _read_record(path / "manifest.json")
  if manifest is None:
    raise UserError(
      f"no latents under {path} (config.vae.latents_dir): make them by the same --config with "
      f"--mode=encode --output={path} --config.vae.path=VAE"
    )
  return manifest


def open_latents(directory: str, split: str) -> LatentSource:
  """A split of a finished directory, memory-mapped.

  Raises:
    UserError: it is missing, unfinished, or not as its manifest says.
  """
  manifest = read_manifest(directory)
  try:
    description, entry = manifest["description"], manifest["splits"][split]
    arrays = [np.load(path, mmap_mode="r") for path in _paths(pathlib.Path(directory), split)]
    shapes = ((entry["done"], *description["latent_shape"]), (entry["done"],))
    if any(a.shape != s for a, s in zip(arrays, shapes, strict=True)):
      raise ValueError("its files have other shapes than the manifest says")
  except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
    raise UserError(
      f"the latents under {directory} are damaged ({error}): delete the directory, and encode again"
    ) from error
  rows, labels = arrays
  # Rows are asked for at random: reading ahead in the file would be wasted.
  rows._mmap.madvise(mmap.MADV_RANDOM)
  fingerprint = {
    **description["sources"][split],
    "vae": description["vae_digest"],
    "crc32": entry["crc32"],
  }
  return LatentSource(
    images=rows,
    labels=np.asarray(labels),
    num_classes=description["num_classes"],
    fingerprint=fingerprint,
    vae_config=VaeConfig(**_as_fields(description["vae_config"])),
  )


def _as_fields(stored: dict[str, Any]) -> dict[str, Any]:
  return {name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()}


def verify(directory: pathlib.Path) -> None:
  """Reads a finished directory to its last byte.

  Raises:
    UserError: its contents are not what was written.
  """
  manifest = read_manifest(str(directory))
  for split in SPLITS:
    open_latents(str(directory), split)
    expected = manifest["splits"][split]["crc32"]
    for path, crc in zip(_paths(directory, split), expected, strict=True):
      if _checksum(path) != crc:
        raise UserError(f"{path} has changed since it was written: delete {directory}, and encode")


def _checksum(path: pathlib.Path) -> int:
  """CRC-32 of an .npy file's data."""
  crc = 0
  with path.open("rb") as file:
    np.lib.format.read_magic(file)
    np.lib.format.read_array_header_1_0(file)
    while data := file.read(CRC_CHUNK_BYTES):
      crc = zlib.crc32(data, crc)
  return crc
