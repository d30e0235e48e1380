import pathlib
import re

import pytest

from lrdit.train.monitor import advice_on_non_finite


@pytest.mark.parametrize(
  ("quantity", "step", "newest", "before", "advice"),
  [
    ("loss", 9, 8, 4, "delete checkpoints/8, lower .*, which goes on from step 4$"),
    ("gradient", 9, 8, 0, "delete checkpoints/8, lower .*, which goes on from the start$"),
    ("update", 9, 8, 4, r"^The last good checkpoint is step 8. Lower .* goes on from step 8$"),
    ("loss", 10, 8, 4, r"^The last good checkpoint is step 8. Lower .* goes on from step 8$"),
    ("loss", 1, 0, 0, "^Lower .* and run the command again$"),
    ("batch", 9, 8, 4, r"^The last good checkpoint is step 8. The data is damaged: "),
  ],
)
def test_advice_fits_what_is_there(quantity, step, newest, before, advice):
  assert re.search(
    advice, advice_on_non_finite(quantity, step, newest, before, pathlib.Path("checkpoints"))
  )
