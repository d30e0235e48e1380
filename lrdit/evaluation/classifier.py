"""The extractor "classifier": a small network, trained on the dataset itself and kept.

Axes: B images, H W image, h w image after a stage, C channels, K classes,
D_in and D channels of a stage's input and output, D features.
"""

import dataclasses
import functools
import logging
import pathlib
import time
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float32, Key, UInt8

from lrdit.data import pipeline
from lrdit.data.images import to_uint8
from lrdit.data.source import Source
from lrdit.evaluation.features import Extracted, check_size, digest_of, read_images
from lrdit.evaluation.metrics import recognition_accuracy
from lrdit.runtime import parallel, store
from lrdit.runtime.errors import UserError
from lrdit.runtime.progress import make_bar

FIRST_WIDTH = 32  # channels of the first stage
MIN_FEATURES, MAX_FEATURES = 128, 256  # channels of the last stage
FIRST_SIZE, LAST_SIZE = 32, 4  # largest widths, in pixels, of the first and the last stage
NORM_GROUPS = 8
WEIGHTS, RECORD = "classifier.npz", "classifier.json"

log = logging.getLogger("lrdit")


class _Block(nn.Module):
  """Two normalised 3x3 convolutions and a residual connection."""

  width: int
  stride: int

  @nn.compact
  def __call__(self, x: Float32[Array, "B H W D_in"]) -> Float32[Array, "B h w D"]:
    conv = functools.partial(nn.Conv, self.width, use_bias=False, precision="highest")
    norm = functools.partial(nn.GroupNorm, NORM_GROUPS)
    y = nn.relu(norm()(conv((3, 3), strides=self.stride)(x)))
    y = norm()(conv((3, 3))(y))
    if x.shape != y.shape:
      x = norm()(conv((1, 1), strides=self.stride)(x))
    return nn.relu(x + y)


