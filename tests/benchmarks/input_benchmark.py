"""How fast the input pipeline feeds a training step of zero cost.

python -m tests.benchmarks.input_benchmark pixels --data_dir=DIR   # prepared cifar10
python -m tests.benchmarks.input_benchmark latents --directory=DIR [--num_examples=1281167]

`latents` makes DIR with random numbers where it is not there yet (21 GB with mirrored
copies at ImageNet's size, 10.5 GB without), and prints the process's memory.
"""

import argparse
import pathlib
import time

import numpy as np

from lrdit.data import images, latents, pipeline, tfds
from lrdit.data.source import DataOptions, Source

BATCH_SIZE = 256
SHAPE = (2, 16, 16, 4)  # mean and log-variance of a 128x128 image
CHUNK = 4096


def images_per_second(source: Source, first_step: int, num_steps: int, flip: bool) -> float:
  """Reads whole batches and drops them."""
  slots = np.arange(BATCH_SIZE)[None]
  steps = range(first_step, first_step + num_steps)
  batches = pipeline.train_batches(source, 0, slots, BATCH_SIZE, steps, flip)
  start = time.perf_counter()
  count = sum(batch["image"].shape[1] for batch in batches)
  return count / (time.perf_counter() - start)


def memory_mib(field: str) -> float:
  """A figure of /proc/self/status in MiB: RssAnon is held, RssFile can be evicted."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def report_pixels(data_dir: str, num_epochs: int) -> None:
  """CIFAR-10: the first epoch decodes, later ones read what was kept."""
  options = DataOptions(data_dir, 32, 3, cache_bytes=1 << 32, skip_unreadable=False)
  source = tfds.load_tfds(tfds.DATASETS["cifar10"], "train", options)
  steps = len(source) // BATCH_SIZE
  for epoch in range(num_epochs):
    rate = images_per_second(source, epoch * steps, steps, flip=True)
    print(f"epoch {epoch}: {rate:,.0f} images of 32x32 a second")


def write_random_latents(directory: pathlib.Path, num_examples: int, copies: int) -> None:
  """A directory as `--mode=encode` writes it, of random numbers."""
  size = 128
  fingerprint = {"name": "imagenet2012", "crop": images.crop_name(0, size)}
  description = {
    "sources": dict.fromkeys(latents.SPLITS, fingerprint),
    "num_classes": 1000,
    "latent_shape": [copies, *SHAPE],
    "vae_digest": "random",
    "vae_config": {},
  }
  counts = {"train": num_examples, "eval": 1}
  writer = latents.LatentWriter(directory, description, counts)
  rng = np.random.default_rng(0)
  for split, count in counts.items():
    with writer.open_split(split) as files:
      for start in range(writer.num_done(split), count, CHUNK):
        rows = min(CHUNK, count - start)
        moments = rng.standard_normal((rows, copies, *SHAPE), np.float32)
        latents.append_rows(files, moments, rng.integers(0, 1000, rows))
      writer.keep(split, files)
  writer.finish()


def report_latents(directory: str, num_examples: int, copies: int, num_steps: int) -> None:
  """Random access over the whole file."""
  if not pathlib.Path(directory).exists():
    write_random_latents(pathlib.Path(directory), num_examples, copies)
  source = latents.open_latents(directory, "train")
  before = memory_mib("RssAnon")
  for part in range(3):
    rate = images_per_second(source, part * num_steps, num_steps, flip=copies == 2)
    print(
      f"{rate:,.0f} latents of 16x16x4 a second from {len(source):,}; memory held "
      f"{memory_mib('RssAnon'):,.0f} MiB ({before:,.0f} before), mapped from the file "
      f"{memory_mib('RssFile'):,.0f} MiB"
    )


def main() -> None:
  """Parses the command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("what", choices=["pixels", "latents"])
  parser.add_argument("--data_dir", default="")
  parser.add_argument("--directory", default="runs/random_latents")
  parser.add_argument("--num_examples", type=int, default=1_281_167)
  parser.add_argument("--copies", type=int, default=1, choices=[1, 2])
  parser.add_argument("--num_steps", type=int, default=1000)
  args = parser.parse_args()
  if args.what == "pixels":
    report_pixels(args.data_dir, num_epochs=3)
  else:
    report_latents(args.directory, args.num_examples, args.copies, args.num_steps)


if __name__ == "__main__":
  main()
