"""Images to latents, and training and sampling on them."""

import json
import shutil
import signal
import subprocess
import sys
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from configs import cifar10
from lrdit.config.resolve import resolve
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
from tests.trained import noisy_params

VAE = tiny.GOLDEN / "sd_vae_tiny"
SCALE = 0.18215  # of that VAE
KEY = jax.random.key(7)
NUM_IMAGES = 100


def write_images(path, count=NUM_IMAGES, seed=0):
  generator = np.random.default_rng(seed)
  images = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
  np.savez(path, image=images, label=np.arange(count) % 10)
  return path


def fields_for(images, **fields):
  """Overrides of configs/cifar10.py for the tiny model on the tiny VAE's latents."""
  return (
    tiny.OVERRIDES
    | {
      "data.name": "npz",
      "data.data_dir": str(images),
      "vae.downsample_factor": 8,
      "vae.path": str(VAE),
      "vae.batch_size": 8,
      "sampling.clip_x_0": False,
      "optimizer.warmup_steps": 0,
    }
    | {name.replace("__", "."): value for name, value in fields.items()}
  )


def make_config(images, **fields):
  config = cifar10.get_config().unlock()
  for field, value in fields_for(images, **fields).items():
    config.update_from_flattened_dict({field: value})
  return resolve(config)


def command(mode, images, *flags, **fields):
  given = [f"--config.{name}={value}" for name, value in fields_for(images, **fields).items()]
  return [
    sys.executable,
    "main.py",
    "--config=configs/cifar10.py",
    f"--mode={mode}",
    *given,
    *flags,
  ]


def run(arguments):
  return subprocess.run(
    arguments,
    cwd=tiny.ROOT,
    env=tiny.environment(),
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )


def assert_refused(arguments, message):
  """Fails with one line, as every mistake of the user does."""
  done = run(arguments)
  assert done.returncode == 1, done.stderr
  assert "Traceback" not in done.stderr
  last = done.stderr.rstrip().splitlines()[-1]
  assert last.startswith("error: ")
  assert message in last


def contents(directory):
  return {path.name: path.read_bytes() for path in directory.iterdir()}


def one_device():
  return jax.devices()[:1]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  return write_images(tmp_path_factory.mktemp("images") / "images.npz")


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, images):
  """Latents with mirrored copies."""
  directory = tmp_path_factory.mktemp("latents") / "both"
  encode.encode(make_config(images), str(directory), one_device())
  return directory


@pytest.fixture(scope="module")
def other_vae(tmp_path_factory):
  """The tiny VAE with one number changed."""
  directory = tmp_path_factory.mktemp("vae") / "other"
  shutil.copytree(VAE, directory)
  path = directory / vae_weights.WEIGHTS_NAME
  tensors = safetensors.numpy.load_file(path)
  tensors["encoder.conv_in.bias"][0] += 1
  safetensors.numpy.save_file(tensors, path)
  return directory


@pytest.fixture(scope="module")
def other_encoded(tmp_path_factory, images, other_vae):
  """What the other VAE makes of the same images."""
  directory = tmp_path_factory.mktemp("latents") / "other"
  encode.encode(make_config(images, vae__path=str(other_vae)), str(directory), one_device())
  return directory


@pytest.fixture
def copy(encoded, tmp_path):
  return shutil.copytree(encoded, tmp_path / "copy")


def test_the_directory_holds_the_source_s_images_encoded(images, encoded):
  config = make_config(images)
  codec = vae_module.VaeRunner(vae_weights.read_vae(VAE), one_device(), 5)
  manifest = json.loads((encoded / "manifest.json").read_text())
  total = 0
  for split in ("train", "eval"):
    source = Experiment(config).image_source(split)
    batch = source.gather(np.arange(len(source)), np.zeros(len(source), bool))
    rows, labels = (np.load(encoded / f"{split}{part}.npy") for part in ("", "_labels"))
    assert (rows.shape, rows.dtype) == ((len(source), 2, 2, 4, 4, 4), np.float32)
    np.testing.assert_allclose(rows[:, 0], codec.encode(batch["image"]), atol=1e-5)
    mirrored = np.ascontiguousarray(batch["image"][:, :, ::-1])
    np.testing.assert_allclose(rows[:, 1], codec.encode(mirrored), atol=1e-5)
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
  assert description["vae_digest"] == codec.digest
  assert description["vae_config"]["scaling_factor"] == SCALE
  assert {p.name for p in encoded.iterdir()} == {
    "train.npy",
    "train_labels.npy",
    "eval.npy",
    "eval_labels.npy",
    "manifest.json",
  }


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


