"""Encoding images to latents, and training and sampling on them."""

import json
import shutil
import signal
import subprocess
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from lrdit.data import latents as latents_module
from lrdit.data import pipeline
from lrdit.data.images import to_uint8
from lrdit.experiment import Experiment
from lrdit.model import vae as vae_module
from lrdit.model import vae_weights
from lrdit.modes import encode, sample, train
from lrdit.runtime import parallel
from lrdit.runtime.errors import UserError
from lrdit.runtime.locks import owned
from lrdit.train import loss as loss_module
from tests import tiny
from tests.latent_runs import (
  NUM_IMAGES,
  SCALE,
  VAE,
  command,
  make_config,
  one_device,
  run,
  write_images,
)
from tests.trained import noisy_params

KEY = jax.random.key(7)


def assert_refused(arguments, message):
  """Check that a command line fails with one line, like every user error."""
  done = run(arguments)
  assert done.returncode == 1, done.stderr
  assert "Traceback" not in done.stderr
  last = done.stderr.rstrip().splitlines()[-1]
  assert last.startswith("error: ")
  assert message in last


def contents(directory):
  return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  return write_images(tmp_path_factory.mktemp("images") / "images.npz")


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, images):
  """The latents of the images and of their mirrored copies."""
  directory = tmp_path_factory.mktemp("latents") / "both"
  encode.encode(make_config(images), str(directory), one_device())
  return directory


@pytest.fixture(scope="module")
def other_vae(tmp_path_factory):
  """The tiny VAE with one changed number."""
  directory = tmp_path_factory.mktemp("vae") / "other"
  shutil.copytree(VAE, directory)
  path = directory / vae_weights.WEIGHTS_NAME
  tensors = safetensors.numpy.load_file(path)
  tensors["encoder.conv_in.bias"][0] += 1
  safetensors.numpy.save_file(tensors, path)
  return directory


@pytest.fixture(scope="module")
def other_encoded(tmp_path_factory, images, other_vae):
  """The other VAE's latents of the same images."""
  directory = tmp_path_factory.mktemp("latents") / "other"
  encode.encode(make_config(images, vae__path=str(other_vae)), str(directory), one_device())
  return directory


@pytest.fixture
def copy(encoded, tmp_path):
  return shutil.copytree(encoded, tmp_path / "copy")


def test_the_directory_holds_the_latents_of_every_image(images, encoded):
  config = make_config(images)
  runner = vae_module.VaeRunner(vae_weights.read_vae(VAE), one_device(), 5)
  manifest = json.loads((encoded / "manifest.json").read_text())
  total = 0
  for split in ("train", "eval"):
    source = Experiment(config).image_source(split)
    batch = source.gather(np.arange(len(source)), np.zeros(len(source), bool))
    rows, labels = (np.load(encoded / f"{split}{part}.npy") for part in ("", "_labels"))
    assert (rows.shape, rows.dtype) == ((len(source), 2, 2, 4, 4, 4), np.float32)
    np.testing.assert_allclose(rows[:, 0], runner.encode(batch["image"]), atol=1e-5)
    mirrored = np.ascontiguousarray(batch["image"][:, :, ::-1])
    np.testing.assert_allclose(rows[:, 1], runner.encode(mirrored), atol=1e-5)
    np.testing.assert_array_equal(labels, batch["label"])
    assert labels.dtype == np.int32
    assert manifest["splits"][split]["done"] == len(source)
    assert manifest["splits"][split]["crc32"][0] == zlib.crc32(rows.tobytes())
    assert manifest["description"]["sources"][split] == source.fingerprint
    total += len(source)
  assert total == NUM_IMAGES
  description = manifest["description"]
  assert description["num_classes"] == 10
  assert description["latent_shape"] == [2, 2, 4, 4, 4]
  assert description["vae_digest"] == runner.digest
  assert description["vae_config"]["scaling_factor"] == SCALE
  arrays = {
    f"{split}{part}.npy" for split in ("train", "eval") for part in ("", "_labels", "_checksums")
  }
  described = {"manifest.json", "statistics.json", "round_trip.png"}
  assert {path.name for path in encoded.iterdir()} == arrays | described


