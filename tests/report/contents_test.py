"""What a report holds: arms, spread, what may be compared, the claim, and damaged workdirs."""

import json
import shlex
import statistics

import numpy as np
import pytest

import main
from lrdit.config.resolve import resolve
from lrdit.experiment import Experiment
from lrdit.model import flops
from lrdit.modes import analyze
from lrdit.report import claim as report_claim
from lrdit.report import compare, plots, rows, runs
from lrdit.report.arms import group_arms
from lrdit.report.contents import make_report
from lrdit.report.page import render
from lrdit.runtime.errors import UserError
from tests import tiny
from tests.workdirs import METADATA, edit, make_run, make_samples, write


@pytest.fixture
def render_text(monkeypatch):
  """Renders a page without plots, which take a second or two."""
  monkeypatch.setattr(plots, "draw", lambda *args, **settings: None)
  return render


def cells_of(made, key):
  return next(row.cells for row in made.rows if row.key == key)


def summaries_of(made, key, arm):
  return cells_of(made, key)[arm].summaries


def comparison_of(made, arm, baseline=0):
  found = next(c for c in made.comparisons if (c.arm, c.baseline) == (arm, baseline))
  return {row.key: row for row in found.rows}


def notes_of(made, arm=0, run=0):
  return " ".join(made.arms[arm].runs[run].notes)


def test_runs_that_differ_only_in_their_seed_are_one_arm(made, tmp_path, workdirs):
  assert [arm.name for arm in made.arms] == ["full", "adaptive", "static"]
  assert [[run.seed for run in arm.runs] for arm in made.arms] == [[0, 1], [0, 1, 2], [0]]
  paths = [make_run(tmp_path / str(seed), seed=seed) for seed in (10, 4294967295, 2)]
  (arm,) = group_arms([*map(runs.read_run, paths)])
  assert [run.seed for run in arm.runs] == [2, 10, 4294967295]
  with pytest.raises(UserError, match="hold the same run"):
    make_report([workdirs[0], workdirs[0]], "out")


def test_arms_of_one_method_are_named_by_what_differs(tmp_path):
  def name_arms(**configs):
    for name, fields in configs.items():
      make_run(tmp_path / name, "adaptive")
      edit(tmp_path / name / "config.json", lambda config, f=fields: config["rank"].update(f))
    return [arm.name for arm in group_arms([runs.read_run(str(tmp_path / n)) for n in configs])]

  assert name_arms(a={}, b={"ratio": 0.25}) == ["adaptive (ratio 0.5)", "adaptive (ratio 0.25)"]
  shares = [[1.0, 0.87654321, 0.54321012], [1.0, 0.87654321, 0.54321013]]
  one, two = ({"schedule": "measured", "measured_shares": own} for own in shares)
  # Long values name an arm only if nothing else tells it apart.
  assert name_arms(a=one, b={"schedule": "constant"}) == [
    "adaptive (schedule measured)",
    "adaptive (schedule constant)",
  ]
  assert name_arms(a=one, b=two) == [f"adaptive (measured_shares {own})" for own in shares]


def test_a_start_from_trained_parameters_is_named_by_its_run(tmp_path):
  starts = {"a": {}, "b": {"from_": "runs/digits_full_{seed}", "compression": "whitened"}}
  for name, fields in starts.items():
    make_run(tmp_path / name, "adaptive")
    edit(tmp_path / name / "config.json", lambda config, f=fields: config["init"].update(f))
  arms = group_arms([runs.read_run(str(tmp_path / name)) for name in starts])
  assert [arm.name for arm in arms] == [
    "adaptive",
    "adaptive (compression whitened, from digits_full_{seed})",
  ]


