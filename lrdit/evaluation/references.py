"""References: the features of real images, which samples are measured against.

Real images and samples are quantized alike (`images.to_uint8`) and come in batches of the
extractor's size, so that the same images give the same metrics to the bit.

Axes: B images of a batch, N images, M images whose features are kept, H W image, D values of a
feature.
"""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int, UInt8

from lrdit.data.source import Source
from lrdit.evaluation import metrics
from lrdit.evaluation.features import Extractor, read_images
from lrdit.runtime import store
from lrdit.runtime.errors import UserError
from lrdit.runtime.progress import make_bar

# Images (B, H, W, 3) and labels (B,); the batches of a stream differ in B.
Batch = tuple[UInt8[np.ndarray, "_ _ _ 3"], Int[np.ndarray, " _"] | None]

SUBSET_SEED = 0  # for the choice of images whose features are kept
ARRAYS = ("mean", "covariance", "features")

log = logging.getLogger("lrdit")


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
  """Real images as an extractor sees them.

  Attributes:
    mean: (D,) of all N images.
    covariance: (D, D) of all N images, unbiased.
    features: (M, D) of a random choice of images, in random order.
    fingerprint: of images and extractor, from `describe`.
  """

  mean: Float64[np.ndarray, " D"]
  covariance: Float64[np.ndarray, "D D"]
  features: Float32[np.ndarray, "M D"]
  fingerprint: dict[str, Any]


def describe(source: Source, extractor: Extractor, max_features: int) -> dict[str, Any]:
  """Return the fingerprint of a reference, as JSON, without reading an image."""
  return store.as_json(
    {
      "format": 1,
      "data": source.fingerprint,
      "image_shape": source.image_shape,
      "num_images": len(source),
      "num_features": min(max_features, len(source)),
      "extractor": {"name": extractor.name, "digest": extractor.digest},
    }
  )


def compute_reference(source: Source, extractor: Extractor, max_features: int) -> Reference:
  """Compute the reference of a split, and keep the features of at most `max_features` images."""
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
  if count <= metrics.NEIGHBORS:
    raise UserError(
      f"metrics of samples need more than {metrics.NEIGHBORS} {kind} images, and there are "
      f"{count}: use more"
    )


def load_reference(path: pathlib.Path, fingerprint: dict[str, Any]) -> Reference:
  """Read the reference at a path; raise StoreError if it is damaged or has another fingerprint."""
  fix = "delete it to compute it again"
  stored = store.load_arrays(path, fix)
  with store.damage_of(path, fix):
    found = store.parse_json(str(stored["identity"]))
    what = f"{path} is a reference of something else"
    store.check_same(what, fingerprint, found, f"{fix}, or name another file")
    return Reference(**{name: stored[name] for name in ARRAYS}, fingerprint=found)


def open_reference(
  path: pathlib.Path, source: Source, extractor: Extractor, max_features: int
) -> Reference:
  """Return the reference kept in an .npz, or compute and keep it."""

  def make() -> Reference:
    log.info("%s features of %d real images: %s", extractor.name, len(source), path)
    reference = compute_reference(source, extractor, max_features)
    arrays = {name: getattr(reference, name) for name in ARRAYS}
    arrays["identity"] = np.array(json.dumps(reference.fingerprint))
    store.save_arrays(path, arrays)
    return reference

  fingerprint = describe(source, extractor, max_features)
  return store.load_or_make(path, path.stem, lambda: load_reference(path, fingerprint), make)


def measure(
  batches: Iterable[Batch], extractor: Extractor, reference: Reference
) -> dict[str, float | int]:
  """Return the metrics of samples.

  The Frechet distance and the recognition accuracy are over all samples. The other metrics are over
  equally many samples and real images: the first M samples, or all if there are fewer, and as many
  features of the reference.

  Batches are of uint8 images and labels or None. They have the extractor's batch size, except the
  last one.

  Returns:
    with the extractor's name in front of each: "frechet_distance", "kernel_distance",
    "kernel_distance_std", "precision", "recall"; "num_samples" and "num_subset_samples", the
    numbers of samples behind the first and the others; and, if the extractor predicts labels,
    "recognition_accuracy" and "recognition_accuracy_of_held_out_images".
  """
  if reference.fingerprint["extractor"]["digest"] != extractor.digest:
    raise UserError(f"the reference is of another extractor than this {extractor.name!r}")
  kept = np.empty_like(reference.features)
  seen, num_samples, labelled = None, 0, []
  for images, labels in batches:
    features, predictions = extractor.extract(images)
    seen = _add(seen, features)
    room = kept[num_samples:]
    room[: len(features)] = features[: len(room)]
    num_samples += len(images)
    if labels is not None and predictions is not None:
      labelled.append((predictions, labels))
  _check_count("generated", num_samples)
  kept = kept[:num_samples]
  real, statistics = reference.features[: len(kept)], (reference.mean, reference.covariance)
  found = {"frechet_distance": metrics.frechet_distance(metrics.statistics_of(seen), statistics)}
  found["kernel_distance"], found["kernel_distance_std"] = metrics.kernel_distance(kept, real)
  found["precision"], found["recall"] = metrics.precision_recall(kept, real)
  found |= {"num_samples": seen.count, "num_subset_samples": len(kept)}
  if labelled:
    predicted, wanted = (np.concatenate(part) for part in zip(*labelled, strict=True))
    found["recognition_accuracy"] = metrics.recognition_accuracy(predicted, wanted)
    found["recognition_accuracy_of_held_out_images"] = extractor.held_out_accuracy
  return {f"{extractor.name}_{name}": value for name, value in found.items()}
