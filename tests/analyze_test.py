"""`--mode=analyze` of a tiny run."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lrdit import analyze, builders, flops, gradient_spectra, held_out, train
from lrdit.errors import UserError
from tests import tiny
from tests.measured_schedule_test import BOUNDARIES, RANKS, RISE

FIELDS = {
  "training__num_steps": 2,
  "curriculum__boundaries": (0, 400, 1000),
  "analysis__batch_sizes": (2, 4),
  "analysis__ranks": (2, 32),
  "analysis__subspace_rank": 2,
}
FILES = {"flops.json", "weights.json", "gradients.json", "truncation.json"}
PICTURES = (
  "weights_spectra weights_ranks gradients_ranks gradients_layers gradients_overlap_left "
  "gradients_overlap_right truncation losses"
)


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("analyze") / "run"
  config = tiny.tiny_config("method=full", **FIELDS)
  train.train(config, str(workdir), jax.devices()[:1])
  analyze.analyze(config, str(workdir), jax.devices()[:1])
  return config, workdir


def read(workdir, name):
  return json.loads((workdir / "analysis" / f"{name}.json").read_text())


def test_every_section_leaves_json_and_pictures(analysed):
  _, workdir = analysed
  names = {path.name for path in (workdir / "analysis").iterdir()}
  assert names == FILES | {f"{name}.png" for name in PICTURES.split()}


def test_the_whole_model_s_loss_is_that_of_evaluation(analysed):
  config, workdir = analysed
  found = read(workdir, "truncation")
  step = builders.make_eval_step(config, jax.devices()[:1])
  run = analyze.Analysis(config, str(workdir), jax.devices()[:1])
  losses = held_out.held_out_losses(
    step,
    jax.tree.map(lambda x: x[None], run.params),
    run.source("eval"),
    np.arange(config.training.batch_size)[None],
    config.training.batch_size,
    config.evaluation.draws,
  )
  np.testing.assert_allclose(found["baseline"], losses.group_means, rtol=1e-6)
  np.testing.assert_allclose(found["rise"][1], 0, atol=1e-5)  # rank 32 is the whole width


def test_finished_sections_are_kept_until_their_settings_change(analysed, monkeypatch):
  config, workdir = analysed
  made = []
  monkeypatch.setattr(
    gradient_spectra, "analyse_gradients", lambda *args, **kwargs: made.append(args) or {}
  )
  monkeypatch.setattr(analyze.Analysis, "plot", lambda *args: None)
  for plot in ("gradient_ranks", "gradient_layers", "gradient_overlap"):
    monkeypatch.setattr(analyze.analysis_plots, plot, lambda *args: None)
  before = read(workdir, "gradients")
  analyze.analyze(config, str(workdir), jax.devices()[:1])
  assert not made
  fields = FIELDS | {"analysis__seed": 1, "analysis__sections": ("gradients",)}
  analyze.analyze(tiny.tiny_config("method=full", **fields), str(workdir), jax.devices()[:1])
  assert len(made) == 1
  assert read(workdir, "gradients")["seed"] == 1
  (workdir / "analysis" / "gradients.json").write_text(json.dumps(before))


@pytest.mark.parametrize("split", ["train", "eval"])
def test_other_data_than_the_run_s_is_refused(analysed, monkeypatch, split):
  config, workdir = analysed
  other = dataclasses.replace(tiny.load_digits(split), identity={"name": "other"})
  monkeypatch.setattr(builders, "make_source", lambda *args: other)
  run = analyze.Analysis(config, str(workdir), jax.devices()[:1])
  with pytest.raises(UserError, match="holds a run on other data"):
    run.source(split)


def test_r_of_t_on_the_heat_map_is_what_a_run_would_take():
  found = {"ranks": RANKS, "rise": RISE, "largest_rank": 32, "boundaries": BOUNDARIES}
  config = tiny.tiny_config("method=full")
  name, r = analyze.measured_schedule_of(config, found)
  assert name.startswith("rank.schedule=measured at rank.ratio=0.5")
  plan = builders.make_plan(tiny.tiny_config("method=static"))
  assert r.mean() == pytest.approx(np.mean([ranks.static_rank for _, ranks in plan.layers]))
  assert r.shape == (1000,)
  assert r[0] > r[999]
  assert analyze.measured_schedule_of(config, found | {"rise": [[None, 1.0]] * 3}) is None
  assert analyze.measured_schedule_of(config, found | {"ranks": (30, 31, 31)}) is None


def test_counts_of_every_arm_by_bucket_and_sampling_run():
  config = tiny.tiny_config("method=static")
  arms = analyze.count_flops(config)
  adaptive = tiny.tiny_config("method=adaptive")
  shape, plan = builders.make_shape(adaptive), builders.make_plan(adaptive)
  buckets = arms["adaptive"]["buckets"]
  assert [b["forward_macs"] for b in buckets] == [
    flops.forward_macs(shape, plan, bucket) for bucket in range(plan.num_buckets)
  ]
  mean = sum(b["timesteps"] * b["forward_macs"] for b in buckets) / 1000
  assert mean == pytest.approx(arms["adaptive"]["mean_forward_macs"])
  assert arms["full"]["sampling_macs"] == 10 * arms["full"]["buckets"][0]["forward_macs"]
  assert arms["static"]["parameters"] < arms["full"]["parameters"]
  table = analyze.format_flops(arms).splitlines()
  assert len(table) == 4 + plan.num_buckets
  assert f"{arms['full']['parameters']:,}" in table[1]


@pytest.mark.parametrize(
  ("field", "value"),
  [("sections", ("weight",)), ("batch_sizes", (16, 16)), ("batch_sizes", ()), ("ranks", (8, 4))],
)
def test_settings_that_cannot_work_are_refused(field, value):
  with pytest.raises(UserError, match=f"analysis.{field}"):
    tiny.tiny_config(**{f"analysis__{field}": value})