def test_a_change_of_the_config_makes_another_arm_and_how_it_was_computed_does_not(tmp_path):
  paths = [tmp_path / name for name in "abcd"]
  for seed, path in enumerate(paths):
    make_run(path, seed=seed)
  edit(paths[1] / "config.json", lambda c: c["model"].update(remat=True, scan_blocks=True))
  edit(paths[1] / "config.json", lambda c: c["rank"].update(compute="masked"))
  edit(paths[2] / "config.json", lambda c: c["model"].update(dtype="bfloat16"))
  change = {"step": 4, "field": "optimizer.learning_rate", "before": 0.1, "after": 0.2}
  irrelevant = {"step": 4, "field": "model.remat", "before": False, "after": True}
  lines = [json.dumps(change), json.dumps({"step": "x"}), "{", json.dumps(irrelevant)]
  (paths[3] / "changes.jsonl").write_text("\n".join(lines))
  (paths[0] / "changes.jsonl").write_text(json.dumps(irrelevant))
  made = make_report([*map(str, paths)], "x")
  assert [[run.seed for run in arm.runs] for arm in made.arms] == [[0, 1], [2], [3]]
  assert "learning_rate at step 4 0.1 to 0.2" in made.arms[2].name
  assert "optimizer.learning_rate changed from 0.1 to 0.2 after step 4" in notes_of(made, 2)


def test_the_plan_s_numbers_agree_with_the_arms(made):
  full, adaptive, static = (arm.model for arm in made.arms)
  assert made.layer == "blocks_1/mlp/fc1"
  config = tiny.tiny_config("method=adaptive", **tiny.DEEPER)
  shape, plan = Experiment(config).shape, Experiment(config).plan
  assert [bucket["parameters"] for bucket in adaptive.buckets] == [
    flops.num_parameters(shape, plan.at_bucket(bucket)) for bucket in range(plan.num_buckets)
  ]
  assert sum(bucket["timesteps"] for bucket in adaptive.buckets) == 1000
  assert full.active_rank[made.layer] == [32]
  assert adaptive.mean_ratio == pytest.approx(0.5, abs=0.05)
  assert static.parameters < full.parameters
  assert adaptive.ratio == sorted(adaptive.ratio)


def test_macs_of_an_image(tmp_path):
  path = tmp_path / "run"
  samples = {
    "a": make_samples(path, "a"),
    "b": make_samples(path, "b", num_steps=20, guidance_scale=2.0),
    "c": make_samples(path, "c", solver="unheard-of"),
  }
  made = make_report([make_run(path, "adaptive", samples=samples)], "out")
  config = tiny.tiny_config("method=adaptive", **tiny.DEEPER)
  shape, plan = Experiment(config).shape, Experiment(config).plan
  macs = [row.cells[0].exact for row in made.rows if row.key == "sampling_macs"]
  t = Experiment(tiny.tiny_config(sampling__num_steps=20, **tiny.DEEPER)).solver_table.t
  both_passes = [2 * flops.forward_macs(shape, plan, int(plan.bucket_of_timestep[i])) for i in t]
  once = analyze.count_flops(config)["adaptive"]["sampling_macs"]
  assert macs == [once, sum(both_passes), None]


def test_mean_and_spread_over_seeds(made):
  (group,) = summaries_of(made, "held_out_loss_ema", 1)
  assert (group.n, group.num_runs) == (3, 3)
  assert group.mean == pytest.approx(0.208, rel=1e-12)
  assert group.std == pytest.approx(statistics.stdev([0.206, 0.208, 0.210]), rel=1e-12)
  (single,) = summaries_of(made, "held_out_loss_ema", 2)
  assert (single.n, single.std) == (1, None)
  by_timestep = made.arms[0].held_out
  assert [(g.t_first, g.t_last, g.n) for g in by_timestep] == [(0, 499, 2), (500, 999, 2)]
  assert by_timestep[0].mean == pytest.approx(1.5 * 0.201)
  assert by_timestep[0].std == pytest.approx(1.5 * 0.002 / 2**0.5)


