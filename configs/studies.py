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
  "compression": "0 1 2",
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
# The trained full arm as a low-rank one, without fine-tuning and with 5 and 20 % of its steps.
# Rates are the best of 0.0005 to 0.004, by cut and weight of distillation.
FINE_TUNING_STEPS, DISTILLATION = (100, 400), 10.0
FINE_TUNING_RATES = {
  ("svd", 0.0): 0.002,
  ("svd", DISTILLATION): 0.002,
  ("whitened", 0.0): 0.0005,
  ("whitened", DISTILLATION): 0.002,
}
# The narrow arm with the training MACs of the full arm, its fine-tuning and its outputs as teacher.
STEPS_OF_EQUAL_COMPUTE = 4200


class Arm(NamedTuple):
  """An arm of the digits: its method, perhaps with more of the recipe's arguments, and fields."""

  argument: str
  fields: tuple[str, ...] = ()  # FIELD=VALUE


def arms_of(study: str, runs: pathlib.Path, first_seed: str) -> dict[str, Arm]:
  """Return the arms of a study of the digits by name.

  An arm has one name in all studies, so that studies share its runs. In `runs`, the full arm of
  the first seed determines the measured schedule, and that of each seed is what is compressed.
  """
  methods = {method: Arm(method) for method in METHODS}
  if study == "schedules":
    analysis = runs / f"digits_full_{first_seed}" / "analysis" / "truncation.json"
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
  if study == "compression":
    return methods | compressed_arms(runs / "digits_full_{seed}")
  return methods


def compressed_arms(full: pathlib.Path) -> dict[str, Arm]:
  """Return the arms that start from a trained full arm, and the control of equal compute."""

  def start(method: str, cut: str, weight: float, steps: int) -> Arm:
    fields = (f"init.from_={full}", f"init.compression={cut}", f"init.distillation={weight}")
    rate = f"optimizer.learning_rate={FINE_TUNING_RATES[cut, weight]}"
    length = (f"training.num_steps={steps}", f"optimizer.warmup_steps={steps // 10}")
    return Arm(method, (*fields, rate, *length))

  arms = {f"{cut}_0": start("adaptive", cut, 0.0, 0) for cut in ("svd", "whitened")}
  for (cut, weight), steps in itertools.product(FINE_TUNING_RATES, FINE_TUNING_STEPS):
    name = f"{cut}_{steps}" + ("_distilled" if weight else "")
    arms[name] = start("adaptive", cut, weight, steps)
  arms["static_whitened_0"] = start("static", "whitened", 0.0, 0)
  last = FINE_TUNING_STEPS[-1]
  arms[f"static_whitened_{last}_distilled"] = start("static", "whitened", DISTILLATION, last)
  longer = (f"training.num_steps={STEPS_OF_EQUAL_COMPUTE}",)
  return arms | {"narrow_longer": Arm("narrow", longer)}