def test_what_training_reads_decodes_to_what_the_vae_makes_of_it(images, encoded):
  config = make_config(images, vae__latents_dir=str(encoded))
  source = Experiment(config).source("train")
  flip = np.arange(6) % 2 == 1
  got = source.gather(np.arange(6), flip)
  mean, log_variance = np.load(encoded / "train.npy")[np.arange(6), flip.astype(int)].swapaxes(0, 1)
  np.testing.assert_allclose(got["image"], mean * SCALE, rtol=1e-6)
  np.testing.assert_allclose(got["std"], np.exp(log_variance / 2) * SCALE, rtol=1e-6)
  codec = Experiment(config).vae_runner(one_device())
  to_pixels = Experiment(config).to_pixels(one_device(), codec.digest)
  pixels, are_finite = to_pixels(got["image"])
  assert are_finite.tolist() == [True] * 6
  expected = to_uint8(codec.decode(np.ascontiguousarray(mean)))
  assert (pixels.shape, pixels.dtype) == ((6, 32, 32, 3), np.uint8)
  assert np.abs(pixels.astype(int) - expected).max() <= 1
  assert pixels.std() > 0
  got["image"][1, 0, 0, 0], got["image"][4] = np.nan, np.inf
  assert np.flatnonzero(~to_pixels(got["image"])[1]).tolist() == [1, 4]


def first_batch(config, devices):
  """The run's first batch; the stored deviations are too small to see in a loss."""
  size = config.training.batch_size
  batches = pipeline.train_batches(
    Experiment(config).source("train"),
    config.seed,
    parallel.batch_slots(size, devices),
    size,
    range(1),
    config.data.flip,
  )
  batch = next(batches)
  return batch | {"std": batch["std"] + 0.5}


def losses_of(config, batch, devices):
  """(n, b) losses under the key."""
  objective = Experiment(config).objective(devices)
  made = parallel.pmap(lambda p, b, k: loss_module.batch_losses(p, objective, k, b)[0], devices)
  return np.asarray(made(parallel.replicate(noisy_params(config), devices), batch, KEY))


def test_training_draws_from_the_posterior_by_the_global_index(images, encoded):
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
  draws = loss_module.draw_step_noise(KEY, jnp.arange(16), (4, 4, 4), objective)
  noise = np.asarray(draws.posterior_noise)
  drawn = plain | {"image": batch["image"] + batch["std"] * noise[None]}
  np.testing.assert_allclose(
    by_layout[1], losses_of(config, drawn, one_device()).reshape(-1), rtol=1e-5
  )
  assert (np.abs(by_layout[1] - without.reshape(-1)) > 1e-4).all()
  assert abs(np.corrcoef(noise.reshape(-1), np.asarray(draws.eps).reshape(-1))[0, 1]) < 0.15


def test_encoding_goes_on_without_doing_anything_twice(monkeypatch, images, encoded, tmp_path):
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
  monkeypatch.setattr(
    vae_module.VaeRunner, "encode", fails_at(10)
  )  # in the fifth batch, its mirror
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
  raise AssertionError("ended, or never came so far")


