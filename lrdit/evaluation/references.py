"""What generated images are measured against: real images under an extractor.

Both are quantised alike (`images.to_uint8`) and read in batches of the extractor's
size, however they come, so the same images give the same figures to the last bit.

Axes: B images of a batch, N images in all, M of them whose features are kept, H W
image, D values of a feature.
"""

import dataclasses
import itertools
import json
import logging
import pathlib
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int, UInt8

from lrdit.data.source import Source
from lrdit.evaluation import metrics
from lrdit.evaluation.features import Extractor, read_images
from lrdit.runtime.errors import UserError
from lrdit.runtime.locks import owned
from lrdit.runtime.progress import make_bar
from lrdit.runtime.store import atomic_path, changes

# Images (B, H, W, 3) and labels (B,); the batches of a stream differ in B.
Batch = tuple[UInt8[np.ndarray, "_ _ _ 3"], Int[np.ndarray, " _"] | None]

# Of the choice of images whose features are kept.
SUBSET_SEED = 0

log = logging.getLogger("lrdit")


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
  """Real images under an extractor.

  Attributes:
    mean: (D,) of all N images.
    covariance: (D, D) of all N images, unbiased.
    features: (M, D) of a random choice of them, in random order.
    fingerprint: which images under which extractor, as JSON; see `describe`.
  """

  mean: Float64[np.ndarray, " D"]
  covariance: Float64[np.ndarray, "D D"]
  features: Float32[np.ndarray, "M D"]
  fingerprint: dict[str, Any]


def describe(source: Source, extractor: Extractor, max_features: int) -> dict[str, Any]:
  """The fingerprint of a reference, without reading an image.

  "data" is the source's own fingerprint, which names split and crop.
  """
  fingerprint = {
    "format": 1,
    "data": source.fingerprint,
    "image_shape": source.image_shape,
    "num_images": len(source),
    "num_features": min(max_features, len(source)),
    "extractor": {"name": extractor.name, "digest": extractor.digest},
  }
  return json.loads(json.dumps(fingerprint))  # as it will be read


def compute_reference(source: Source, extractor: Extractor, max_features: int) -> Reference:
  """Reads all images of a split once.

  Args:
    source: the split, of pixels.
    extractor: gives the features.
    max_features: keep the features of at most so many images.

  Raises:
    UserError: fewer images than the figures need.
  """
  _check_count("real", min(len(source), max_features))
  order = np.random.default_rng(SUBSET_SEED).permutation(len(source))
  slot = np.argsort(order)  # where an image stands in the random order
  kept = np.empty((min(max_features, len(source)), extractor.num_features), np.float32)
  seen, start = None, 0
  with make_bar(len(source), 0, "image") as bar:
    for images, _ in read_images(source, extractor.batch_size):
      features = extractor.extract(images).features
      slots = slot[start : start + len(images)]
      chosen = slots < len(kept)
      kept[slots[chosen]] = features[chosen]
      seen = _add(seen, features)
      start += len(images)
      bar.update(len(images))
  return Reference(*metrics.statistics_of(seen), kept, describe(source, extractor, max_features))


def _add(seen: metrics.Moments | None, features: Float32[np.ndarray, "B D"]) -> metrics.Moments:
  new = metrics.moments(features)
  return new if seen is None else metrics.merge_moments(seen, new)


def _check_count(kind: str, count: int) -> None:
  if count <= metrics.NEIGHBOURS:
    raise UserError(
      f"figures of samples need more than {metrics.NEIGHBOURS} {kind} images, and there are "
      f"{count}: use more"
    )


def save_reference(path: pathlib.Path, reference: Reference) -> None:
  """Writes an .npz, whole or not at all."""
  arrays = {name: getattr(reference, name) for name in ("mean", "covariance", "features")}
  arrays["identity"] = np.array(json.dumps(reference.fingerprint))
  with atomic_path(path) as temporary, temporary.open("wb") as file:
    np.savez(file, **arrays)


def load_reference(path: pathlib.Path, fingerprint: dict[str, Any]) -> Reference:
  """Reads what `save_reference` wrote.

  Args:
    path: the file.
    fingerprint: what it must be of, from `describe`.

  Raises:
    UserError: it is missing, damaged, or of other images or another extractor.
  """
  try:
    with path.open("rb") as file, np.load(file) as arrays:
      stored = dict(arrays)
    found = json.loads(str(stored.pop("identity")))
    differences = changes(fingerprint, found)
    reference = Reference(**stored, fingerprint=found)
  except FileNotFoundError as error:
    raise UserError(f"there are no reference statistics at {path}") from error
  except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
    raise UserError(f"{path} is damaged: delete it to compute it again") from error
  if differences:
    raise UserError(
      f"{path} is a reference of something else: {'; '.join(differences)}. Delete it to compute it "
      "again, or name another file"
    )
  return reference


