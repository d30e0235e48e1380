import dataclasses
import json
import zlib

import jax
import numpy as np
import pytest

from lrdit.data import latents
from lrdit.experiment import Experiment
from lrdit.model import vae_weights
from lrdit.model.vae import VaeConfig
from lrdit.pretrained import open_run
from lrdit.runtime.errors import UserError
from tests import latent_runs

COUNTS = {"train": 7, "eval": 3}
VAE = VaeConfig(
  block_out_channels=(8, 16), layers_per_block=1, scaling_factor=0.25, shift_factor=0.5
)
DESCRIPTION = {
  "format": 1,
  "sources": {split: {"name": "npz", "num_examples": n} for split, n in COUNTS.items()},
  "num_classes": 3,
  "latent_shape": [2, 2, 2, 3, 4],
  "vae_digest": "abc",
  "vae_config": dataclasses.asdict(VAE),
}


FILES = [f"{split}{part}.npy" for split in COUNTS for part in ("", "_labels", "_checksums")]


def moments(split):
  shape = (COUNTS[split], *DESCRIPTION["latent_shape"])
  return np.random.default_rng(len(split)).normal(size=shape).astype(np.float32)


def labels(split):
  return np.arange(COUNTS[split], dtype=np.int32) % 3


def write_rows(writer, split, start, end):
  """Write a split's rows from `start` and keep them."""
  assert writer.num_done(split) == start
  with writer.open_split(split) as files:
    append(files, split, start, end)
    writer.keep(split, files)


def append(files, split, start, end):
  latents.append_rows(files, moments(split)[start:end], labels(split)[start:end])


def write(directory, sittings=((0, 7),), description=DESCRIPTION):
  """A finished directory, written with a new writer for each (start, end) of train."""
  for start, end in sittings:
    writer = latents.LatentWriter(directory, description, COUNTS)
    write_rows(writer, "train", start, end)
  write_rows(writer, "eval", 0, 3)
  writer.finish()
  return directory


def contents(directory):
  return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def directory(tmp_path):
  return write(tmp_path / "latents")


def test_what_is_written_is_plain_npy_with_checksums(directory):
  manifest = json.loads((directory / "manifest.json").read_text())
  assert manifest["description"] == json.loads(json.dumps(DESCRIPTION))
  for split, count in COUNTS.items():
    rows = np.load(directory / f"{split}.npy")
    numbers = np.load(directory / f"{split}_labels.npy")
    np.testing.assert_array_equal(rows, moments(split))
    np.testing.assert_array_equal(numbers, labels(split))
    assert (rows.dtype, numbers.dtype) == (np.float32, np.int32)
    checksums = np.load(directory / f"{split}_checksums.npy")
    copies = [[zlib.crc32(copy.tobytes()) for copy in row] for row in rows]
    np.testing.assert_array_equal(checksums, copies)
    crcs = [zlib.crc32(array.tobytes()) for array in (rows, numbers, checksums)]
    assert manifest["splits"][split] == {"done": count, "crc32": crcs}
  assert {p.name for p in directory.iterdir()} == {
    *(f"{split}{part}.npy" for split in COUNTS for part in ("", "_labels", "_checksums")),
    "manifest.json",
  }
  latents.verify(directory)


def test_gather_scales_and_takes_the_copy_that_flip_asks_for(directory):
  source = latents.open_latents(str(directory), "train")
  assert (len(source), source.image_shape, source.num_classes) == (7, (2, 3, 4), 3)
  index, flip = np.array([5, 0, 5, 2]), np.array([False, True, True, False])
  got = source.gather(index, flip)
  mean, log_variance = moments("train")[[5, 0, 5, 2], [0, 1, 1, 0]].swapaxes(0, 1)
  np.testing.assert_allclose(got["image"], (mean - 0.5) * 0.25, rtol=1e-6)
  np.testing.assert_allclose(got["std"], np.sqrt(np.exp(log_variance)) * 0.25, rtol=1e-6)
  np.testing.assert_array_equal(got["label"], [2, 0, 2, 2])
  assert got["image"].dtype == got["std"].dtype == np.float32
  assert not np.allclose(got["image"][0], got["image"][2])


def test_the_first_classes_are_rows_of_the_same_file(directory):
  whole = latents.open_latents(str(directory), "train")
  kept = whole.first_classes(2)
  flip = np.array([True, False, True, False, True])
  got, expected = kept.gather(np.arange(5), flip), whole.gather(np.array([0, 1, 3, 4, 6]), flip)
  for name in ("image", "std", "label"):
    np.testing.assert_array_equal(got[name], expected[name])
  assert (len(kept), kept.num_classes, kept.image_shape) == (5, 2, (2, 3, 4))
  assert kept.fingerprint != whole.fingerprint
  assert json.loads(json.dumps(kept.fingerprint)) == kept.fingerprint


