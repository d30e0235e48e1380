"""The studies: arms that one command trains, samples, evaluates and compares.

bash launch/digits.sh STUDY    # docs/results.md has the results
bash launch/cifar10.sh STUDY   # DiT-XS/4 on photographs: docs/photographs.md
--help lists the studies.
"""

import functools
import itertools
import operator
import pathlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

METHODS = ("full", "narrow", "static", "adaptive")
RATES, RATIOS = (0.002, 0.004, 0.016), (0.1, 0.25, 0.35, 0.7)
# Each changes one choice of the adaptive arm.
FACTOR_RULES = {
  "bands": ("optimizer.factor_update=bands",),
  "lora_muon": ("optimizer.factor_update=lora_muon",),
  "spectron": ("optimizer.factor_update=spectron",),
  "fan_in": ("optimizer.factor_rates=fan_in",),
}
ABLATION = FACTOR_RULES | {
  "adamw_rate": ("optimizer.learning_rate=0.002", "optimizer.muon_learning_rate_ratio=4.0"),
  "dense_adaln": (
    "rank.dense_layers=('patch_embed','blocks_0/mlp','final_layer','t_embedder','blocks_*/adaln')",
  ),
  "wide": ("model.hidden_size=160", "rank.ratio=0.25"),
}
DISTILLATION = 10.0
# The trained full arm as a low-rank one, without fine-tuning and with 5 and 20 % of its steps.
# Rates are the best of 0.0005 to 0.004, by cut and weight of distillation.
FINE_TUNING_STEPS = (100, 400)
FINE_TUNING_RATES = {
  ("svd", 0.0): 0.002,
  ("svd", DISTILLATION): 0.002,
  ("whitened", 0.0): 0.0005,
  ("whitened", DISTILLATION): 0.002,
}
# The narrow arm with the training MACs of the full arm, its fine-tuning and its outputs as teacher.
STEPS_OF_EQUAL_COMPUTE, SHORT_STEPS_OF_EQUAL_COMPUTE = 4200, 2060

# Of photographs. PHOTO_RATES are tried beside the recipe's rate; the short study tries SHORT_RATES.
PHOTO_RATES = dict.fromkeys(("full", "narrow"), (0.002, 0.004))
PHOTO_RATES |= dict.fromkeys(("static", "adaptive"), (0.002, 0.008))
SHORT_RATES, SHORT_FINE_TUNING_RATE = (0.004, 0.008), 0.001


class Arm(NamedTuple):
  """An arm of a study: its method, perhaps with more of the recipe's arguments, and fields."""

  argument: str
  fields: tuple[str, ...] = ()  # FIELD=VALUE


class Study(NamedTuple):
  """What a study compares.

  Attributes:
    seeds: the default ones.
    arms: returns the arms by name from the directory of the runs and the first seed. An arm has
      one name in all studies of a data set, so that they share its runs.
    analyzed: whether the full arm of the first seed is analyzed before the others are trained.
  """

  seeds: str
  arms: Callable[[pathlib.Path, str], dict[str, Arm]]
  analyzed: bool = False


def _methods(arguments: str = "", fields: tuple[str, ...] = ()) -> dict[str, Arm]:
  return {method: Arm(method + arguments, fields) for method in METHODS}


def _with_rates(arms: dict[str, Arm], rates: Iterable[float]) -> dict[str, Arm]:
  pairs = itertools.product(rates, arms.items())
  return {
    f"{name}_rate{rate}": arm._replace(fields=(*arm.fields, f"optimizer.learning_rate={rate}"))
    for rate, (name, arm) in pairs
  }


def _rates(*_: object) -> dict[str, Arm]:
  return _methods() | _with_rates(_methods(), RATES)


def _schedules(runs: pathlib.Path, first_seed: str) -> dict[str, Arm]:
  analysis = runs / f"digits_full_{first_seed}" / "analysis" / "truncation.json"
  own = {name: (f"rank.schedule={name}",) for name in ("measured", "increasing", "constant")}
  own["measured"] += (f"rank.analysis={analysis}",)
  return _methods() | {name: Arm("adaptive", fields) for name, fields in own.items()}


def _frontier(*_: object) -> dict[str, Arm]:
  pairs = itertools.product(RATIOS, METHODS[1:])
  return _methods() | {f"{m}_ratio{r}": Arm(m, (f"rank.ratio={r}",)) for r, m in pairs}