def open_reference(
  path: pathlib.Path, source: Source, extractor: Extractor, max_features: int
) -> Reference:
  """The reference kept at a path; computed and kept there where there is none.

  Args:
    path: an .npz file; its directory is made.
    source, extractor, max_features: as for `compute_reference`.

  Raises:
    UserError: it is damaged, or of other images or another extractor.
  """
  if path.exists():
    return load_reference(path, describe(source, extractor, max_features))
  path.parent.mkdir(parents=True, exist_ok=True)
  with owned(path.parent, path.stem, wait=True):
    if path.exists():  # computed by the process that was waited for
      return load_reference(path, describe(source, extractor, max_features))
    log.info("%s features of %d real images: %s", extractor.name, len(source), path)
    reference = compute_reference(source, extractor, max_features)
    save_reference(path, reference)
  return reference


def _fixed_batches(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
  """A stream cut anew into batches of `size`, the last one smaller."""

  def rows() -> Iterator[tuple[np.ndarray, Any]]:
    for images, labels in batches:
      yield from zip(images, itertools.repeat(None) if labels is None else labels, strict=False)

  stream = rows()
  while batch := list(itertools.islice(stream, size)):
    images, labels = zip(*batch, strict=True)
    yield np.stack(images), None if labels[0] is None else np.array(labels)


def measure(
  batches: Iterable[Batch], extractor: Extractor, reference: Reference
) -> dict[str, float | int]:
  """The figures of generated images.

  The Frechet distance and the recognition accuracy are over all of them. The
  kernel distance and precision and recall are over equally many generated and
  real ones: the first M generated, with M features in the reference, or all if
  there are fewer, against as many of the reference.

  Args:
    batches: (B, H, W, 3) uint8 images and their (B,) labels, or None for no
      labels, in any B; read once.
    extractor: the reference's.
    reference: of the real images.

  Returns:
    with the extractor's name in front of each: "frechet_distance",
    "kernel_distance", "kernel_distance_std", "precision", "recall";
    "num_samples" the first is over, "num_subset_samples" the others are; and
    where the extractor predicts labels, of labelled images
    "recognition_accuracy" and, of real ones,
    "recognition_accuracy_of_held_out_images".

  Raises:
    UserError: the reference is of another extractor, or too few images.
  """
  if reference.fingerprint["extractor"]["digest"] != extractor.digest:
    raise UserError(f"the reference is of another extractor than this {extractor.name!r}")
  kept = np.empty_like(reference.features)
  seen, num_samples, labelled = None, 0, []
  for images, labels in _fixed_batches(batches, extractor.batch_size):
    features, predictions = extractor.extract(images)
    seen = _add(seen, features)
    room = kept[num_samples:]
    room[: len(features)] = features[: len(room)]
    num_samples += len(images)
    if labels is not None and predictions is not None:
      labelled.append((predictions, labels))
  _check_count("generated", num_samples)
  figures = _figures(seen, kept[:num_samples], reference)
  if labelled:
    predicted, wanted = (np.concatenate(part) for part in zip(*labelled, strict=True))
    figures["recognition_accuracy"] = metrics.recognition_accuracy(predicted, wanted)
    figures["recognition_accuracy_of_held_out_images"] = extractor.held_out_accuracy
  return {f"{extractor.name}_{name}": value for name, value in figures.items()}


def _figures(
  seen: metrics.Moments, features: Float32[np.ndarray, "m D"], reference: Reference
) -> dict[str, float | int]:
  real = reference.features[: len(features)]
  kernel_mean, kernel_std = metrics.kernel_distance(features, real)
  precision, recall = metrics.precision_recall(features, real)
  return {
    "frechet_distance": metrics.frechet_distance(
      metrics.statistics_of(seen), (reference.mean, reference.covariance)
    ),
    "kernel_distance": kernel_mean,
    "kernel_distance_std": kernel_std,
    "precision": precision,
    "recall": recall,
    "num_samples": seen.count,
    "num_subset_samples": len(features),
  }
