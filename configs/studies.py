"""The studies of the digits: arms that one command trains and compares.

bash launch/digits.sh STUDY   # --help lists them; docs/results.md has the results
"""

import itertools
import pathlib
from typing import NamedTuple

METHODS = ("full", "narrow", "static", "adaptive")
# The studies of the digits with their seeds.
STUDIES = {
  "arms": "0 1 2",
  "adamw": "0 1 2",
  "schedules": "0 1 2",
  "rates": "0",
  "frontier": "0 1",
  "ablation": "0",
}
RATES, RATIOS = (0.002, 0.004, 0.016), (0.1, 0.25, 0.35, 0.7)
# Each changes one choice of the adaptive arm.
ABLATION = {
  "bands": ("optimizer.factor_update=bands",),
  "lora_muon": ("optimizer.factor_update=lora_muon",),
  "spectron": ("optimizer.factor_update=spectron",),
  "fan_in": ("optimizer.factor_rates=fan_in",),
  "adamw_rate": ("optimizer.learning_rate=0.002", "optimizer.muon_learning_rate_ratio=4.0"),
  "dense_adaln": (
    "rank.dense_layers=('patch_embed','blocks_0/mlp','final_layer','t_embedder','blocks_*/adaln')",
  ),
  "wide": ("model.hidden_size=160", "rank.ratio=0.25"),
}


class Arm(NamedTuple):
  """An arm of the digits: its method, perhaps with more of the recipe's arguments, and fields."""

  argument: str
  fields: tuple[str, ...] = ()  # FIELD=VALUE


def arms_of(study: str, analysis: pathlib.Path) -> dict[str, Arm]:
  """Return the arms of a study of the digits by name.

  An arm has one name in all studies, so that studies share its runs. `analysis` determines the
  measured schedule.
  """
  methods = {method: Arm(method) for method in METHODS}
  if study == "schedules":
    own = {name: (f"rank.schedule={name}",) for name in ("measured", "increasing", "constant")}
    own["measured"] += (f"rank.analysis={analysis}",)
    return methods | {name: Arm("adaptive", fields) for name, fields in own.items()}
  if study == "adamw":
    return {f"{m}_adamw": Arm(f"{m},recipe=dissertation") for m in METHODS}
  if study == "rates":
    pairs = itertools.product(RATES, METHODS)
    own = {f"{m}_rate{r}": Arm(m, (f"optimizer.learning_rate={r}",)) for r, m in pairs}
    return methods | own
  if study == "frontier":
    pairs = itertools.product(RATIOS, METHODS[1:])
    return methods | {f"{m}_ratio{r}": Arm(m, (f"rank.ratio={r}",)) for r, m in pairs}
  if study == "ablation":
    choices = {name: Arm("adaptive", fields) for name, fields in ABLATION.items()}
    return {"adaptive": methods["adaptive"]} | choices
  return methods