def _ablation(*_: object) -> dict[str, Arm]:
  choices = {name: Arm("adaptive", fields) for name, fields in ABLATION.items()}
  return {"adaptive": Arm("adaptive")} | choices


def _compression(runs: pathlib.Path, _first_seed: str) -> dict[str, Arm]:
  def start(method: str, cut: str, weight: float, steps: int) -> Arm:
    full = runs / "digits_full_{seed}"
    rate = FINE_TUNING_RATES[cut, weight]
    return Arm(method, _fine_tuning(full, cut, weight, steps, rate))

  arms = {f"{cut}_0": start("adaptive", cut, 0.0, 0) for cut in ("svd", "whitened")}
  for (cut, weight), steps in itertools.product(FINE_TUNING_RATES, FINE_TUNING_STEPS):
    name = f"{cut}_{steps}" + ("_distilled" if weight else "")
    arms[name] = start("adaptive", cut, weight, steps)
  arms["static_whitened_0"] = start("static", "whitened", 0.0, 0)
  last = FINE_TUNING_STEPS[-1]
  arms[f"static_whitened_{last}_distilled"] = start("static", "whitened", DISTILLATION, last)
  longer = (f"training.num_steps={STEPS_OF_EQUAL_COMPUTE}",)
  return _methods() | arms | {"narrow_longer": Arm("narrow", longer)}


def _fine_tuning(
  full: pathlib.Path, cut: str, weight: float, steps: int, rate: float
) -> tuple[str, ...]:
  start = (f"init.from_={full}", f"init.compression={cut}", f"init.distillation={weight}")
  length = (f"training.num_steps={steps}", f"optimizer.warmup_steps={steps // 10}")
  return (*start, f"optimizer.learning_rate={rate}", *length)


def _short(steps: int) -> tuple[str, ...]:
  length = (f"training.num_steps={steps}", f"optimizer.warmup_steps={steps // 10}")
  return (*length, "optimizer.ema_decay=0.995")


PHOTO = ",variant=XS/4"
# A fifth of the recipe's steps.
SHORT = {f"{name}_short": arm for name, arm in _methods(PHOTO, _short(1000)).items()}


def _photo_rates(*_: object) -> dict[str, Arm]:
  arms = _methods(PHOTO)
  others = (_with_rates({name: arms[name]}, rates) for name, rates in PHOTO_RATES.items())
  return functools.reduce(operator.or_, others, arms)


def _short_rates(*_: object) -> dict[str, Arm]:
  return _with_rates(SHORT, SHORT_RATES)


def _photo_ablation(*_: object) -> dict[str, Arm]:
  arm = SHORT["adaptive_short"]
  own = {f"{n}_short": arm._replace(fields=arm.fields + f) for n, f in FACTOR_RULES.items()}
  return _with_rates({"adaptive_short": arm} | own, SHORT_RATES[-1:])


def _photo_compression(runs: pathlib.Path, _first_seed: str) -> dict[str, Arm]:
  rates = SHORT_RATES[:1]
  (full,) = _with_rates({"full_short": SHORT["full_short"]}, rates)
  arms = {}
  for method, steps in itertools.product(("adaptive", "static"), (0, 200)):
    weight = DISTILLATION if steps else 0.0
    start = runs / f"cifar10_{full}_{{seed}}"
    fields = _fine_tuning(start, "whitened", weight, steps, SHORT_FINE_TUNING_RATE)
    arms[f"{method}_whitened_{steps}"] = Arm(method + PHOTO, (*fields, "optimizer.ema_decay=0.995"))
  longer = {"narrow_longer": Arm("narrow" + PHOTO, _short(SHORT_STEPS_OF_EQUAL_COMPUTE))}
  return _with_rates(SHORT, rates) | arms | longer


# By data set.
STUDIES = {
  "digits": {
    "arms": Study("0 1 2", lambda *_: _methods()),
    "adamw": Study(
      "0 1 2", lambda *_: {f"{m}_adamw": Arm(f"{m},recipe=dissertation") for m in METHODS}
    ),
    "schedules": Study("0 1 2", _schedules, analyzed=True),
    "rates": Study("0", _rates),
    "frontier": Study("0 1", _frontier),
    "ablation": Study("0", _ablation),
    "compression": Study("0 1 2", _compression),
  },
  "cifar10": {
    "photographs": Study("0 1", lambda *_: _methods(PHOTO)),
    "rates": Study("0", _photo_rates),
    "short": Study("0 1", _short_rates),
    "ablation": Study("0", _photo_ablation),
    "compression": Study("0", _photo_compression),
  },
}
