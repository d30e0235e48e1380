"""`--mode=analyze` of a tiny run."""

import dataclasses
import json

import flax
import jax
import numpy as np
import pytest

from lrdit.analysis import gradient_figures, gradient_spectra
from lrdit.config.run_config import store_config
from lrdit.evaluation import held_out
from lrdit.experiment import Experiment
from lrdit.model import flops
from lrdit.modes import analyze, train
from lrdit.runtime.errors import UserError
from tests import tiny
from tests.trained import noisy_params, save_checkpoint
from tests.truncations import truncation_of

FIELDS = {
  "training__num_steps": 6,
  "optimizer__learning_rate": 0.02,
  "optimizer__warmup_steps": 0,
  "optimizer__ema_decay": 0.5,
  "curriculum__boundaries": (0, 400, 1000),
  "analysis__batch_sizes": (2, 4),
  "analysis__ranks": (2, 31),
  "analysis__subspace_rank": 2,
}
ARMS = ("full", "narrow", "static", "adaptive")
FILES = {"flops.json", "weights.json", "gradients.json", "truncation.json"}
PICTURES = (
  "weights_spectra weights_ranks gradients_ranks gradients_layers gradients_overlap_left "
  "gradients_overlap_right truncation losses"
)


@pytest.fixture(scope="module")
def analyzed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("analyze") / "run"
  config = tiny.tiny_config("method=full", **FIELDS)
  train.Trainer(config, str(workdir), jax.devices()[:1]).files.close()  # writes data.json
  store_config(workdir, config)
  cubes = jax.tree.map(lambda x: x**3, noisy_params(config))  # of other ranks
  save_checkpoint(workdir, config, step=4, params=cubes, keep=2)
  save_checkpoint(workdir, config, step=6, keep=2)
  analyze.analyze(config, str(workdir), jax.devices()[:1])
  return config, workdir


def read(workdir, name):
  return json.loads((workdir / "analysis" / f"{name}.json").read_text())


def test_every_section_leaves_json_and_pictures(analyzed):
  _, workdir = analyzed
  names = {path.name for path in (workdir / "analysis").iterdir()}
  assert names == FILES | {f"{name}.png" for name in PICTURES.split()}


def test_losses_are_evaluation_s_of_the_whole_model_and_of_the_cut_one(analyzed):
  config, workdir = analyzed
  found = read(workdir, "truncation")
  step = Experiment(config).eval_step(jax.devices()[:1])
  run = analyze.Analysis(Experiment(config), workdir, jax.devices()[:1])

  def losses_of(params):
    return held_out.held_out_losses(
      step,
      jax.tree.map(lambda x: x[None], params),
      run.source("eval"),
      np.arange(config.training.batch_size)[None],
      config.training.batch_size,
      config.evaluation.draws,
    ).group_means

  np.testing.assert_allclose(found["baseline"], losses_of(run.params), rtol=1e-6)
  flat = flax.traverse_util.flatten_dict(run.params, sep="/")
  for name in Experiment(config).factorized_layers:
    u, sigma, vt = np.linalg.svd(flat[f"{name}/kernel"], full_matrices=False)
    flat[f"{name}/kernel"] = (u[:, :2] * sigma[:2]) @ vt[:2]
  expected = losses_of(flax.traverse_util.unflatten_dict(flat, sep="/"))
  np.testing.assert_allclose(found["loss"][0], expected, rtol=1e-5)
  assert np.abs(found["rise"][0]).min() > 1e-4  # so that cutting nothing would be seen


def test_finished_sections_are_kept_until_their_settings_change(analyzed, monkeypatch):
  config, workdir = analyzed
  made = []
  monkeypatch.setattr(
    gradient_spectra, "analyze_gradients", lambda *args, **kwargs: made.append(args) or {}
  )
  monkeypatch.setattr(analyze.Analysis, "plot", lambda *args: None)
  for plot in ("ranks", "layers", "overlap"):
    monkeypatch.setattr(gradient_figures, plot, lambda *args: None)
  before = read(workdir, "gradients")
  analyze.analyze(config, str(workdir), jax.devices()[:1])
  assert not made
  fields = FIELDS | {"analysis__seed": 1, "analysis__sections": ("gradients",)}
  analyze.analyze(tiny.tiny_config("method=full", **fields), str(workdir), jax.devices()[:1])
  assert len(made) == 1
  assert read(workdir, "gradients")["seed"] == 1
  (workdir / "analysis" / "gradients.json").write_text(json.dumps(before))


def test_ranks_of_every_kept_step_give_curves(analyzed, monkeypatch):
  _, workdir = analyzed
  gradients, steps = read(workdir, "gradients"), []
  monkeypatch.setattr(
    gradient_spectra,
    "analyze_gradients",
    lambda *args, **kwargs: steps.append(len(steps)) or gradients | {"seed": steps[-1]},
  )
  config = tiny.tiny_config("method=full", **FIELDS)
  analyze.analyze(config, str(workdir), jax.devices()[:1], checkpoint="all")
  curves = json.loads((workdir / "steps" / "ranks.json").read_text())
  assert curves["steps"] == [4, 6]
  assert curves["groups"] == [[0, 399], [400, 999]]
  assert not (workdir / "steps" / "4" / "analysis" / "truncation.json").exists()
  for step, found in zip((4, 6), curves["weights"]["mlp"]["stable_rank"], strict=True):
    own = json.loads((workdir / "steps" / str(step) / "analysis" / "weights.json").read_text())
    assert found == [group["stable_rank"] for group in own["kinds"]["mlp"]["groups"]]
  newest = read(workdir, "weights")["kinds"]["mlp"]["buckets"][0]["stable_rank"]
  assert found == pytest.approx([newest, newest])
  assert curves["weights"]["mlp"]["stable_rank"][0] != found
  of_data = gradients["conditions"]["data"]["kinds"]["attention"]
  ranks = [group[-1]["entropy_rank"] for group in of_data]
  assert curves["gradients"]["attention"]["entropy_rank"] == [ranks, ranks]
  table = np.array(gradients["overlap"]["data"]["kinds"]["attention"]["cross_half"]["left"])
  overlap = curves["overlap"]["attention"]["left"]
  assert overlap["between"][0] == pytest.approx((table[0, 1] + table[1, 0]) / 2)
  assert overlap["within"][0] == pytest.approx((table[0, 0] + table[1, 1]) / 2)
  assert (workdir / "steps" / "ranks.png").stat().st_size > 10_000
  with pytest.raises(UserError, match=r"sections=.* has none of weights, gradients"):
    other = tiny.tiny_config("method=full", **FIELDS | {"analysis__sections": ("truncation",)})
    analyze.analyze(other, str(workdir), jax.devices()[:1], checkpoint="all")