def _widths(size: int) -> list[int]:
  """Return the width of each stage; each halves the `size` pixels of the one before."""
  widths = [FIRST_WIDTH]
  while size > LAST_SIZE or widths[-1] < MIN_FEATURES:
    size = -(-size // 2)
    widths.append(min(2 * widths[-1], MAX_FEATURES))
  return widths


class ClassifierNetwork(nn.Module):
  """A small residual convolutional network (He et al. 2016) with group normalization.

  `image_size`, the height and width, determines the stages. The stem strides over larger images, so
  that the first stage has about 32 pixels.
  """

  image_size: int
  num_classes: int

  @property
  def num_features(self) -> int:
    """Return D."""
    return _widths(-(-self.image_size // self._stem_stride))[-1]

  @property
  def _stem_stride(self) -> int:
    return max(1, self.image_size // FIRST_SIZE)

  @nn.compact
  def __call__(
    self, x: Float32[Array, "B H W C"]
  ) -> tuple[Float32[Array, "B D"], Float32[Array, "B K"]]:
    """Return the averaged features (B, D) and the logits (B, K) of images in [-1, 1]."""
    stride = self._stem_stride
    window = (2 * stride + 1,) * 2
    x = nn.Conv(FIRST_WIDTH, window, strides=stride, use_bias=False, precision="highest")(x)
    x = nn.relu(nn.GroupNorm(NORM_GROUPS)(x))
    for i, width in enumerate(_widths(x.shape[1])):
      x = _Block(width, stride=1 if i == 0 else 2)(x)
    features = x.mean(axis=(1, 2))
    return features, nn.Dense(self.num_classes, precision="highest")(features)


@dataclasses.dataclass(frozen=True)
class ClassifierSettings:
  """Training settings of the classifier, which runs must share to be compared.

  Attributes:
    seed: of weights, order and augmentation.
    learning_rate: peak of the cosine schedule, after a tenth of the steps.
    weight_decay: AdamW's.
    flip: mirror images left to right with probability one half.
  """

  seed: int
  num_steps: int
  batch_size: int = 64
  learning_rate: float = 3e-3
  weight_decay: float = 0.01
  flip: bool = False


def default_num_steps(num_examples: int, batch_size: int) -> int:
  """Return the steps of about 20 epochs, between 400 and 20,000."""
  return min(max(20 * num_examples // batch_size, 400), 20_000)


def _to_network(images: UInt8[Array, "B H W C"]) -> Float32[Array, "B H W C"]:
  return images.astype(jnp.float32) / 127.5 - 1.0


def _shifted(images: UInt8[Array, "B H W C"], key: Key[Array, ""]) -> UInt8[Array, "B H W C"]:
  """Move each image by up to an eighth of its size, and repeat its edge."""
  batch, height, width, channels = images.shape
  margin = max(1, height // 8)
  padded = jnp.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)), "edge")
  starts = jax.random.randint(key, (batch, 2), 0, 2 * margin + 1)

  def crop(image, start):
    return jax.lax.dynamic_slice(image, (start[0], start[1], 0), (height, width, channels))

  return jax.vmap(crop)(padded, starts)


def _train(source: Source, settings: ClassifierSettings, network: ClassifierNetwork) -> Any:
  """Return trained parameters, which on a CPU depend to the bit on the arguments alone."""
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, settings.learning_rate, settings.num_steps // 10, settings.num_steps
  )
  optimizer = optax.adamw(schedule, weight_decay=settings.weight_decay)
  init_key, key = jax.random.split(jax.random.key(settings.seed))
  example = jnp.zeros((1, *source.image_shape), jnp.float32)
  params = jax.jit(network.init)(init_key, example)["params"]
  opt_state = optimizer.init(params)

  def loss(params, images, labels, key):
    _, logits = network.apply({"params": params}, _to_network(_shifted(images, key)))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, opt_state, images, labels, key):
    gradients = jax.grad(loss)(params, images, labels, key)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  slots, steps = np.arange(settings.batch_size)[None], range(settings.num_steps)
  batches = pipeline.train_batches(
    source, settings.seed, slots, settings.batch_size, steps, settings.flip
  )
  with make_bar(settings.num_steps, 0, "step") as bar:
    for number, batch in enumerate(batches):
      images, labels = to_uint8(batch["image"][0]), batch["label"][0]
      params, opt_state = step(params, opt_state, images, labels, jax.random.fold_in(key, number))
      bar.update(1)
  return jax.device_get(params)


def flatten(params: Any) -> dict[str, np.ndarray]:
  """Return the arrays of a parameter tree by path."""
  arrays = flax.traverse_util.flatten_dict(params, sep="/")
  return {path: np.asarray(array) for path, array in arrays.items()}


class ClassifierExtractor:
  """A classifier's penultimate layer as features, and its predictions."""

  name = "classifier"
  batch_size = 256

  def __init__(self, params: Any, image_size: int, num_channels: int, num_classes: int):
    """Prepare the network; raise UserError if weights are not finite."""
    network = ClassifierNetwork(image_size, num_classes)
    self.params, self.num_features = params, network.num_features
    self.held_out_accuracy: float | None = None
    self._image_size, self._num_channels = image_size, num_channels
    shape, weights = [image_size, image_size, num_channels], flatten(params)
    fix = f"delete {RECORD} where it is kept, to train it again"
    store.check_finite(f"the extractor {self.name!r}", weights, fix)
    description = {"extractor": self.name, "shape": shape, "num_classes": num_classes}
    self.digest = digest_of(description, weights)

    def apply(params, images):
      features, logits = network.apply({"params": params}, _to_network(images))
      return features, jnp.argmax(logits, axis=-1)

    self._apply = jax.jit(apply)

  def extract(self, images: UInt8[np.ndarray, "B H W 3"]) -> Extracted:
    """Return features and predictions.

    Batches are padded to one shape: the network compiles once, and an image's features do not
    depend on the number of others.
    """
    check_size(images, self.name, self._image_size)
    run = functools.partial(self._apply, self.params)
    batches = images[..., : self._num_channels], self.batch_size
    features, predictions = parallel.run_batches(run, *batches)
    return Extracted(features, predictions.astype(np.int32))


def train_classifier(
  source: Source, held_out: Source, settings: ClassifierSettings
) -> ClassifierExtractor:
  """Train a classifier on a dataset's own labelled training split, on the default device.

  The same arguments give the same weights on one kind of CPU. A GPU sums the gradients of
  convolutions in any order.
  """
  size, _, channels = source.image_shape
  if not source.num_classes:
    raise UserError(
      "the extractor 'classifier' is trained on labels, and the data has none: use the extractor "
      "'inception' or 'pixel'"
    )
  start = time.perf_counter()
  params = _train(source, settings, ClassifierNetwork(size, source.num_classes))
  extractor = ClassifierExtractor(params, size, channels, source.num_classes)
  batches = read_images(held_out, extractor.batch_size)
  pairs = [(extractor.extract(images).predictions, labels) for images, labels in batches]
  predicted, labels = (np.concatenate(part) for part in zip(*pairs, strict=True))
  extractor.held_out_accuracy = recognition_accuracy(predicted, labels)
  log.info(
    "classifier: %d steps on %d images in %.1f s; %.2f %% of %d held-out images recognized",
    settings.num_steps,
    len(source),
    time.perf_counter() - start,
    100 * extractor.held_out_accuracy,
    len(held_out),
  )
  return extractor


def open_classifier(
  directory: pathlib.Path, source: Source, held_out: Source, settings: ClassifierSettings
) -> ClassifierExtractor:
  """Return the classifier kept in a directory, or train and keep one.

  `directory` holds classifier.npz, the weights, and classifier.json, their digest, data and
  held-out accuracy. UserError is raised if these are damaged, or of other data or settings.
  """
  record_path = directory / RECORD
  description = {
    "format": 1,
    "data": {"train": source.fingerprint, "eval": held_out.fingerprint},
    "image_size": source.image_shape[0],
    "num_channels": source.image_shape[2],
    "num_classes": source.num_classes,
    "settings": dataclasses.asdict(settings),
  }

  def make() -> ClassifierExtractor:
    extractor = train_classifier(source, held_out, settings)
    store.save_arrays(directory / WEIGHTS, flatten(extractor.params))
    # The record is written last: weights without it do not count.
    kept = {"digest": extractor.digest, "held_out_accuracy": extractor.held_out_accuracy}
    store.write_json(record_path, description | kept)
    return extractor

  load = functools.partial(_load_classifier, directory, description)
  return store.load_or_make(record_path, "classifier", load, make)


def _load_classifier(directory: pathlib.Path, description: dict[str, Any]) -> ClassifierExtractor:
  record_path, weights_path = directory / RECORD, directory / WEIGHTS
  fix = f"delete {record_path} to train it again"
  record = store.read_json(record_path, fix)
  with store.damage_of(record_path, fix):
    digest, accuracy = record.pop("digest"), float(record.pop("held_out_accuracy"))
  what = f"{record_path} is of a classifier of something else"
  store.check_same(what, description, record, f"use another directory, or {fix}")
  shape = (description[name] for name in ("image_size", "num_channels", "num_classes"))
  with store.damage_of(weights_path, fix):
    params = flax.traverse_util.unflatten_dict(store.read_arrays(weights_path), sep="/")
    extractor = ClassifierExtractor(params, *shape)
  if extractor.digest != digest:
    raise store.StoreError(f"{weights_path} has other weights than {record_path} says", fix)
  extractor.held_out_accuracy = accuracy
  return extractor