def test_without_flip_there_is_one_copy_and_training_with_flip_is_refused(
  images, encoded, tmp_path
):
  output = tmp_path / "plain"
  plain = make_config(images, data__flip=False, vae__latents_dir=str(output))
  encode.encode(plain, str(output), one_device())
  rows = np.load(output / "train.npy")
  np.testing.assert_array_equal(rows, np.load(encoded / "train.npy")[:, :1])
  assert len(Experiment(plain).source("train")) == len(rows)
  flipping = make_config(images, vae__latents_dir=str(output))
  with pytest.raises(UserError, match=r"config\.data\.flip=True needs latents of the mirrored"):
    Experiment(flipping).source("train")


def test_training_reads_scaled_latents_that_decode_to_pixels(images, encoded):
  config = make_config(images, vae__latents_dir=str(encoded))
  source = Experiment(config).source("train")
  flip = np.arange(6) % 2 == 1
  got = source.gather(np.arange(6), flip)
  mean, log_variance = np.load(encoded / "train.npy")[np.arange(6), flip.astype(int)].swapaxes(0, 1)
  np.testing.assert_allclose(got["image"], mean * SCALE, rtol=1e-6)
  np.testing.assert_allclose(got["std"], np.exp(log_variance / 2) * SCALE, rtol=1e-6)
  runner = Experiment(config).vae_runner(one_device())
  to_pixels = Experiment(config).to_pixels(one_device(), runner.digest)
  pixels, are_finite = to_pixels(got["image"])
  assert are_finite.tolist() == [True] * 6
  expected = to_uint8(runner.decode(np.ascontiguousarray(mean)))
  assert (pixels.shape, pixels.dtype) == ((6, 32, 32, 3), np.uint8)
  assert np.abs(pixels.astype(int) - expected).max() <= 1
  assert pixels.std() > 0
  got["image"][1, 0, 0, 0], got["image"][4] = np.nan, np.inf
  assert np.flatnonzero(~to_pixels(got["image"])[1]).tolist() == [1, 4]


def first_batch(config, devices):
  """Return the run's first batch, with standard deviations large enough to change a loss."""
  size, source = config.training.batch_size, Experiment(config).source("train")
  slots = parallel.batch_slots(size, devices)
  arguments = (source, config.seed, slots, size, range(1), config.data.flip)
  batch = next(pipeline.train_batches(*arguments))
  return batch | {"std": batch["std"] + 0.5}


def losses_of(config, batch, devices):
  """Return the (n, b) losses under `KEY`."""
  objective = Experiment(config).objective(devices)
  made = parallel.pmap(lambda p, b, k: loss_module.batch_losses(p, objective, k, b)[0], devices)
  return np.asarray(made(parallel.replicate(noisy_params(config), devices), batch, KEY))


def test_training_samples_the_posterior_by_the_global_index(images, encoded):
  config = make_config(images, vae__latents_dir=str(encoded), method="full")
  by_layout = {}
  for count in (1, 4):
    devices = jax.devices()[:count]
    losses = losses_of(config, first_batch(config, devices), devices)
    slots = parallel.batch_slots(16, devices)
    by_layout[count] = losses.reshape(-1)[np.argsort(slots.reshape(-1))]
  np.testing.assert_allclose(by_layout[4], by_layout[1], rtol=1e-5)

  batch = first_batch(config, one_device())
  plain = {name: batch[name] for name in ("image", "label")}
  without = losses_of(config, plain, one_device())
  none = losses_of(config, batch | {"std": np.zeros_like(batch["std"])}, one_device())
  np.testing.assert_allclose(none, without, rtol=1e-6)
  objective = Experiment(config).objective(one_device())
  noises = loss_module.draw_step_noise(KEY, jnp.arange(16), (4, 4, 4), objective)
  noise = np.asarray(noises.posterior_noise)
  sampled = plain | {"image": batch["image"] + batch["std"] * noise[None]}
  expected = losses_of(config, sampled, one_device()).reshape(-1)
  np.testing.assert_allclose(by_layout[1], expected, rtol=1e-5)
  assert (np.abs(by_layout[1] - without.reshape(-1)) > 1e-4).all()
  assert abs(np.corrcoef(noise.reshape(-1), np.asarray(noises.eps).reshape(-1))[0, 1]) < 0.15