def test_comparison_with_the_full_arm(made):
  held_out = comparison_of(made, 1)["held_out_loss_ema"]
  assert held_out.value == pytest.approx(0.208 / 0.201, rel=1e-12)
  # Each mean's relative standard error, added in squares.
  relative = np.hypot(0.002 / 3**0.5 / 0.208, 0.002 / 2**0.5 / 2**0.5 / 0.201)
  assert held_out.standard_error == pytest.approx(0.208 / 0.201 * relative, rel=1e-9)
  assert held_out.verdict == "larger than the seeds' spread"
  accuracy = comparison_of(made, 1)["classifier_recognition_accuracy"]
  assert accuracy.value == pytest.approx(1.0)
  assert accuracy.verdict == "within the seeds' spread"
  exact = [cell.exact for cell in cells_of(made, "mean_forward_macs")]
  assert comparison_of(made, 1)["mean_forward_macs"].value == exact[1] / exact[0] < 1
  assert comparison_of(made, 2)["held_out_loss_ema"].verdict.startswith("one seed")
  assert comparison_of(made, 1, baseline=2)["held_out_loss_ema"].value < 1


def test_adaptive_arms_are_compared_with_the_first_of_them(tmp_path):
  paths = [make_run(tmp_path / f"{i}", "adaptive", loss=0.2 + 0.01 * i) for i in range(3)]
  for i, schedule in enumerate(("measured", "increasing", "constant")):
    edit(tmp_path / f"{i}" / "config.json", lambda c, s=schedule: c["rank"].update(schedule=s))
  made = make_report(paths, "out")
  assert [(c.arm, c.baseline, c.also) for c in made.comparisons] == [(1, 0, []), (2, 0, [])]
  assert comparison_of(made, 2)["held_out_loss_ema"].value == pytest.approx(0.22 / 0.2)


def test_samples_of_another_seed_count_as_further_samples(tmp_path, render_text):
  path = tmp_path / "run"
  samples = {
    "a": make_samples(path, "a", 0.90),
    "b": make_samples(path, "b", 0.94, seed=1),
    "c": make_samples(path, "c", 0.5, guidance_scale=2.0),
  }
  made = make_report([make_run(path, samples=samples)], "out")
  found = [row for row in made.rows if row.key == "classifier_recognition_accuracy"]
  assert [row.settings["guidance_scale"] for row in found] == [1.0, 2.0]
  (group,) = found[0].cells[0].summaries
  assert (group.n, group.num_runs, group.run_std) == (2, 1, None)
  assert group.mean == pytest.approx(0.92)
  assert "1 seed, n = 2 sets of samples" in render_text(made)


@pytest.mark.parametrize(
  ("key", "words", "held_out", "digest"),
  [
    ("held_out_loss_ema", "held_out.draws 8, not 4", {"draws": 8}, "ab"),
    ("held_out_loss_ema", "held_out.seed 1, not 0", {"seed": 1}, "ab"),
    ("classifier_recognition_accuracy", "extractor digest cd, not ab", {}, "cd"),
  ],
)
def test_other_protocols_are_flagged_and_not_compared(
  tmp_path, render_text, key, words, held_out, digest
):
  full, path = make_run(tmp_path / "full"), tmp_path / "other"
  samples = {"default": make_samples(path, digest=digest)}
  other = make_run(path, "adaptive", samples=samples)
  edit(path / "evaluation.json", lambda evaluation: evaluation["held_out"].update(held_out))
  made = make_report([full, other], "out")
  assert [summaries_of(made, key, arm)[0].differs for arm in (0, 1)] == ["", words]
  compared = comparison_of(made, 1)[key]
  assert (compared.missing, compared.value) == (f"not compared: {words}", None)
  assert f"not comparable: {words}" in render_text(made)


