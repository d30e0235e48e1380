"""A directory of VAE latents, written once in order and read at random, memory-mapped.

DIR/train.npy, DIR/eval.npy: (N, copies, 2, h, w, c) float32. Copy 1, if there is one, is of the
mirrored image; the axis of 2 holds mean and log-variance, unscaled.
DIR/train_labels.npy, DIR/eval_labels.npy: (N,) int32.
DIR/train_checksums.npy, DIR/eval_checksums.npy: (N, copies) uint32, CRC-32 of each copy of a row,
with which it is compared whenever it is read. Directories of earlier versions have none.
DIR/progress.json: how many rows of an unfinished directory are safely written.
DIR/manifest.json: what was encoded with which VAE, and a checksum of that. It is written last.

Axes: N examples, b requested examples, h w latent, c channels.
"""

import contextlib
import dataclasses
import mmap
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int, UInt32

from lrdit.data.source import Source
from lrdit.model import vae_weights
from lrdit.model.vae import VaeConfig, VaeRunner, scale_latents
from lrdit.runtime import store
from lrdit.runtime.errors import UserError
from lrdit.runtime.locks import lock_path

SPLITS = ("train", "eval")
CHECKSUM = "crc32"  # of the rest of the manifest
_FIX = "delete the directory, and encode again"


def scaled_posterior(
  vae_config: VaeConfig, moments: Float32[np.ndarray, "b 2 h w c"]
) -> dict[str, np.ndarray]:
  """Return "image" and "std", the scaled mean and standard deviation of the VAE's posterior."""
  return {
    "image": scale_latents(vae_config, moments[:, 0]),
    "std": np.exp(0.5 * moments[:, 1]) * vae_config.scaling_factor,
  }


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedSource(Source):
  """A split of images that are encoded whenever they are read; `images` are the images."""

  runner: VaeRunner

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Return (h, w, c)."""
    factor, config = self.runner.config.downsample_factor, self.runner.config
    height, width = self.images.shape[1:3]
    return height // factor, width // factor, config.latent_channels

  def gather(self, index: Int[np.ndarray, " b"], flip: Bool[np.ndarray, " b"]) -> dict[str, Any]:
    """Encode images, mirrored where `flip` is set; the result is that of `LatentSource`."""
    batch = super().gather(index, flip)
    moments = self.runner.encode(np.ascontiguousarray(batch["image"]))
    return scaled_posterior(self.runner.config, moments) | {"label": batch["label"]}


def encode_on_the_fly(source: Source, runner: VaeRunner) -> EncodedSource:
  """Return the latents of a split of images, none of which are kept."""
  fields = {field.name: getattr(source, field.name) for field in dataclasses.fields(Source)}
  fields["fingerprint"] = source.fingerprint | {"vae": runner.digest, "encoded": "on the fly"}
  return EncodedSource(**fields, runner=runner)


class CheckedRows:
  """A split's latents, memory-mapped, whose rows are compared with their checksums."""

  def __init__(self, rows: np.ndarray, checksums: UInt32[np.ndarray, "N copies"], name: str):
    """Take (N, copies, 2, h, w, c) float32 rows; `name` is that of their file in messages."""
    self._rows, self._checksums, self._name, self.shape = rows, checksums, name, rows.shape

  def __getitem__(self, index: tuple[np.ndarray, np.ndarray]) -> Float32[np.ndarray, "b 2 h w c"]:
    """Return the rows of some (examples, copies); raise a UserError if one has changed."""
    rows = self._rows[index]
    for number, row, crc32 in zip(index[0], rows, self._checksums[index], strict=True):
      if zlib.crc32(np.ascontiguousarray(row)) != crc32:
        raise UserError(f"row {number} of {self._name} has changed since it was written: {_FIX}")
    return rows