def test_encoding_resumes_without_repeating_work(monkeypatch, images, encoded, tmp_path):
  monkeypatch.setattr(encode, "KEEP_EVERY_IMAGES", 16)
  output, calls = tmp_path / "resumed", []
  original = vae_module.VaeRunner.encode

  def fails_at(number):
    def patched(self, batch):
      calls.append(len(batch))
      if len(calls) == number:
        raise OSError("pulled the plug")
      return original(self, batch)

    return patched

  config = make_config(images)
  # The tenth call encodes the mirrored fifth batch.
  monkeypatch.setattr(vae_module.VaeRunner, "encode", fails_at(10))
  with pytest.raises(OSError, match="pulled the plug"):
    encode.encode(config, str(output), one_device())
  progress = json.loads((output / "progress.json").read_text())
  assert [entry["done"] for entry in progress["splits"].values()] == [32, 0]
  calls.clear()
  monkeypatch.setattr(vae_module.VaeRunner, "encode", fails_at(0))
  encode.encode(config, str(output), one_device())
  assert sum(calls) == 2 * (NUM_IMAGES - 32)
  assert contents(output) == contents(encoded)
  calls.clear()
  encode.encode(config, str(output), one_device())
  assert not calls


def test_an_image_without_finite_latents_is_named(monkeypatch, images, tmp_path):
  whole = vae_module.VaeRunner.encode

  def broken(self, scans):
    encoded = whole(self, scans)
    encoded[2, 1] = np.inf
    return encoded

  monkeypatch.setattr(vae_module.VaeRunner, "encode", broken)
  with pytest.raises(UserError, match=r"latents of image 2 of the split train are not finite"):
    encode.encode(make_config(images), str(tmp_path), one_device())


def wait_for_rows(process, output, at_least):
  deadline = time.monotonic() + 60
  while time.monotonic() < deadline and process.poll() is None:
    if (output / "progress.json").exists():
      progress = json.loads((output / "progress.json").read_text())
      if progress["splits"]["train"]["done"] >= at_least:
        return
    time.sleep(0.002)
  raise AssertionError("the process ended or timed out first")


def test_a_killed_command_resumes_to_the_byte(tmp_path):
  images = write_images(tmp_path / "many.npz", 1800)
  output = tmp_path / "killed"
  encoding = command("encode", images, f"--output={output}")
  environment = tiny.environment(**tiny.READ_ONLY_CACHE)
  process = subprocess.Popen(encoding, cwd=tiny.ROOT, env=environment, stderr=subprocess.DEVNULL)
  wait_for_rows(process, output, 1024)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  assert not (output / "manifest.json").exists(), "the kill came too late"
  done = json.loads((output / "progress.json").read_text())["splits"]["train"]["done"]
  for name in ("train.npy", "train_labels.npy"):
    with (output / name).open("ab") as file:
      file.write(b"a write that tore")
  workdir = tmp_path / "run"
  training = make_config(images, vae__latents_dir=str(output))
  words = rf"are unfinished \({done} train, 0 eval images so far\)"
  with pytest.raises(UserError, match=words):
    train.train(training, str(workdir), one_device())
  assert not workdir.exists()
  resumed = run(encoding)
  assert resumed.returncode == 0, resumed.stderr
  assert f"train: {done} of" in resumed.stderr
  undisturbed = tmp_path / "undisturbed"
  assert run(command("encode", images, f"--output={undisturbed}")).returncode == 0
  assert contents(output) == contents(undisturbed)