def test_a_killed_command_resumes_to_the_byte(tmp_path):
  images = write_images(tmp_path / "many.npz", 2500)
  output = tmp_path / "killed"
  encoding = command("encode", images, f"--output={output}")
  process = subprocess.Popen(
    encoding, cwd=tiny.ROOT, env=tiny.environment(), stderr=subprocess.DEVNULL
  )
  wait_for_rows(process, output, 1024)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  assert not (output / "manifest.json").exists(), "killed too late to test anything"
  done = json.loads((output / "progress.json").read_text())["splits"]["train"]["done"]
  for name in ("train.npy", "train_labels.npy"):
    with (output / name).open("ab") as file:
      file.write(b"a write that tore")
  workdir = tmp_path / "run"
  training = command("train", images, f"--workdir={workdir}", f"--config.vae.latents_dir={output}")
  assert_refused(training, f"are unfinished ({done} train, 0 eval images so far)")
  assert not workdir.exists()
  resumed = run(encoding)
  assert resumed.returncode == 0, resumed.stderr
  assert f"train: {done} of" in resumed.stderr
  undisturbed = tmp_path / "undisturbed"
  assert run(command("encode", images, f"--output={undisturbed}")).returncode == 0
  assert contents(output) == contents(undisturbed)


def test_a_full_disk_raises_one_line_and_encoding_goes_on(images, encoded, tmp_path):
  output = tmp_path / "full"
  encoding = command("encode", images, f"--output={output}")
  # Room for the progress and the labels, not for all latents.
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
  message = "train.npy has changed since it was written"
  assert_refused(command("encode", images, f"--output={copy}"), message)


@pytest.mark.parametrize("other", ["vae", "images", "flip", "classes"])
def test_a_directory_of_something_else_is_not_written_over(
  images, other_vae, copy, tmp_path, other
):
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
  for data_dir, message in ((changed, "are of other images: digest is"), (images, None)):
    config = make_config(data_dir, vae__latents_dir=str(copy))
    if message:
      with pytest.raises(UserError, match=message):
        Experiment(config).source("train")
    else:
      assert len(Experiment(config).source("train")) > 0
  # Latents are trained on where the images are not.
  config = make_config(tmp_path / "gone.npz", vae__latents_dir=str(copy))
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
  """A run of four steps on latents, without a VAE: it draws no grids."""
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
  assert (trained / "metrics.jsonl").read_bytes().startswith(before), "began anew"
  assert (trained / "samples" / "step_00000006.png").exists()
  done = run(command("sample", images, f"--workdir={trained}", data__data_dir=""))
  assert done.returncode == 0, done.stderr
  with np.load(trained / "samples" / "default" / "samples.npz") as arrays:
    samples, labels = arrays["arr_0"], arrays["arr_1"]
  assert (samples.shape, samples.dtype) == ((10, 32, 32, 3), np.uint8)
  assert labels.tolist() == list(range(10))
  assert samples.std(axis=0).mean() > 0


def test_sampling_needs_the_vae_of_the_latents(images, other_vae, trained):
  sampling = command("sample", images, f"--workdir={trained}", vae__path="")
  assert_refused(sampling, "config.vae.path='' must name the VAE")
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


def test_a_run_is_kept_to_its_latents(images, other_encoded, trained):
  before = (trained / "data.json").read_bytes()
  config = make_config(images, vae__latents_dir=str(other_encoded), vae__path="")
  with pytest.raises(UserError, match=r"holds a run on other data: .*train\.vae"):
    train.train(config, str(trained), one_device())
  assert (trained / "data.json").read_bytes() == before


def test_a_directory_that_is_being_written_is_left_to_its_process(images, tmp_path, monkeypatch):
  monkeypatch.setattr(encode, "_encode_into", lambda *_: None)
  with owned(tmp_path, "encode"):
    with pytest.raises(UserError, match=r"is in use by process \d+"):
      encode.encode(make_config(images), str(tmp_path), one_device())
    # What a killed process leaves is no reason to refuse an empty directory.
    latents_module.LatentWriter(
      tmp_path, {"latent_shape": [1, 2, 4, 4, 4]}, {"train": 1, "eval": 1}
    )
  encode.encode(make_config(images), str(tmp_path), one_device())