@dataclasses.dataclass(frozen=True, eq=False)
class LatentSource(Source):
  """A split of latents; `images` is (N, copies, 2, h, w, c) float32, memory-mapped."""

  vae_config: VaeConfig

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Return (h, w, c)."""
    return tuple(self.images.shape[3:])

  def gather(self, index: Int[np.ndarray, " b"], flip: Bool[np.ndarray, " b"]) -> dict[str, Any]:
    """Read latents, scaled for the model.

    Returns:
      "image" and "std", the mean and standard deviation of the VAE's posterior, (b, h, w, c)
      float32, and "label" (b,) int32. Rows with `flip` are of the stored mirrored image.
    """
    moments = self.images[index, flip.astype(np.intp)]
    return scaled_posterior(self.vae_config, moments) | {"label": self.labels[index]}


def _row_files(
  directory: pathlib.Path,
  split: str,
  count: int,
  entry: dict[str, Any],
  latent_shape: Sequence[int],
) -> tuple[store.RowFile, ...]:
  """Return the files of a split's latents, labels and, if its entry has them, checksums."""
  files = (
    ("", tuple(latent_shape), "<f4"),
    ("_labels", (), "<i4"),
    ("_checksums", (latent_shape[0],), "<u4"),
  )
  return tuple(
    store.RowFile(
      directory / f"{split}{part}.npy",
      shape,
      dtype,
      f"delete {directory}, and encode again",
      store.npy_header((count, *shape), dtype),
    )
    for part, shape, dtype in files[: len(entry["crc32"])]
  )


def append_rows(
  files: tuple[store.RowFile, ...],
  moments: Float32[np.ndarray, "b copies 2 h w c"],
  labels: Int[np.ndarray, " b"],
) -> None:
  """Write rows to the files from `LatentWriter.open_split`, which has to `keep` them."""
  checksums = [[zlib.crc32(np.ascontiguousarray(copy)) for copy in row] for row in moments]
  for file, rows in zip(files, (moments, labels, np.array(checksums, np.uint32)), strict=False):
    file.append(rows)


def _read_record(path: pathlib.Path) -> dict[str, Any] | None:
  """Return a valid manifest or progress record, or None without the file."""
  if not path.exists():
    return None
  fix = f"delete {path.parent}, and encode again"
  record = store.read_json(path, fix)
  with store.damage_of(path, fix):
    checksum = record.pop(CHECKSUM, None)  # earlier versions wrote none
    if checksum not in (None, store.crc32_of_json(record)):
      raise ValueError("it has changed since it was written")
    record["description"].keys()
    for split in SPLITS:
      entry = record["splits"][split]
      numbers = [type(number) for number in (entry["done"], *entry["crc32"])]
      if numbers not in ([int] * 4, [int] * 3):  # earlier versions wrote no checksums of rows
        raise ValueError("the splits' entries are no numbers")
  return record