def test_a_full_disk_raises_one_line_and_encoding_resumes(images, encoded, tmp_path):
  output = tmp_path / "full"
  encoding = command("encode", images, f"--output={output}")
  # There is room for the progress and the labels, but not for all latents.
  assert_refused(["prlimit", "--fsize=20000", *encoding], "make space, or write elsewhere")
  assert (output / "train.npy").stat().st_size == 20000
  with pytest.raises(UserError, match="unfinished"):
    Experiment(make_config(images, vae__latents_dir=str(output))).source("train")
  encode.encode(make_config(images), str(output), one_device())
  assert contents(output) == contents(encoded)


def test_encoding_again_checks_every_byte(images, copy):
  encode.encode(make_config(images), str(copy), one_device())
  path = copy / "train.npy"
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 0x10
  path.write_bytes(data)
  with pytest.raises(UserError, match=r"train\.npy has changed since it was written"):
    encode.encode(make_config(images), str(copy), one_device())


@pytest.mark.parametrize("other", ["vae", "images", "flip", "classes"])
def test_other_latents_are_not_overwritten(images, other_vae, copy, tmp_path, other):
  fields, field = {
    "vae": ({"vae__path": str(other_vae)}, "vae_digest"),
    "images": ({"data__data_dir": str(tmp_path / "other.npz")}, "sources"),
    "flip": ({"data__flip": False}, "latent_shape"),
    "classes": ({"data__num_classes": 5}, "num_classes"),
  }[other]
  write_images(tmp_path / "other.npz", seed=1)
  before = contents(copy)
  with pytest.raises(UserError, match=f"holds other latents: {field}.*there") as error:
    encode.encode(make_config(images, **fields), str(copy), one_device())
  assert "\n" not in str(error.value)
  assert contents(copy) == before


def cut(path, size):
  path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
  ("damage", "fields", "message"),
  [
    (shutil.rmtree, {}, "no latents under"),
    (lambda d: cut(d / "train.npy", 5000), {}, "is damaged"),
    (lambda d: cut(d / "eval.npy", 0), {}, "is damaged"),
    (lambda d: (d / "train_labels.npy").unlink(), {}, "is missing: delete"),
    (lambda d: cut(d / "manifest.json", 100), {}, "manifest.json is damaged"),
    (None, {"data__name": "folder"}, "are of other images: name is 'npz' there"),
    (None, {"data__name": "celeb_a"}, "are of other images: name is 'npz' there"),
    (None, {"data__image_size": 64}, "are of other images: crop is"),
    (None, {"vae__downsample_factor": 4}, r"have the shape \(4, 4, 4\), not \(8, 8, 4\)"),
    (None, {"data__num_classes": 11}, "does not fit the data 'npz': use 10"),
    (None, {"vae__latents_dir": ""}, "must name the directory that --mode=encode wrote"),
  ],
)
def test_training_refuses_latents_that_do_not_fit(images, copy, tmp_path, damage, fields, message):
  if damage:
    damage(copy)
  config = make_config(images, **{"vae__latents_dir": str(copy)} | fields)
  with pytest.raises(UserError, match=message):
    train.train(config, str(tmp_path / "run"), one_device())
  assert not (tmp_path / "run").exists()


def test_training_refuses_latents_of_images_that_have_changed_since(copy, images, tmp_path):
  changed = write_images(tmp_path / "changed.npz", seed=1)
  with pytest.raises(UserError, match="are of other images: digest is"):
    Experiment(make_config(changed, vae__latents_dir=str(copy))).source("train")
  # Training does not need the images themselves.
  for data_dir in (images, tmp_path / "gone.npz"):
    config = make_config(data_dir, vae__latents_dir=str(copy))
    assert len(Experiment(config).source("train")) > 0