def test_losses_by_timestep_of_another_protocol_are_left_out(tmp_path, render_text):
  paths = [make_run(tmp_path / "full")]
  for seed, held_out in enumerate(({}, {"dtype": "bfloat16"}, {"data": {"name": "other"}})):
    path = tmp_path / f"adaptive_{seed}"
    paths.append(make_run(path, "adaptive", seed, 0.1 + seed))
    edit(path / "evaluation.json", lambda e, changed=held_out: e["held_out"].update(changed))
  made = make_report(paths, "out")
  adaptive = made.arms[1]
  assert [(g.n, g.mean) for g in adaptive.held_out] == [
    (1, pytest.approx(0.15)),
    (1, pytest.approx(0.05)),
  ]
  dtype, data = adaptive.left_out
  assert dtype == "held_out.dtype bfloat16, not float32"
  assert data == "held_out.data.name other, not digits; held_out.data.split nothing, not test"
  assert f"1 of 3 runs of adaptive left out, measured differently: {dtype}" in render_text(made)


def test_only_inception_gives_an_fid(page):
  assert rows.describe_metric("inception_frechet_distance")[0] == "FID (inception)"
  assert rows.describe_metric("classifier_frechet_distance")[0] == "Frechet distance (classifier)"
  assert page.count("FID") == page.count("FID (inception)")


def test_training_time_counts_untimed_windows_at_the_mean_speed(made):
  lines = [
    {"step": 10, "train/loss": 1.0},
    {"step": 20, "train/loss": 1.0, "train/images_per_second": 50.0},
    {"step": 25, "eval/loss": 1.0},
    {"step": 30, "train/loss": 1.0, "train/images_per_second": 100.0},
  ]
  assert runs.training_speed(lines, batch_size=10) == (300, 200 / 3)
  assert runs.training_speed(lines[:1], 10) == (100, None)
  (group,) = summaries_of(made, "training_seconds", 2)  # 8 steps of 16 images at 100 images/s
  assert group.mean == pytest.approx(1.28)


def test_sampling_speed_counts_all_images_that_were_drawn(tmp_path, made):
  # 30 images in 4 s, of which 20 were kept.
  assert summaries_of(made, "sampling_images_per_second", 0)[0].mean == 7.5
  path = tmp_path / "run"
  samples = make_samples(path)
  del samples["metadata"]["num_drawn"]
  write(path / "samples" / "default" / "metadata.json", samples["metadata"])
  older = make_report([make_run(path, samples={"default": samples})], "out")
  assert summaries_of(older, "sampling_images_per_second", 0) == []
  assert notes_of(older) == ""


def test_missing_and_damaged_pieces_become_notes(tmp_path):
  whole, bare, torn = (make_run(tmp_path / n, seed=i) for i, n in enumerate(("a", "b", "c")))
  for file in ("metrics.jsonl", "evaluation.json", "data.json", "samples/default/metadata.json"):
    (tmp_path / "b" / file).unlink()
  (tmp_path / "c" / "metrics.jsonl").write_text('{"step": 4, "train/loss": NaN}\n{"step": 8, "tr')
  (tmp_path / "c" / "evaluation.json").write_text("{")
  (tmp_path / "c" / "samples" / "default" / "samples.npz").write_bytes(b"PK")
  for workdirs in ([bare], [torn], [bare, torn, whole]):
    made = make_report(workdirs, "out")
    assert "—" in render(made)
  notes = {run.workdir: " ".join(run.notes) for arm in made.arms for run in arm.runs}
  assert notes[whole] == ""
  for words in ("no metrics.jsonl", "no evaluation.json", "no finished set", "at step 0 of 8"):
    assert words in notes[bare]
  damaged = ("metrics.jsonl is damaged after 1", "evaluation.json is damaged", "at step 4 of 8")
  for words in damaged:
    assert words in notes[torn]
  alone = make_report([torn], "out")
  assert "samples.npz is damaged (File is not a zip file)" in notes_of(alone)


