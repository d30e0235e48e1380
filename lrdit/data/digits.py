"""The handwritten digits of scikit-learn, which need no files."""

from typing import Any

import numpy as np

from lrdit.data.source import DataOptions, Source
from lrdit.runtime.errors import UserError

EVAL_EVERY = 6


def fingerprint_digits(split: str, options: DataOptions) -> dict[str, Any]:
  """Return the fingerprint of `load_digits`' source without its number of examples."""
  del options
  return {"name": "digits", "split": split}


def load_digits(split: str, options: DataOptions) -> Source:
  """Load scikit-learn's 1,797 handwritten digits, 8x8 gray, in 10 classes.

  "eval" has every sixth scan (299), "train" the others (1,498). Images are float32 in [-1, 1] with
  17 gray levels. As nothing is resized, other options than the digits' own raise a UserError.
  """
  from sklearn import datasets  # This import is slow.

  for field, expected in (("data_dir", ""), ("image_size", 8), ("num_channels", 1)):
    if getattr(options, field) != expected:
      raise UserError(
        f"config.data.{field}={getattr(options, field)!r} does not fit the data 'digits', which "
        f"come with scikit-learn: use {expected!r}"
      )
  digits = datasets.load_digits()
  held_out = np.arange(len(digits.target)) % EVAL_EVERY == EVAL_EVERY - 1
  keep = held_out if split == "eval" else ~held_out
  scans = (digits.images[keep, :, :, None] / 8.0 - 1.0).astype(np.float32)
  fingerprint = fingerprint_digits(split, options) | {"num_examples": len(scans)}
  return Source(scans, digits.target[keep].astype(np.int32), 10, fingerprint)