class LatentWriter:
  """Writer of one directory, split after split, that resumes where it was stopped.

  `is_complete` is set if nothing is left to do.
  """

  def __init__(
    self, directory: pathlib.Path, description: dict[str, Any], num_examples: dict[str, int]
  ):
    """Make the directory or resume it; raise UserError if it holds something else.

    `description` is the later manifest, as JSON; its "latent_shape" is [copies, 2, h, w, c].
    `num_examples` has the rows of each split.
    """
    self.directory, self._num_examples = directory, num_examples
    directory.mkdir(parents=True, exist_ok=True)
    progress = _read_record(directory / "progress.json")
    found = progress or _read_record(directory / "manifest.json")
    self.is_complete = progress is None and found is not None
    if found is not None:
      fix = "use another directory, or delete it and encode again"
      store.check_same(f"{directory} holds other latents", description, found["description"], fix)
    else:
      own = ("progress.json.tmp", lock_path(directory, "encode").name)
      if any(path.name not in own for path in directory.iterdir()):
        raise UserError(f"{directory} is not empty and holds no latents: use another --output")
      fresh = {split: {"done": 0, "crc32": [0, 0, 0]} for split in num_examples}
      found = {"description": description, "splits": fresh}
      store.write_json(directory / "progress.json", found)
    self._progress = found

  def num_done(self, split: str) -> int:
    """Return the number of a split's rows that are safely written."""
    return self._progress["splits"][split]["done"]

  @contextlib.contextmanager
  def open_split(self, split: str) -> Iterator[tuple[store.RowFile, ...]]:
    """Open the files of a split, ready for `append_rows` of the next row."""
    entry, shape = self._progress["splits"][split], self._progress["description"]["latent_shape"]
    files = _row_files(self.directory, split, self._num_examples[split], entry, shape)
    with contextlib.ExitStack() as opened:
      for file, crc32 in zip(files, entry["crc32"], strict=True):
        opened.callback(file.close)
        file.open(entry["done"], crc32)
      yield files

  def keep(self, split: str, files: tuple[store.RowFile, ...]) -> None:
    """Make the rows written so far safe against a kill."""
    for file in files:
      file.sync()
    crc32 = [file.crc32 for file in files]
    self._progress["splits"][split] = {"done": files[0].num_rows, "crc32": crc32}
    store.write_json(self.directory / "progress.json", self._progress)

  def finish(self) -> None:
    """Turn the progress into the manifest."""
    checksum = {CHECKSUM: store.crc32_of_json(self._progress)}
    store.write_json(self.directory / "manifest.json", self._progress | checksum)
    (self.directory / "progress.json").unlink()


def read_manifest(directory: str) -> dict[str, Any]:
  """Return the manifest of a directory; raise UserError if it is missing, unfinished or damaged."""
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
  """Return a memory-mapped split; raise UserError unless the directory is finished and whole."""
  manifest, path = read_manifest(directory), pathlib.Path(directory)
  with store.damage_of(path, f"delete {path}, and encode again"):
    description, entry = manifest["description"], manifest["splits"][split]
    if {type(size) for size in description["latent_shape"]} != {int}:
      raise ValueError("its latent_shape is no shape")
    # Mapped, as a damaged header may ask for any amount of memory.
    shape, count = description["latent_shape"], entry["done"]
    kinds = {"": ((count, *shape), "<f4"), "_labels": ((count,), "<i4")}
    if len(entry["crc32"]) > len(kinds):
      kinds["_checksums"] = ((count, shape[0]), "<u4")
    arrays = {part: np.load(path / f"{split}{part}.npy", mmap_mode="r") for part in kinds}
    if {part: (array.shape, array.dtype.str) for part, array in arrays.items()} != kinds:
      raise ValueError("its files have other shapes than the manifest says")
    rows = arrays.pop("")
    read = {part: np.array(array) for part, array in arrays.items()}
    for (part, array), crc32 in zip(read.items(), entry["crc32"][1:], strict=True):
      if zlib.crc32(array) != crc32:
        raise ValueError(f"{split}{part}.npy has changed since it was written")
    encoding = {"vae": description["vae_digest"], "crc32": entry["crc32"][:2]}
    fingerprint = description["sources"][split] | encoding
    rows._mmap.madvise(mmap.MADV_RANDOM)  # Reading ahead in the file would be wasted.
    vae_config = vae_weights.parse_config(description["vae_config"], path / "manifest.json")
    if "_checksums" in read:
      rows = CheckedRows(rows, read["_checksums"], str(path / f"{split}.npy"))
    return LatentSource(rows, read["_labels"], description["num_classes"], fingerprint, vae_config)


def verify(directory: pathlib.Path) -> None:
  """Read a finished directory to its last byte, and raise UserError if it is damaged."""
  manifest = read_manifest(str(directory))
  for split in SPLITS:
    open_latents(str(directory), split)
    entry, shape = manifest["splits"][split], manifest["description"]["latent_shape"]
    files = _row_files(directory, split, entry["done"], entry, shape)
    for file, crc32 in zip(files, entry["crc32"], strict=True):
      file.verify(entry["done"], crc32)