def test_the_fingerprint_covers_vae_source_and_contents(directory, tmp_path):
  fingerprint = latents.open_latents(str(directory), "train").fingerprint
  again = write(tmp_path / "again")
  assert latents.open_latents(str(again), "train").fingerprint == fingerprint
  assert fingerprint | DESCRIPTION["sources"]["train"] | {"vae": "abc"} == fingerprint
  other = write(tmp_path / "other", description=DESCRIPTION | {"vae_digest": "abd"})
  assert latents.open_latents(str(other), "train").fingerprint != fingerprint


def of_an_earlier_version(directory, record):
  """Turn a directory into one that has no checksums of its rows."""
  path = directory / record
  found = json.loads(path.read_text())
  found.pop("crc32", None)
  for split, entry in found["splits"].items():
    entry["crc32"].pop()
    (directory / f"{split}_checksums.npy").unlink(missing_ok=True)
  path.write_text(json.dumps(found))
  return directory


def test_a_row_that_changed_is_never_read(directory):
  source = latents.open_latents(str(directory), "train")
  index = np.arange(7)
  with (directory / "train.npy").open("r+b") as file:
    file.seek(128 + 3 * moments("train")[0].nbytes + 5)  # the first copy of row 3
    file.write(b"\x01")
  match = r"row 3 of .*train\.npy has changed since it was written: delete"
  with pytest.raises(UserError, match=match):
    source.gather(index, np.zeros(7, bool))
  with pytest.raises(UserError, match=match):
    latents.open_latents(str(directory), "train").first_classes(2).gather(index[:3], index[:3] < 0)
  source.gather(index, np.ones(7, bool))
  of_an_earlier_version(directory, "manifest.json")
  latents.open_latents(str(directory), "train").gather(index, np.zeros(7, bool))


def test_latents_of_an_earlier_version_open_and_go_on_without_checksums(directory, tmp_path):
  found = latents.open_latents(str(directory), "train").fingerprint
  old = tmp_path / "old"
  write_rows(latents.LatentWriter(old, DESCRIPTION, COUNTS), "train", 0, 2)
  write(of_an_earlier_version(old, "progress.json"), ((2, 7),))
  assert {*contents(directory)} - {*contents(old)} == {
    "train_checksums.npy",
    "eval_checksums.npy",
  }
  latents.verify(old)
  assert latents.open_latents(str(old), "train").fingerprint == found


def test_several_sittings_write_the_same_bytes_as_one(directory, tmp_path):
  again = write(tmp_path / "again", ((0, 2), (2, 6), (6, 7)))
  assert contents(again) == contents(directory)


def test_rows_that_were_not_kept_are_cut_off(directory, tmp_path):
  """A write that tore, or that no later row would cover."""
  torn = tmp_path / "torn"
  writer = latents.LatentWriter(torn, DESCRIPTION, COUNTS)
  write_rows(writer, "train", 0, 2)
  with writer.open_split("train") as files:
    append(files, "train", 2, 6)
  for name in ("train.npy", "train_labels.npy"):
    with (torn / name).open("ab") as file:
      file.write(b"torn" * 999)
  with latents.LatentWriter(torn, DESCRIPTION, COUNTS).open_split("train"):
    pass
  header = (directory / "train.npy").read_bytes()[:128]
  kept = moments("train")[:2].tobytes()
  assert (torn / "train.npy").read_bytes() == header + kept
  write(torn, ((2, 7),))
  assert contents(torn) == contents(directory)


def test_a_file_shorter_than_its_progress_is_refused(tmp_path):
  write_rows(latents.LatentWriter(tmp_path, DESCRIPTION, COUNTS), "train", 0, 2)
  for size in ((tmp_path / "train.npy").stat().st_size - 1, 0):
    with (tmp_path / "train.npy").open("r+b") as file:
      file.truncate(size)
    with pytest.raises(UserError, match="has lost data"):
      latents.LatentWriter(tmp_path, DESCRIPTION, COUNTS).open_split("train").__enter__()


def test_a_kill_before_the_progress_is_removed_only_needs_to_finish(directory, tmp_path):
  killed = write(tmp_path / "killed")
  (killed / "progress.json").write_bytes((killed / "manifest.json").read_bytes())
  with pytest.raises(UserError, match="unfinished"):
    latents.open_latents(str(killed), "train")
  writer = latents.LatentWriter(killed, DESCRIPTION, COUNTS)
  assert not writer.is_complete
  assert [writer.num_done(split) for split in COUNTS] == [7, 3]
  writer.finish()
  assert contents(killed) == contents(directory)