def test_damaged_timestep_groups_and_paths_become_notes(tmp_path):
  path = tmp_path / "run"
  make_run(path)

  def damage(evaluation):
    del evaluation["held_out"]["ema"]["groups"][0]["t_first"]
    evaluation["held_out"]["raw"]["groups"] = 3

  edit(path / "evaluation.json", damage)
  (path / "samples" / "default" / "path.png").write_bytes(b"PNG")
  made = make_report([str(path)], "out")
  assert [group.t_first for group in made.arms[0].held_out] == [500]
  assert "1 of 2 timestep groups (ema weights) are damaged" in notes_of(made)
  assert "1 of 1 timestep groups (raw weights) are damaged" in notes_of(made)
  assert "the path of the samples 'default' is damaged" in notes_of(made)
  assert made.grids[0].path is None
  assert "The path of one sample" not in render(made)


def test_a_run_of_an_older_version_is_in_the_arm_of_a_new_one(tmp_path):
  def age(config):
    del config["rank"]["logistic_steepness"]
    config["optimizer"].pop("beta1")
    config["training"]["eval_every_steps"] = 0  # stood for None

  new, old = make_run(tmp_path / "new"), make_run(tmp_path / "old", seed=1)
  edit(tmp_path / "old" / "config.json", age)
  made = make_report([new, old], "out")
  assert len(made.arms) == 1
  assert made.arms[0].model is not None
  assert notes_of(made) == ""


def test_a_config_of_another_version_becomes_a_note(tmp_path, render_text):
  make_run(tmp_path / "run")
  write(tmp_path / "run" / "config.json", {"method": "full", "seed": 0, "model": {"width": 3}})
  made = make_report([str(tmp_path / "run")], "out")
  assert "does not fit this version" in notes_of(made)
  assert "No file of configs/" in render_text(made)


@pytest.mark.parametrize(
  ("key", "value", "against", "worst", "outcome", "better"),
  [
    ("points", 100 * (0.96 - 0.98), "full", 2.0, "kept", "full"),  # -2.0000000000000018
    ("points", 100 * (0.3 - (0.1 + 0.2)), "full", 2.0, "kept", "neither"),
    ("ratio", 1.03 + 2e-16, "full", 3.0, "kept", "full"),
    ("ratio", 1 - 2e-16, "full", 3.0, "kept", "neither"),
    ("ratio", 1.031, "full", 3.0, "missed by 0.1 %", "full"),
    ("ratio", 1 - 2e-16, "static", 0.0, "missed by 0 %", "neither"),
  ],
)
def test_rounding_neither_misses_nor_keeps_a_target(key, value, against, worst, outcome, better):
  difference = compare.Difference("", "", "", "", key, value=value)
  target = report_claim.Target(against, "", "", worst, "")
  judged = report_claim.judge_difference(difference, target)
  assert (judged.outcome, judged.better) == (outcome, better)


def test_the_claim_is_judged_check_by_check(made):
  (claim,) = made.claim
  checks = {(check.against, check.key): check for check in claim.checks}
  loss = checks["full", "held_out_loss_ema"]
  excess = 100 * (0.208 / 0.201 - 1)
  assert loss.value == pytest.approx(excess, rel=1e-9)
  assert loss.outcome == f"missed by {excess - 3:.3g} %"
  assert loss.label == "held-out loss, EMA weights"
  assert (loss.better, loss.verdict) == ("full", "larger than the seeds' spread")
  compared = comparison_of(made, 1)
  assert loss.standard_error == 100 * compared["held_out_loss_ema"].standard_error
  assert loss.macs_ratio == compared["mean_forward_macs"].value < 1
  accuracy = checks["full", "classifier_recognition_accuracy"]
  assert (accuracy.outcome, accuracy.better) == ("kept", "adaptive")
  for key in ("held_out_loss_ema", "inception_frechet_distance"):
    control = checks["static", key]
    assert (control.outcome, control.better) == ("kept", "adaptive")
    assert control.value == pytest.approx(100 * (0.208 / 0.3 - 1), rel=1e-9)
    assert control.standard_error is None
    assert control.macs_ratio == comparison_of(made, 1, 2)["mean_forward_macs"].value
  assert loss.better_seeds == "0 of 2"
  assert checks["static", "held_out_loss_ema"].better_seeds == "1 of 1"
  assert checks["narrow", "held_out_loss_ema"].outcome == "not measured"
  assert len(checks) == len(claim.checks) == 6


