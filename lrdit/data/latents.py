"""A directory of VAE latents, written once in order and read at random, memory-mapped.

DIR/train.npy, DIR/eval.npy: (N, copies, 2, h, w, c) float32. Copy 1, if there is one, is of the
mirrored image; the axis of 2 holds mean and log-variance, unscaled.
DIR/train_labels.npy, DIR/eval_labels.npy: (N,) int32.
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
from jaxtyping import Bool, Float32, Int

from lrdit.data.source import Source
from lrdit.model import vae_weights
from lrdit.model.vae import VaeConfig, VaeRunner, scale_latents
from lrdit.runtime import store
from lrdit.runtime.errors import UserError
from lrdit.runtime.locks import lock_path

SPLITS = ("train", "eval")
CHECKSUM = "crc32"  # of the rest of the manifest


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
  directory: pathlib.Path, split: str, count: int, latent_shape: Sequence[int]
) -> tuple[store.RowFile, store.RowFile]:
  """Return the files of a split's latents and labels."""
  return tuple(
    store.RowFile(
      directory / f"{split}{part}.npy",
      shape,
      dtype,
      f"delete {directory}, and encode again",
      store.npy_header((count, *shape), dtype),
    )
    for part, shape, dtype in (("", tuple(latent_shape), "<f4"), ("_labels", (), "<i4"))
  )


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
      if numbers != [int] * 3:
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
      fresh = {split: {"done": 0, "crc32": [0, 0]} for split in num_examples}
      found = {"description": description, "splits": fresh}
      store.write_json(directory / "progress.json", found)
    self._progress = found

  def num_done(self, split: str) -> int:
    """Return the number of a split's rows that are safely written."""
    return self._progress["splits"][split]["done"]

  @contextlib.contextmanager
  def open_split(self, split: str) -> Iterator[tuple[store.RowFile, store.RowFile]]:
    """Open the files of a split's latents and labels, ready for the next row."""
    entry, shape = self._progress["splits"][split], self._progress["description"]["latent_shape"]
    files = _row_files(self.directory, split, self._num_examples[split], shape)
    with contextlib.ExitStack() as opened:
      for file, crc32 in zip(files, entry["crc32"], strict=True):
        opened.callback(file.close)
        file.open(entry["done"], crc32)
      yield files

  def keep(self, split: str, files: tuple[store.RowFile, store.RowFile]) -> None:
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
    rows, labels = (np.load(path / f"{split}{part}.npy", mmap_mode="r") for part in ("", "_labels"))
    kinds = [((entry["done"], *description["latent_shape"]), "<f4"), ((entry["done"],), "<i4")]
    if [(array.shape, array.dtype.str) for array in (rows, labels)] != kinds:
      raise ValueError("its files have other shapes than the manifest says")
    labels = np.array(labels)
    if zlib.crc32(labels) != entry["crc32"][1]:
      raise ValueError(f"{split}_labels.npy has changed since it was written")
    encoding = {"vae": description["vae_digest"], "crc32": entry["crc32"]}
    fingerprint = description["sources"][split] | encoding
    rows._mmap.madvise(mmap.MADV_RANDOM)  # Reading ahead in the file would be wasted.
    vae_config = vae_weights.parse_config(description["vae_config"], path / "manifest.json")
    return LatentSource(rows, labels, description["num_classes"], fingerprint, vae_config)


def verify(directory: pathlib.Path) -> None:
  """Read a finished directory to its last byte, and raise UserError if it is damaged."""
  manifest = read_manifest(str(directory))
  for split in SPLITS:
    open_latents(str(directory), split)
    entry, shape = manifest["splits"][split], manifest["description"]["latent_shape"]
    files = _row_files(directory, split, entry["done"], shape)
    for file, crc32 in zip(files, entry["crc32"], strict=True):
      file.verify(entry["done"], crc32)
