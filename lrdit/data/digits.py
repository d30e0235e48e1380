"""The digits of scikit-learn, which need no files."""

from typing import Any

import numpy as np

from lrdit.data.source import DataOptions, Source
from lrdit.runtime.errors import UserError

DIGITS_EVAL_EVERY = 6  # of the digits, every sixth is held out


def fingerprint_digits(split: str, options: DataOptions) -> dict[str, Any]:
  """The fingerprint of `load_digits`' source, but for the number of its examples."""
  del options
  return {"name": "digits", "split": split}


def load_digits(split: str, options: DataOptions) -> Source:
  """scikit-learn's 1,797 handwritten digits, 8x8 grey, 10 classes.

  Args:
    split: "train" (1,498) or "eval" (299, every sixth scan).
    options: of which none applies: they must be as the data is.

  Returns:
    float32 images in [-1, 1] (17 grey levels).

  Raises:
    UserError: options that ask for other data.
  """
  from sklearn import datasets  # slow to import, and only needed here

  if options.data_dir:
    raise UserError(
      f"config.data.data_dir={options.data_dir!r} is not used by the data 'digits', which needs "
      "no files: leave it empty"
    )
  for field, expected in (("image_size", 8), ("num_channels", 1)):
    if getattr(options, field) != expected:
      raise UserError(
        f"config.data.{field}={getattr(options, field)} does not fit the data 'digits': use "
        f"{expected}"
      )
  digits = datasets.load_digits()
  held_out = np.arange(len(digits.target)) % DIGITS_EVAL_EVERY == DIGITS_EVAL_EVERY - 1
  keep = held_out if split == "eval" else ~held_out
  scans = (digits.images[keep, :, :, None] / 8.0 - 1.0).astype(np.float32)
  fingerprint = fingerprint_digits(split, options) | {"num_examples": len(scans)}
  return Source(scans, digits.target[keep].astype(np.int32), 10, fingerprint)
