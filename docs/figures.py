"""Draw the README's picture of r(t): python -m docs.figures."""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from configs import digits
from lrdit.config.resolve import resolve
from lrdit.experiment import Experiment
from lrdit.rank import schedules

LAYER = "blocks_1/mlp/fc1"


def main() -> None:
  """Write docs/rank_schedule.png."""
  config = resolve(digits.get_config())
  plan = Experiment(config).plan
  ranks = plan.by_name[LAYER]
  t = np.arange(plan.num_train_timesteps)
  height = schedules.schedule_height(config.rank.schedule, len(t))
  exact = ranks.max_rank * (config.rank.min_ratio + (1 - config.rank.min_ratio) * height)
  figure, axes = plt.subplots(figsize=(6, 3.2), dpi=120, layout="constrained")
  axes.plot(t, exact, color="tab:gray", linewidth=1, label="r(t), logistic_decreasing")
  buckets = np.asarray(ranks.active)[plan.bucket_of_timestep]
  label = "rank buckets (adaptive)"
  axes.step(t, buckets, where="post", color="tab:blue", linewidth=2, label=label)
  label = "static rank (ratio 0.5)"
  axes.axhline(ranks.static_rank, color="tab:orange", linestyle="--", label=label)
  axes.set(xlabel="timestep t   (0: clean image, 1000: noise)", xlim=(0, len(t)))
  axes.set(ylabel=f"active rank of {LAYER}", ylim=(0, None))
  axes.legend(frameon=False)
  figure.savefig(pathlib.Path(__file__).with_name("rank_schedule.png"))


if __name__ == "__main__":
  main()