def test_a_finished_directory_is_recognized(directory):
  writer = latents.LatentWriter(directory, DESCRIPTION, COUNTS)
  assert writer.is_complete
  assert writer.num_done("train") == 7


def test_a_directory_with_anything_else_is_left_alone(tmp_path):
  (tmp_path / "thesis.tex").write_text("precious")
  with pytest.raises(UserError, match="is not empty and holds no latents"):
    latents.LatentWriter(tmp_path, DESCRIPTION, COUNTS)
  assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_unfinished_directory_says_how_far_it_is(tmp_path):
  latents.LatentWriter(tmp_path, DESCRIPTION, COUNTS)
  with pytest.raises(UserError, match=r"unfinished \(0 train, 0 eval images so far\).*encode"):
    latents.open_latents(str(tmp_path), "train")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [0, 60, -1, 1])
def test_a_file_of_another_length_is_refused(directory, name, size):
  path = directory / name
  whole = path.read_bytes()
  path.write_bytes(whole + b"\0" if size == 1 else whole[: size if size >= 0 else len(whole) - 1])
  match = f"{name} has changed" if size == 1 else "is damaged"
  with pytest.raises(UserError, match=match):
    latents.verify(directory)


@pytest.mark.parametrize("name", FILES)
def test_verify_finds_one_flipped_bit(directory, name):
  path = directory / name
  data = bytearray(path.read_bytes())
  data[-5] ^= 1
  path.write_bytes(data)
  with pytest.raises(UserError, match=f"{name} has changed since it was written"):
    latents.verify(directory)


@pytest.mark.parametrize("name", ["manifest.json", "progress.json"])
@pytest.mark.parametrize("text", ["", '{"descr', "[]", "{}", '{"description": 3}', "7", "\x00\x00"])
def test_a_damaged_record_is_refused_in_one_line(directory, name, text):
  (directory / name).write_text(text)
  with pytest.raises(UserError, match=r"damaged"):
    latents.open_latents(str(directory), "train")
  with pytest.raises(UserError, match=r"damaged"):
    latents.LatentWriter(directory, DESCRIPTION, COUNTS)


@pytest.mark.parametrize(
  ("field", "value"),
  [("vae_digest", "other"), ("latent_shape", [1, 2, 2, 3, 4]), ("sources", {}), ("format", 2)],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_directory_of_something_else_is_refused(tmp_path, field, value, finished):
  if finished:
    write(tmp_path)
  else:
    latents.LatentWriter(tmp_path, DESCRIPTION, COUNTS)
  before = contents(tmp_path)
  with pytest.raises(UserError, match=f"holds other latents: {field}.*there"):
    latents.LatentWriter(tmp_path, DESCRIPTION | {field: value}, COUNTS)
  assert contents(tmp_path) == before


def test_images_may_be_encoded_as_they_are_read(tmp_path):
  """Mirrored images too: what is encoded is the mirrored image, not its latent."""
  images = latent_runs.write_images(tmp_path / "images.npz", 40)
  experiment = Experiment(latent_runs.make_config(images, vae__encode_on_the_fly=True))
  read, plain = experiment.source("train"), experiment.image_source("train")
  runner = experiment.vae_runner(latent_runs.one_device())
  assert (len(read), read.image_shape, read.num_classes) == (len(plain), (4, 4, 4), 10)
  assert read.fingerprint == plain.fingerprint | {"vae": runner.digest, "encoded": "on the fly"}
  index, flip = np.array([5, 2, 11]), np.array([False, True, True])
  got, pixels = read.gather(index, flip), plain.gather(index, flip)
  moments = runner.encode(pixels["image"])
  assert got["label"].tolist() == pixels["label"].tolist()
  np.testing.assert_allclose(got["image"], latent_runs.SCALE * moments[:, 0], rtol=1e-4, atol=1e-5)
  std = latent_runs.SCALE * np.exp(0.5 * moments[:, 1])
  np.testing.assert_allclose(got["std"], std, rtol=1e-4, atol=1e-6)


def test_one_vae_encodes_both_splits_and_decodes(tmp_path, monkeypatch):
  reads, read = [], vae_weights.read_vae
  monkeypatch.setattr(vae_weights, "read_vae", lambda path: reads.append(path) or read(path))
  images = latent_runs.write_images(tmp_path / "images.npz", 40)
  fields = dict(vae__encode_on_the_fly=True, training__num_steps=None, training__num_epochs=1)
  experiment, train = open_run(latent_runs.make_config(images, **fields))
  assert experiment.config.training.num_steps > 0
  held_out = experiment.source("eval")
  experiment.to_pixels(jax.devices(), train.fingerprint["vae"])
  assert train.runner is held_out.runner
  assert len(reads) == 1