def test_the_claim_reports_what_is_missed_or_not_measured(tmp_path, render_text):
  paths = [
    make_run(tmp_path / "full", "full", 0, 0.2, 0.95),
    make_run(tmp_path / "adaptive", "adaptive", 0, 0.205, 0.925),
    make_run(tmp_path / "static", "static", 0, 0.2),
    make_run(tmp_path / "narrow", "narrow", 0, 0.22),
  ]
  (claim,) = make_report(paths, "out").claim
  missed = ("missed by 2.5 %", "static")
  assert [(check.outcome, check.better) for check in claim.checks] == [
    ("kept", "full"),
    ("missed by 0.5 points", "full"),
    ("kept", "adaptive"),
    ("kept", "adaptive"),
    missed,
    missed,
  ]
  made = make_report(paths[:1], "out")
  assert [check.outcome for check in made.claim[0].checks] == ["not measured"] * 6
  assert render_text(made).count("<strong>not measured</strong>") == 6


def test_grids_show_the_same_indices_and_what_differs(tmp_path, made):
  assert [grid.arm for grid in made.grids] == [0, 1, 2]
  assert {grid.differs for grid in made.grids} == {""}
  assert made.grids[0].labels == [i % 10 for i in range(20)]
  assert made.grids[0].path.ranks == {"blocks_1/mlp/fc1": [3, 8]}
  full, path = make_run(tmp_path / "full"), tmp_path / "other"
  samples = {
    "default": make_samples(path, seed=5),
    "far": make_samples(path, "far", eta=0.5, seed=5),
  }
  grids = make_report([full, make_run(path, "static", samples=samples)], "out").grids
  assert (grids[1].sample_set, grids[1].differs) == ("default", "seed 5, not 0")


def test_grids_of_other_labels_are_marked_and_cut_alike(tmp_path):
  paths = [make_run(tmp_path / "full"), make_run(tmp_path / "static", "static")]
  images, labels = np.zeros((12, 8, 8, 3), np.uint8), np.zeros(12, np.int64)
  directory = tmp_path / "static" / "samples" / "default"
  np.savez(directory / "samples.npz", arr_0=images, arr_1=labels)
  write(directory / "metadata.json", METADATA | {"num_samples": 12})
  grids = make_report(paths, "out").grids
  assert [len(grid.labels) for grid in grids] == [12, 12]
  assert grids[0].size == grids[1].size
  assert grids[1].differs == "other labels"


def test_commands_make_the_same_config_again(made, monkeypatch):
  monkeypatch.chdir(tiny.ROOT)
  run = made.arms[1].runs[2]
  train, sample, evaluate = (shlex.split(command) for command in run.commands)
  config = resolve(main.parse_flags(train[1:]).config)
  assert json.loads(json.dumps(config.to_dict())) == run.config
  assert ("--mode=sample" in sample, "--mode=evaluate" in evaluate) == (True, True)
  sampling = main.parse_flags(sample[1:]).config.sampling
  assert (sampling.num_samples, sampling.name, sampling.seed) == (20, "default", 0)
  assert main.parse_flags(evaluate[1:]).config.evaluation.max_features == 77


def test_the_report_s_own_command_names_workdirs_with_commas(tmp_path):
  paths = [make_run(tmp_path / name, seed=seed) for seed, name in enumerate(("a,b", 'c "d"'))]
  command = make_report(paths, "x").made.command
  assert main.parse_flags(shlex.split(command)[1:]).workdirs == paths
