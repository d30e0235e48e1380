"""Files of data, weights and latents, as small as they may be."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil

import numpy as np
from PIL import Image

from lrdit.data import folder, latents, npz, tfds
from lrdit.model import tensor_files, vae_weights
from lrdit.model.vae import VaeConfig
from tests import image_files
from tests.fuzz.case import Target
from tests.latent_runs import VAE

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

INDEX = "m.safetensors.index.json"
SPLITS = {"train": 3, "test": 2}


def _tensors(*names: str) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  kinds = (np.float32, np.float16)
  return {n: rng.normal(size=(3, 4)).astype(kinds[i % 2]) for i, n in enumerate(names)}


def _sum(tensors: dict[str, np.ndarray]) -> float:
  return sum(float(np.asarray(tensor, np.float32).sum()) for tensor in tensors.values())


def make_safetensors(path: pathlib.Path) -> None:
  tensor_files.write_safetensors(path / "m.safetensors", _tensors("a", "b/c"), {"lrdit": "1"})


def read_safetensors(path: pathlib.Path) -> None:
  _sum(tensor_files.read_safetensors(path / "m.safetensors"))


def make_shards(path: pathlib.Path) -> None:
  shards = {"m-1-of-2.safetensors": ("a", "b"), "m-2-of-2.safetensors": ("c",)}
  for file, names in shards.items():
    tensor_files.write_safetensors(path / file, _tensors(*names), {})
  listed = {name: file for file, names in shards.items() for name in names}
  index = {"metadata": {"total_size": 200}, "weight_map": listed}
  (path / INDEX).write_text(json.dumps(index))


def read_shards(path: pathlib.Path) -> None:
  _sum(tensor_files.read_shards(path / INDEX))


def make_vae(path: pathlib.Path) -> None:
  for name in ("config.json", vae_weights.WEIGHTS_NAME):
    shutil.copy(VAE / name, path / name)


def make_npz(path: pathlib.Path) -> None:
  images = np.stack([image_files.pixels(i) for i in range(30)])
  np.savez(path / "d.npz", image=images, label=np.arange(30) % 3)


def read_npz(path: pathlib.Path) -> None:
  for split in ("train", "eval"):
    image_files.read(npz.load_npz(split, image_files.make_options(path / "d.npz", image_size=4)))


def make_folder(path: pathlib.Path) -> None:
  """Write an image of every format and of the kinds that are converted."""
  photograph = Image.fromarray(image_files.pixels(1, 12, 16))
  train, exif = path / "train", Image.Exif()
  exif[0x0112] = 6
  for kind in ("jpg", "webp", "bmp", "gif", "tif", "ppm"):
    image_files.save(train / f"a.{kind}", photograph, **({"exif": exif} if kind == "jpg" else {}))
  for name, compression in (("lzw", "tiff_lzw"), ("jpeg", "jpeg"), ("zip", "tiff_adobe_deflate")):
    image_files.save(train / f"{name}.tif", photograph, compression=compression)
  for name, mode in (("rgb", "RGB"), ("gray", "L"), ("bw", "1"), ("alpha", "RGBA")):
    image_files.save(train / f"{name}.png", photograph.convert(mode), exif=exif)
  image_files.save(train / "palette.png", image_files.palette_image(transparency=0))
  image_files.save(train / "deep.png", image_files.deep_grey())
  image_files.save(train / "moves.gif", photograph, save_all=True, append_images=[photograph])
  image_files.save(path / "eval" / "b.png", image_files.pixels(0))


def read_folder(path: pathlib.Path) -> None:
  image_files.read(folder.load_folder("train", image_files.make_options(path)))


def _prepare(path: pathlib.Path, file_format: str) -> None:
  import tensorflow_datasets as prepared

  f = prepared.features
  image = f.Image(shape=(32, 32, 3))
  features = {"id": f.Text(), "image": image, "label": f.ClassLabel(num_classes=10)}
  examples = {
    split: [
      (i, {"id": f"{split}{i}", "image": image_files.pixels(i, 32, 32), "label": i})
      for i in range(count)
    ]
    for split, count in SPLITS.items()
  }
  prepared.disable_progress_bar()
  prepared.dataset_builders.store_as_tfds_dataset(
    name="cifar10",
    version="3.0.2",
    features=f.FeaturesDict(features),
    data_dir=path,
    file_format=file_format,
    disable_shuffling=True,
    split_datasets=examples,
    download_config=prepared.download.DownloadConfig(num_shards=1),
  )


def read_tfds(path: pathlib.Path) -> None:
  for split in ("train", "eval"):
    options = image_files.make_options(path, image_size=16)
    image_files.read(tfds.load_tfds(tfds.DATASETS["cifar10"], split, options))


def make_latents(path: pathlib.Path) -> None:
  """Encode, or go on with it."""
  counts, shape = {"train": 3, "eval": 2}, [2, 2, 2, 3, 4]
  config = dataclasses.asdict(VaeConfig(block_out_channels=(8, 16), layers_per_block=1))
  sources = {split: {"name": "npz", "num_examples": n} for split, n in counts.items()}
  description = {"format": 1, "sources": sources, "num_classes": 3, "latent_shape": shape}
  description |= {"vae_digest": "abc", "vae_config": config}
  writer = latents.LatentWriter(path, description, counts)
  for split, count in counts.items():
    rows = np.arange(writer.num_done(split), count)
    if not len(rows):
      continue
    with writer.open_split(split) as files:
      zeros = np.zeros((len(rows), *shape), np.float32)
      latents.append_rows(files, zeros, rows.astype(np.int32))
      writer.keep(split, files)
  if not writer.is_complete:
    writer.finish()


def read_latents(path: pathlib.Path) -> None:
  """Open latents as training does, and then check them to the last byte."""
  for split in latents.SPLITS:
    source = latents.open_latents(str(path), split)
    rows = np.arange(len(source))
    source.gather(rows, rows % 2 == 0)
    source.first_classes(2)
  latents.verify(path)


TARGETS = {
  "safetensors": Target(make_safetensors, read_safetensors),
  "shards": Target(make_shards, read_shards),
  "vae": Target(make_vae, vae_weights.read_vae),
  "npz": Target(make_npz, read_npz),
  "images": Target(make_folder, read_folder, leave=("eval/*",)),
  "latents": Target(make_latents, read_latents),
}
for file_format in ("tfrecord", "array_record"):
  make = functools.partial(_prepare, file_format=file_format)
  TARGETS[file_format] = Target(make, read_tfds, needs="tensorflow_datasets")