def test_latents_of_a_folder_notice_a_changed_file(tmp_path):
  rng = np.random.default_rng(0)
  for split, count in (("train", 3), ("eval", 2)):
    (tmp_path / "images" / split).mkdir(parents=True)
    for i in range(count):
      pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
      Image.fromarray(pixels).save(tmp_path / "images" / split / f"{i}.png")
  fields = dict(data__name="folder", data__num_classes=0, sampling__guidance_scale=1.0)
  config = make_config(tmp_path / "images", **fields)
  encode.encode(config, str(tmp_path / "latents"), one_device())
  config = make_config(tmp_path / "images", vae__latents_dir=str(tmp_path / "latents"), **fields)
  assert len(Experiment(config).source("train")) == 3
  (tmp_path / "images" / "train" / "1.png").unlink()
  with pytest.raises(UserError, match="are of other images: digest is"):
    Experiment(config).source("train")
  assert len(Experiment(config).source("eval")) == 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory, images, encoded):
  """A run of four steps on latents, without a VAE or grids."""
  workdir = tmp_path_factory.mktemp("runs") / "run"
  config = make_config(
    images, vae__latents_dir=str(encoded), vae__path="", training__num_steps=4, data__data_dir=""
  )
  train.train(config, str(workdir), one_device())
  return workdir


def test_a_run_on_latents_trains_resumes_and_samples_pixels(images, encoded, trained):
  fields = dict(
    vae__latents_dir=str(encoded), training__sample_every_steps=6, training__eval_every_steps=6
  )
  before = (trained / "metrics.jsonl").read_bytes()
  train.train(make_config(images, training__num_steps=6, **fields), str(trained), one_device())
  lines = tiny.read_metrics(trained)
  assert [line["step"] for line in lines] == list(range(1, 7))
  assert np.isfinite([line["train/loss"] for line in lines]).all()
  assert np.isfinite(lines[-1]["eval/loss"])
  assert (trained / "metrics.jsonl").read_bytes().startswith(before), "training started over"
  assert (trained / "samples" / "step_00000006.png").exists()
  sample.sample(make_config(images, data__data_dir=""), str(trained), one_device())
  with np.load(trained / "samples" / "default" / "samples.npz") as arrays:
    samples, labels = arrays["arr_0"], arrays["arr_1"]
  assert (samples.shape, samples.dtype) == ((10, 32, 32, 3), np.uint8)
  assert labels.tolist() == list(range(10))
  assert samples.std(axis=0).mean() > 0


def test_sampling_needs_the_vae_of_the_latents(images, other_vae, trained):
  with pytest.raises(UserError, match=r"config\.vae\.path='' must name the VAE"):
    sample.sample(make_config(images, vae__path=""), str(trained), one_device())
  config = make_config(images, vae__path=str(other_vae), sampling__name="other")
  with pytest.raises(UserError, match=r"is another VAE .* than the one that made the latents"):
    sample.sample(config, str(trained), one_device())
  assert not (trained / "samples" / "other").exists()


def test_grids_need_the_vae_of_the_latents_before_the_first_step(
  images, encoded, other_vae, tmp_path
):
  fields = dict(vae__latents_dir=str(encoded), training__sample_every_steps=4)
  for path, message in (("", "must name the VAE"), (str(other_vae), "is another VAE")):
    config = make_config(images, vae__path=path, **fields)
    with pytest.raises(UserError, match=message):
      train.train(config, str(tmp_path / "run"), one_device())
  assert not (tmp_path / "run").exists()


def test_a_run_refuses_other_latents(images, other_encoded, trained):
  before = (trained / "data.json").read_bytes()
  config = make_config(images, vae__latents_dir=str(other_encoded), vae__path="")
  with pytest.raises(UserError, match=r"holds a run on other data: .*train\.vae"):
    train.train(config, str(trained), one_device())
  assert (trained / "data.json").read_bytes() == before


def test_a_directory_in_use_is_refused(images, tmp_path, monkeypatch):
  for name in ("_encode_into", "describe_latents"):
    monkeypatch.setattr(encode, name, lambda *_: None)
  with owned(tmp_path, "encode"):
    with pytest.raises(UserError, match=r"is in use by process \d+"):
      encode.encode(make_config(images), str(tmp_path), one_device())
    # What a killed process leaves behind does not block the next one.
    latents_module.LatentWriter(
      tmp_path, {"latent_shape": [1, 2, 4, 4, 4]}, {"train": 1, "eval": 1}
    )
  encode.encode(make_config(images), str(tmp_path), one_device())