@pytest.mark.parametrize("damage", ["[]", '{"layout": 0}'])
def test_damaged_files_are_made_again(analyzed, damage):
  _, workdir = analyzed
  before, path = read(workdir, "weights"), workdir / "analysis" / "weights.json"
  path.write_text(damage)
  fields = FIELDS | {"analysis__sections": ("weights",)}
  analyze.analyze(tiny.tiny_config("method=full", **fields), str(workdir), jax.devices()[:1])
  assert read(workdir, "weights") == before


def test_ranks_that_cut_nothing_are_refused(analyzed):
  _, workdir = analyzed
  fields = FIELDS | {"analysis__sections": ("truncation",), "analysis__ranks": (2, 32)}
  config = tiny.tiny_config("method=full", **fields)
  with pytest.raises(UserError, match="must end below 32"):
    analyze.analyze(config, str(workdir), jax.devices()[:1])


@pytest.mark.parametrize("split", ["train", "eval"])
def test_other_data_than_the_run_s_is_refused(analyzed, monkeypatch, split):
  config, workdir = analyzed
  other = dataclasses.replace(tiny.load_digits(split), fingerprint={"name": "other"})
  monkeypatch.setattr(Experiment, "source", lambda *args: other)
  run = analyze.Analysis(Experiment(config), workdir, jax.devices()[:1])
  with pytest.raises(UserError, match="holds a run on other data"):
    run.source(split)


def test_r_of_t_on_the_heat_map_is_what_a_run_would_take():
  config = tiny.tiny_config("method=full")
  found, dense = truncation_of(config), Experiment(config).plan
  name, r = analyze.schedule_on_map(config, dense, found)
  assert name.startswith("rank.schedule=measured at rank.ratio=0.5")
  plan = Experiment(tiny.tiny_config("method=static")).plan
  assert r.mean() == pytest.approx(np.mean([ranks.static_rank for _, ranks in plan.layers]))
  assert r.shape == (1000,)
  assert r[0] > r[999]
  assert analyze.schedule_on_map(config, dense, found | {"rise": [[None, 1.0]] * 3}) is None
  assert analyze.schedule_on_map(config, dense, found | {"ranks": (30, 31, 31)}) is None


def test_r_of_t_on_the_heat_map_of_an_adaptive_run_is_its_own():
  config = tiny.tiny_config("method=adaptive", **tiny.DEEPER)
  plan = Experiment(config).plan
  name, r = analyze.schedule_on_map(config, plan, truncation_of(config))
  assert "own" in name
  for t in (0, 600, 999):
    bucket = plan.bucket_of_timestep[t]
    assert r[t] == np.mean([ranks.active[bucket] for _, ranks in plan.layers])


def test_the_flops_section_needs_no_checkpoint(tmp_path, capsys):
  config = tiny.tiny_config("method=static", analysis__sections=("flops",))
  analyze.analyze(config, str(tmp_path / "new"), jax.devices()[:1])
  assert json.loads((tmp_path / "new" / "analysis" / "flops.json").read_text()).keys() == set(ARMS)
  assert "million MACs" in capsys.readouterr().out
  with pytest.raises(UserError, match="is not the workdir of a run"):
    analyze.analyze(tiny.tiny_config("method=static"), str(tmp_path / "new"), jax.devices()[:1])


def test_counts_of_every_arm_by_bucket_and_sampling_run():
  config = tiny.tiny_config("method=static")
  arms = analyze.count_flops(config)
  adaptive = tiny.tiny_config("method=adaptive")
  shape, plan = Experiment(adaptive).shape, Experiment(adaptive).plan
  buckets = arms["adaptive"]["buckets"]
  assert [b["forward_macs"] for b in buckets] == [
    flops.forward_macs(shape, plan, bucket) for bucket in range(plan.num_buckets)
  ]
  mean = sum(b["timesteps"] * b["forward_macs"] for b in buckets) / 1000
  assert mean == pytest.approx(arms["adaptive"]["mean_forward_macs"])
  assert arms["full"]["sampling_macs"] == 10 * arms["full"]["buckets"][0]["forward_macs"]
  assert arms["static"]["parameters"] < arms["full"]["parameters"]
  table = analyze.format_flops(arms).splitlines()
  assert len(table) == 5 + plan.num_buckets
  assert f"{arms['full']['parameters']:,}" in table[1]


@pytest.mark.parametrize(
  ("field", "value"),
  [("sections", ("weight",)), ("batch_sizes", (16, 16)), ("batch_sizes", ()), ("ranks", (8, 4))],
)
def test_settings_that_cannot_work_are_refused(field, value):
  with pytest.raises(UserError, match=f"analysis.{field}"):
    tiny.tiny_config(**{f"analysis__{field}": value})
