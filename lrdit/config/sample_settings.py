"""The fields of a config that define its samples: their record in a sample set, and the labels."""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from lrdit.config.field import Role
from lrdit.config.schema import FIELDS
from lrdit.sampling.sampler import LabelRule, balanced_labels, random_labels


def label_rule(config: ConfigDict) -> LabelRule | None:
  """Return the rule of `sampling.labels`, or None for an unconditional model."""
  s, classes = config.sampling, config.data.num_classes
  if not classes:
    return None
  if s.labels == "balanced":
    return lambda index: balanced_labels(index, classes)
  if s.labels == "random":
    return lambda index: random_labels(s.seed, index, classes)
  return lambda index: np.full(len(index), int(s.labels), np.int32)


def record_names() -> list[str]:
  """Return the names that the fields with `Role.SAMPLES` have in a sample set's metadata."""
  own = [name.rpartition(".")[2] for name, field in FIELDS.items() if field.role is Role.SAMPLES]
  return ["weights" if name == "use_ema" else name for name in own]


def to_record(config: ConfigDict) -> dict[str, Any]:
  """Return the fields of `sampling` that define a sample set, as its metadata has them."""
  values = config.sampling.to_dict() | {"weights": "ema" if config.sampling.use_ema else "raw"}
  values |= {} if config.data.num_classes else {"labels": None}
  return {name: values[name] for name in record_names()}


def from_record(metadata: dict[str, Any]) -> dict[str, Any]:
  """Return the fields of `sampling` that a sample set's metadata has."""
  names = {name.rpartition(".")[2] for name in FIELDS if name.startswith("sampling.")}
  fields = {name: metadata[name] for name in names & metadata.keys()}
  if "weights" in metadata:
    fields["use_ema"] = metadata["weights"] == "ema"
  return {name: value for name, value in fields.items() if value is not None}
