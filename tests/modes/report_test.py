"""The report over workdirs made by hand: arms, spread, what is compared, and the page."""

import copy
import html.parser
import json
import re
import shlex
import statistics
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

import main
from lrdit.config.resolve import resolve
from lrdit.experiment import Experiment
from lrdit.model import flops
from lrdit.modes import analyze, report
from lrdit.report import claim as report_claim
from lrdit.report import commands, plots
from lrdit.report import compare as report_compare
from lrdit.report import page as report_page
from lrdit.report import runs as report_runs
from lrdit.runtime.errors import UserError
from tests import tiny

METADATA = {
  "checkpoint_step": 8,
  "weights": "ema",
  "num_samples": 20,
  "has_labels": True,
  "num_drawn": 30,
  "solver": "ddim",
  "num_steps": 10,
  "eta": 0.0,
  "guidance_scale": 1.0,
  "clip_x_0": True,
  "seed": 0,
  "labels": "balanced",
  "dtype": "float32",
  "wall_clock_seconds": 4.0,
  "compile_seconds": 2.5,
  "backend": "cpu",
  "num_devices": 1,
  "jax": "0.10.2",
}
HELD_OUT = {"draws": 4, "examples": 299, "seed": 0, "batch_size": 16, "dtype": "float32"}
HELD_OUT |= {"data": {"name": "digits", "split": "test"}}
SOFTWARE = {"python": "3.12.3", "jax": "0.10.2", "flax": "0.12.1", "lrdit": "1.5", "backend": "cpu"}
REFERENCE = {"split": "train", "num_images": 1498}


def write(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value))


def losses(loss):
  groups = [
    {"t_first": 0, "t_last": 499, "loss": 1.5 * loss, "examples": 150},
    {"t_first": 500, "t_last": 999, "loss": 0.5 * loss, "examples": 149},
  ]
  return {"loss": loss, "groups": groups}


def export(workdir, name="default", accuracy=0.9, distance=20.0, digest="ab", **metadata):
  """Samples and what evaluation.json says of them."""
  metadata = METADATA | metadata
  images = np.random.default_rng(metadata["seed"]).integers(0, 256, (20, 8, 8, 3), np.uint8)
  write(workdir / "samples" / name / "metadata.json", metadata)
  np.savez(workdir / "samples" / name / "samples.npz", arr_0=images, arr_1=np.arange(20) % 10)
  figures = {
    "classifier_recognition_accuracy": accuracy,
    "classifier_recognition_accuracy_of_held_out_images": 0.987,
    "classifier_num_samples": 20,
    "inception_frechet_distance": distance,
  }
  extractors = {"classifier": {"digest": digest}, "inception": {"digest": "1"}}
  return {
    "metadata": metadata,
    "figures": figures,
    "extractors": extractors,
    "reference": REFERENCE,
  }


def make_run(workdir, method="full", seed=0, loss=0.2, accuracy=0.9, rate=100.0, exports=None):
  """A workdir of a run of 8 steps with everything in it."""
  config = tiny.tiny_config(f"method={method}", seed=seed).to_dict()
  write(workdir / "config.json", config)
  write(workdir / "data.json", {"train": {"name": "digits"}, "eval": {"name": "digits"}})
  lines = [
    {"step": 4, "train/loss": 0.9},
    {"step": 8, "train/loss": 2 * loss, "train/images_per_second": rate, "eval/loss": loss},
  ]
  lines[1] |= {"train/loss_t0000-0499": 3 * loss, "train/loss_t0500-0999": loss}
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  if exports is None:
    exports = {"default": export(workdir, accuracy=accuracy, distance=100 * loss)}
  evaluation = {
    "checkpoint_step": 8,
    "held_out": HELD_OUT | {"raw": losses(1.1 * loss), "ema": losses(loss)},
    "samples": exports,
    "software": SOFTWARE,
    "settings": config["evaluation"] | {"max_features": 77},
  }
  write(workdir / "evaluation.json", evaluation)
  return str(workdir)


def rows_of(made):
  return {row["key"]: row for row in made["rows"]}


def groups_of(made, key, arm):
  return rows_of(made)[key]["cells"][arm]["groups"]


def comparison_of(made, arm, baseline=0):
  found = [c for c in made["comparisons"] if (c["arm"], c["baseline"]) == (arm, baseline)]
  return {row["key"]: row for row in found[0]["rows"]}


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
  """Two seeds of full, three of adaptive, one static."""
  root = tmp_path_factory.mktemp("runs")
  values = {
    "full": ((0.200, 0.90), (0.202, 0.94)),
    "adaptive": ((0.206, 0.95), (0.208, 0.91), (0.210, 0.93)),
    "static": ((0.3, 0.8),),
  }
  return [
    make_run(root / f"{method}_{seed}", method, seed, *figures, rate=100.0 + 10 * seed)
    for method, of_seed in values.items()
    for seed, figures in enumerate(of_seed)
  ]


@pytest.fixture(scope="module")
def made(workdirs):
  return report.make_report(workdirs, "out")


@pytest.fixture(scope="module")
def page(made):
  return report_page.render(made)


def test_runs_that_differ_only_in_their_seed_are_one_arm(made):
  assert [arm["name"] for arm in made["arms"]] == ["full", "adaptive", "static"]
  assert [[run["seed"] for run in arm["runs"]] for arm in made["arms"]] == [[0, 1], [0, 1, 2], [0]]


def test_long_fields_name_an_arm_only_where_no_other_does(tmp_path):
  def name_arms(**schedules):
    runs = []
    for name, (schedule, shares) in schedules.items():
      runs.append(make_run(tmp_path / name, "adaptive"))
      config = json.loads((tmp_path / name / "config.json").read_text())
      config["rank"] |= {"schedule": schedule, "measured_shares": shares}
      write(tmp_path / name / "config.json", config)
    return [arm["name"] for arm in report.group_arms(list(map(report_runs.read_run, runs)))]

  a, b = [1.0, 0.87654321, 0.54321012], [1.0, 0.87654321, 0.54321013]
  assert name_arms(a=("measured", a), c=("constant", [])) == [
    "adaptive (schedule measured)",
    "adaptive (schedule constant)",
  ]
  assert name_arms(a=("measured", a), b=("measured", b)) == [
    f"adaptive (measured_shares {a})",
    f"adaptive (measured_shares {b})",
  ]


def test_macs_of_a_bucket_and_of_an_image(tmp_path):
  run = tmp_path / "run"
  drawn = {"a": export(run, "a"), "b": export(run, "b", num_steps=20, guidance_scale=2.0)}
  drawn["c"] = export(run, "c", solver="unheard-of")
  path = make_run(run, "adaptive", exports=drawn)
  made = report.make_report([path], "out")
  config = tiny.tiny_config("method=adaptive")
  shape, plan = Experiment(config).shape, Experiment(config).plan
  (cell,) = rows_of(made)["buckets"]["cells"]
  assert [bucket["parameters"] for bucket in cell["exact"]] == [
    flops.num_parameters(shape, plan.at_bucket(bucket)) for bucket in range(plan.num_buckets)
  ]
  macs = [row["cells"][0] for row in made["rows"] if row["key"] == "sampling_macs"]
  assert macs[0]["exact"] == analyze.count_flops(config)["adaptive"]["sampling_macs"]
  t = Experiment(tiny.tiny_config(sampling__num_steps=20)).solver_table.t
  both_passes = [2 * flops.forward_macs(shape, plan, int(plan.bucket_of_timestep[i])) for i in t]
  assert macs[1]["exact"] == sum(both_passes)
  assert macs[2] == {"groups": []}


def test_mean_and_spread_over_seeds(made):
  (group,) = groups_of(made, "held_out_loss_ema", 1)
  assert (group["n"], group["num_runs"]) == (3, 3)
  assert group["mean"] == pytest.approx(0.208, rel=1e-12)
  assert group["std"] == pytest.approx(statistics.stdev([0.206, 0.208, 0.210]), rel=1e-12)
  (single,) = groups_of(made, "held_out_loss_ema", 2)
  assert (single["n"], single["std"]) == (1, None)


def test_comparison_with_the_full_arm(made):
  held_out = comparison_of(made, 1)["held_out_loss_ema"]
  assert held_out["value"] == pytest.approx(0.208 / 0.201, rel=1e-12)
  # Each mean's relative standard error, added in squares.
  relative = np.hypot(0.002 / 3**0.5 / 0.208, 0.002 / 2**0.5 / 2**0.5 / 0.201)
  assert held_out["standard_error"] == pytest.approx(0.208 / 0.201 * relative, rel=1e-9)
  assert held_out["verdict"] == "larger than the seeds' spread"
  accuracy = comparison_of(made, 1)["classifier_recognition_accuracy"]
  assert accuracy["value"] == pytest.approx(1.0)
  assert accuracy["verdict"] == "within the seeds' spread"
  macs = comparison_of(made, 1)["mean_forward_macs"]
  exact = [cell["exact"] for cell in rows_of(made)["mean_forward_macs"]["cells"]]
  assert macs["value"] == exact[1] / exact[0] < 1
  assert comparison_of(made, 2)["held_out_loss_ema"]["verdict"].startswith("one seed")
  assert comparison_of(made, 1, baseline=2)["held_out_loss_ema"]["value"] < 1


def test_adaptive_arms_are_compared_with_the_first_of_them(tmp_path):
  runs = [make_run(tmp_path / f"{i}", "adaptive", loss=0.2 + 0.01 * i) for i in range(3)]
  for i, schedule in enumerate(("measured", "increasing", "constant")):
    config = json.loads((tmp_path / f"{i}" / "config.json").read_text())
    config["rank"]["schedule"] = schedule
    write(tmp_path / f"{i}" / "config.json", config)
  made = report.make_report(runs, "out")
  assert [(c["arm"], c["baseline"]) for c in made["comparisons"]] == [(1, 0), (2, 0)]
  assert comparison_of(made, 2)["held_out_loss_ema"]["value"] == pytest.approx(0.22 / 0.2)
  assert made["comparisons"][0]["also"] == []
  assert "adaptive (schedule measured)" in report_page.render(made)


def test_accuracy_is_compared_in_points():
  def cell(*values):
    return report_compare.summarise(
      [{"value": v, "workdir": str(i), "protocol": {}}] for i, v in enumerate(values)
    )

  compared = report_compare.compare_cells(cell(0.95, 0.97), cell(0.98, 0.99), "points")
  assert compared["value"] == pytest.approx(-2.5)
  assert compared["standard_error"] == pytest.approx(100 * np.hypot(0.01, 0.005))
  assert compared["spread"] == pytest.approx(0.02 / 2**0.5)
  # 0.3 and 0.1 + 0.2 are one number but for rounding, and no spread is larger than none.
  equal = report_compare.compare_cells(cell(0.3, 0.3), cell(0.1 + 0.2, 0.1 + 0.2), "points")
  assert equal["verdict"] == "within the seeds' spread"


@pytest.mark.parametrize(
  ("key", "value", "outcome", "better"),
  [
    ("recognition_accuracy", 100 * (0.96 - 0.98), "kept", "full"),  # -2.0000000000000018
    ("recognition_accuracy", 100 * (0.3 - (0.1 + 0.2)), "kept", "neither"),
    ("held_out_loss_ema", 1.03 + 2e-16, "kept", "full"),
    ("held_out_loss_ema", 1 - 2e-16, "kept", "neither"),
    ("held_out_loss_ema", 1.031, "missed by 0.1 %", "full"),
  ],
)
def test_a_target_that_is_met_but_for_rounding_is_met(key, value, outcome, better):
  compare, worst = ("ratio", 3.0) if key == "held_out_loss_ema" else ("points", 2.0)
  row = {"compare": compare, "value": value, "standard_error": None, "verdict": ""}
  judged = report_claim._outcome(row, "full", worst)
  assert (judged["outcome"], judged["better"]) == (outcome, better)


def test_equal_arms_do_not_beat_each_other_by_rounding():
  row = {"compare": "ratio", "value": 1 - 2e-16, "standard_error": None, "verdict": ""}
  assert report_claim._outcome(row, "static", 0.0)["outcome"] == "missed by 0 %"


def test_exports_of_other_seeds_are_further_samples(tmp_path):
  run = tmp_path / "run"
  drawn = {"a": export(run, "a", 0.90), "b": export(run, "b", 0.94, seed=1)}
  drawn["c"] = export(run, "c", 0.5, guidance_scale=2.0)
  made = report.make_report([make_run(run, exports=drawn)], "out")
  rows = [row for row in made["rows"] if row["key"] == "classifier_recognition_accuracy"]
  assert [row["settings"]["guidance_scale"] for row in rows] == [1.0, 2.0]
  (group,) = rows[0]["cells"][0]["groups"]
  assert (group["n"], group["num_runs"], group["run_std"]) == (2, 1, None)
  assert group["mean"] == pytest.approx(0.92)
  assert "1 seed, n = 2 exports" in report_page.render(made)


@pytest.mark.parametrize(
  ("key", "words", "held_out", "digest"),
  [
    ("held_out_loss_ema", "held_out.draws 8, not 4", {"draws": 8}, "ab"),
    ("held_out_loss_ema", "held_out.seed 1, not 0", {"seed": 1}, "ab"),
    ("classifier_recognition_accuracy", "extractor digest cd, not ab", {}, "cd"),
  ],
)
def test_other_protocols_are_flagged_and_not_compared(tmp_path, key, words, held_out, digest):
  full, path = make_run(tmp_path / "full"), tmp_path / "other"
  other = make_run(path, "adaptive", exports={"default": export(path, digest=digest)})
  evaluation = json.loads((path / "evaluation.json").read_text())
  evaluation["held_out"] |= held_out
  write(path / "evaluation.json", evaluation)
  made = report.make_report([full, other], "out")
  assert groups_of(made, key, 0)[0]["differs"] == ""
  assert groups_of(made, key, 1)[0]["differs"] == words
  compared = comparison_of(made, 1)[key]
  assert (compared["missing"], "value" in compared) == (f"not compared: {words}", False)
  assert f"not comparable: {words}" in report_page.render(made)


def test_only_inception_gives_an_fid(page):
  assert report_compare.describe("inception_frechet_distance")[0] == "FID (inception)"
  assert report_compare.describe("classifier_frechet_distance")[0] == (
    "Frechet distance (classifier)"
  )
  assert page.count("FID") == page.count("FID (inception)")


def test_training_time_counts_untimed_windows_at_the_mean_speed():
  lines = [
    {"step": 10, "train/loss": 1.0},
    {"step": 20, "train/loss": 1.0, "train/images_per_second": 50.0},
    {"step": 25, "eval/loss": 1.0},
    {"step": 30, "train/loss": 1.0, "train/images_per_second": 100.0},
  ]
  speed = report_runs.training_speed(lines, batch_size=10)
  assert speed == {"images": 300, "images_per_second": 200 / 3, "seconds": 4.5}
  assert report_runs.training_speed(lines[:1], 10)["seconds"] is None


def test_missing_pieces_are_missing(tmp_path):
  whole, bare, torn = (make_run(tmp_path / n, seed=i) for i, n in enumerate(("a", "b", "c")))
  for file in ("metrics.jsonl", "evaluation.json", "data.json", "samples/default/metadata.json"):
    (tmp_path / "b" / file).unlink()
  (tmp_path / "c" / "metrics.jsonl").write_text('{"step": 4, "train/loss": NaN}\n{"step": 8, "tr')
  (tmp_path / "c" / "evaluation.json").write_text("{")
  (tmp_path / "c" / "samples" / "default" / "samples.npz").write_bytes(b"PK")
  for workdirs in ([bare], [torn], [bare, torn, whole]):
    made = report.make_report(workdirs, "out")
    assert "—" in report_page.render(made)
  notes = {r["workdir"]: " ".join(r["notes"]) for arm in made["arms"] for r in arm["runs"]}
  assert notes[whole] == ""
  for words in ("no metrics.jsonl", "no evaluation.json", "no finished export", "at step 0 of 8"):
    assert words in notes[bare]
  damaged = ("metrics.jsonl is damaged after 1", "evaluation.json is damaged", "at step 4 of 8")
  for words in damaged:
    assert words in notes[torn]
  (alone,) = report.make_report([torn], "out")["arms"][0]["runs"]
  assert "the export 'default' cannot be shown: the samples under" in " ".join(alone["notes"])


def test_a_config_of_another_version_is_a_note(tmp_path):
  make_run(tmp_path / "run")
  write(tmp_path / "run" / "config.json", {"method": "full", "seed": 0, "model": {"width": 3}})
  made = report.make_report([str(tmp_path / "run")], "out")
  assert "does not fit this version" in " ".join(made["arms"][0]["runs"][0]["notes"])
  assert "no file of configs/" in report_page.render(made)


def test_grids_show_the_same_indices_and_say_what_differs(tmp_path, made):
  assert [grid["arm"] for grid in made["grids"]] == [0, 1, 2]
  assert {grid["differs"] for grid in made["grids"]} == {""}
  assert made["grids"][0]["images"].shape == (20, 8, 8, 3)
  full = make_run(tmp_path / "full")
  path = tmp_path / "other"
  drawn = {"default": export(path, seed=5), "far": export(path, "far", eta=0.5, seed=5)}
  grids = report.make_report([full, make_run(path, "static", exports=drawn)], "out")["grids"]
  # Both differ in one setting; the first of the equally near ones is shown.
  assert (grids[1]["export"], grids[1]["differs"]) == ("default", "seed 5, not 0")


def test_sampling_speed_is_of_all_images_that_were_drawn(tmp_path, made):
  assert groups_of(made, "sampling_images_per_second", 0)[0]["mean"] == 7.5  # 30 in 4 s, 20 kept
  run = tmp_path / "run"
  drawn = export(run)
  del drawn["metadata"]["num_drawn"]
  write(run / "samples" / "default" / "metadata.json", drawn["metadata"])
  older = report.make_report([make_run(run, exports={"default": drawn})], "out")
  assert groups_of(older, "sampling_images_per_second", 0) == []
  assert "no finished export" not in " ".join(older["arms"][0]["runs"][0]["notes"])


def test_the_claim_is_judged_check_by_check(made, page):
  (claim,) = made["claim"]
  checks = {(check["against"], check["key"]): check for check in claim["checks"]}
  loss = checks["full", "held_out_loss_ema"]
  excess = 100 * (0.208 / 0.201 - 1)
  assert loss["value"] == pytest.approx(excess, rel=1e-9)
  assert loss["outcome"] == f"missed by {excess - 3:.3g} %"
  assert loss["label"] == "held-out loss, EMA weights"
  assert (loss["better"], loss["verdict"]) == ("full", "larger than the seeds' spread")
  compared = comparison_of(made, 1)
  assert loss["standard_error"] == 100 * compared["held_out_loss_ema"]["standard_error"]
  assert loss["macs_ratio"] == compared["mean_forward_macs"]["value"] < 1
  accuracy = checks["full", "classifier_recognition_accuracy"]
  assert (accuracy["outcome"], accuracy["better"]) == ("kept", "adaptive")
  for key in ("held_out_loss_ema", "inception_frechet_distance"):
    control = checks["static", key]
    assert (control["outcome"], control["better"]) == ("kept", "adaptive")
    assert control["value"] == pytest.approx(100 * (0.208 / 0.3 - 1), rel=1e-9)
    assert control["standard_error"] is None
    assert control["macs_ratio"] == comparison_of(made, 1, 2)["mean_forward_macs"]["value"]
  assert len(checks) == len(claim["checks"]) == 4
  assert page.index("<h2>Claim</h2>") < page.index("<h2>Arms</h2>")
  assert f"<strong>missed by {excess - 3:.3g} %</strong>" in page
  assert "full is better; difference larger than the seeds&#x27; spread" in page


def test_the_claim_tells_what_is_missed_or_not_measured(tmp_path):
  paths = [
    make_run(tmp_path / "full", "full", 0, 0.2, 0.95),
    make_run(tmp_path / "adaptive", "adaptive", 0, 0.205, 0.925),
    make_run(tmp_path / "static", "static", 0, 0.2),
  ]
  (claim,) = report.make_report(paths, "out")["claim"]
  outcomes = [(check["outcome"], check["better"]) for check in claim["checks"]]
  missed = ("missed by 2.5 %", "static")
  assert outcomes == [("kept", "full"), ("missed by 0.5 points", "full"), missed, missed]
  made = report.make_report(paths[:1], "out")
  assert [check["outcome"] for check in made["claim"][0]["checks"]] == ["not measured"] * 4
  assert report_page.render(made).count("<strong>not measured</strong>") == 4


def test_what_is_no_arm_s_quality_is_told_once_below_the_table(made, page):
  assert groups_of(made, "classifier_num_samples", 0)[0]["mean"] == 20
  assert page.count("recognition accuracy of real held-out images (classifier) 98.70 %;") == 1
  assert page.count("images compared (classifier) 20.") == 1
  assert ">recognition accuracy of real" not in page


def test_versions_of_evaluations_and_exports(page, workdirs):
  rows = dict(re.findall(r'<tr><th scope="row">([^<]*, (?:e\w+)[^<]*)</th>(.*?)</tr>', page))
  assert len(rows) == 2 * len(workdirs)
  cells = "".join(f"<td>{SOFTWARE[f]}</td>" for f in ("lrdit", "jax", "flax", "python", "backend"))
  assert rows[f"{workdirs[0]}, evaluation"] == cells
  export_cells = "<td>—</td><td>0.10.2</td><td>—</td><td>—</td><td>cpu</td>"
  assert rows[f"{workdirs[0]}, export default"] == export_cells


def test_losses_by_timestep_are_means_over_the_seeds(made):
  held_out = made["arms"][0]["loss_by_timestep"]["held_out"]
  assert [(group["t_first"], group["t_last"], group["n"]) for group in held_out] == [
    (0, 499, 2),
    (500, 999, 2),
  ]
  assert held_out[0]["mean"] == pytest.approx(1.5 * 0.201)
  assert held_out[0]["std"] == pytest.approx(1.5 * 0.002 / 2**0.5)


def test_losses_of_another_protocol_are_not_drawn_but_told(tmp_path):
  paths = [make_run(tmp_path / "full")]
  for seed, held_out in enumerate(({}, {"dtype": "bfloat16"}, {"data": {"name": "other"}})):
    path = tmp_path / f"adaptive_{seed}"
    paths.append(make_run(path, "adaptive", seed, 0.1 + seed))
    evaluation = json.loads((path / "evaluation.json").read_text())
    evaluation["held_out"] |= held_out
    write(path / "evaluation.json", evaluation)
  made = report.make_report(paths, "out")
  losses = made["arms"][1]["loss_by_timestep"]
  assert [(group["n"], group["mean"]) for group in losses["held_out"]] == [
    (1, pytest.approx(0.15)),
    (1, pytest.approx(0.05)),
  ]
  told = "1 of 3 runs of adaptive (held_out.dtype bfloat16, not float32), 1 of 3 runs of adaptive ("
  told += "held_out.data.name other, not digits; held_out.data.split nothing, not test)"
  assert f"Left out, as measured otherwise: {told}" in report_page.render(made)


def test_damaged_timestep_groups_are_a_note(tmp_path):
  path = tmp_path / "run"
  make_run(path)
  evaluation = json.loads((path / "evaluation.json").read_text())
  del evaluation["held_out"]["ema"]["groups"][0]["t_first"]
  evaluation["held_out"]["raw"]["groups"] = 3
  write(path / "evaluation.json", evaluation)
  made = report.make_report([str(path)], "out")
  drawn = made["arms"][0]["loss_by_timestep"]["held_out"]
  assert [group["t_first"] for group in drawn] == [500]
  notes = " ".join(made["arms"][0]["runs"][0]["notes"])
  assert "1 of 2 timestep groups (ema weights) are damaged" in notes
  assert "1 of 1 timestep groups (raw weights) are damaged" in notes
  report_page.render(made)


def test_the_plan_s_numbers_agree_with_the_arms(made):
  full, adaptive, static = (arm["model"] for arm in made["arms"])
  assert made["layer"] == "blocks_1/mlp/fc1"
  rank = adaptive["rank"]
  assert len(adaptive["buckets"]) == 3
  assert sum(bucket["timesteps"] for bucket in adaptive["buckets"]) == 1000
  assert full["rank"]["active_rank"][made["layer"]] == [32]
  assert adaptive["mean_ratio"] == pytest.approx(0.5, abs=0.05)
  assert static["parameters"] < full["parameters"]
  assert rank["ratio"] == sorted(rank["ratio"])


def test_commands_make_the_same_config_again(made, monkeypatch):
  monkeypatch.chdir(tiny.ROOT)
  run = made["arms"][1]["runs"][2]
  train, sample, evaluate = (shlex.split(command) for command in run["commands"])
  config = resolve(main.parse_flags(train[1:]).config)
  assert json.loads(json.dumps(config.to_dict())) == run["config"]
  assert ("--mode=sample" in sample, "--mode=evaluate" in evaluate) == (True, True)
  sampling = main.parse_flags(sample[1:]).config.sampling
  assert (sampling.num_samples, sampling.name, sampling.seed) == (20, "default", 0)
  assert main.parse_flags(evaluate[1:]).config.evaluation.max_features == 77


class Checker(html.parser.HTMLParser):
  """Every element closed in order; ids and references as they come."""

  def __init__(self):
    super().__init__()
    self.open, self.ids, self.loads, self.tags = [], [], [], set()

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    if tag not in ("meta", "img"):
      self.open.append(tag)
    self._attributes(attrs)

  def handle_startendtag(self, tag, attrs):
    self.tags.add(tag)
    self._attributes(attrs)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def _attributes(self, attrs):
    for name, value in attrs:
      if name == "id":
        self.ids.append(value)
      if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
        self.loads.append(value)
      self.loads += re.findall(r"url\(([^)]*)\)", value or "")


def test_the_page_is_well_formed_and_loads_nothing(page):
  checker = Checker()
  checker.feed(page)
  assert checker.open == []
  ElementTree.fromstring(page.split("\n", 1)[1])
  assert len(checker.ids) == len(set(checker.ids)) > 0
  ids = {f"#{name}" for name in checker.ids}
  assert checker.loads
  for target in checker.loads:
    assert target.startswith("data:image/png;base64,") or target in ids, target
  assert not checker.tags & {"script", "link", "iframe", "object", "embed", "base"}
  assert "@import" not in page
  # Names of XML vocabularies are the only addresses.
  addresses = set(re.findall(r"""https?://[^"'\s<]+""", page))
  assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
  assert page.count("<svg") == 6
  assert page.count("<img") == 3


def test_text_is_escaped(made):
  evil = '<script>alert("1")</script>&'
  made = copy.deepcopy({key: made[key] for key in made})
  for arm in made["arms"]:
    arm["name"] += evil
    for run in arm["runs"]:
      run["notes"] = [evil]
      run["workdir"] = evil
      run["commands"] = [evil]
  page = report_page.render(made)
  assert "<script" not in page
  assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;&amp;" in page
  ElementTree.fromstring(page.split("\n", 1)[1])


def test_plots_are_the_same_every_time(made):
  svg = plots.training_curves(made["arms"], "train/loss")
  assert svg == plots.training_curves(made["arms"], "train/loss")
  assert plots.colour_of(0).upper() in svg.upper()
  assert "currentColor" in svg
  assert "#ffffff" not in svg.lower()  # no ground of its own, which a dark page would show


def test_curves_of_few_points_show_each():
  def drawn(count):
    curves = {"train/loss": [[*range(count)], [1.0 + i for i in range(count)]]}
    return plots.training_curves([{"name": "a", "runs": [{"curves": curves}]}], "train/loss")

  markers = [drawn(count).count(f"fill: {plots.colour_of(0).lower()}") for count in (1, 3, 40)]
  assert markers[0] > 0 == markers[2]
  assert markers[1] - markers[0] == 2


def test_seeds_are_in_numerical_order(tmp_path):
  paths = [make_run(tmp_path / str(seed), seed=seed) for seed in (10, 4294967295, 2)]
  arms = report.make_report(paths, "out")["arms"]
  assert [run["seed"] for run in arms[0]["runs"]] == [2, 10, 4294967295]


def test_long_curves_are_shortened_to_means():
  steps, means = plots.shorten(range(1201), [*range(1200), None])
  assert len(steps) <= plots.MAX_POINTS
  assert (steps[0], means[0]) == (1.0, 1.0)
  assert np.isnan(means[-1]) == np.isnan(means).any()


def test_numbers_for_reading():
  assert report_page.format_value(1272324, "count") == "1,272,324"
  assert report_page.format_value(306_600, "macs") == "306.6 k"
  assert report_page.format_value(0.985, "share") == "98.50 %"
  assert report_page.format_value(3725, "seconds") == "1 h 2 min"
  assert report_page._format_pair(0.20812, 0.00213, "loss") == "0.2081 ± 0.0021"
  assert report_page._format_pair(0.985, 0.002, "share") == "98.50 ± 0.20 %"
  assert report_page._format_pair(0.5, 0.01, "loss") == "0.500 ± 0.010"
  assert report_page._format_pair(0.5, 0.00999, "loss") == "0.500 ± 0.010"
  assert report_page._format_pair(0.1 + 0.2, 0.3 - 0.1 * 3, "loss") == "0.3 ± 0"


def run_main(capsys, *flags):
  capsys.readouterr()
  status = main.run(["main.py", *flags])
  return status, capsys.readouterr().err.strip()


def test_the_command_line_writes_both_files(workdirs, made, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(main.startup, "prepare", list)
  output = tmp_path / "a" / "b"
  flags = ["--mode=report", f"--workdirs={','.join(workdirs)}", f"--output={output}"]
  assert run_main(capsys, *flags)[0] == 0
  assert (output / "report.html").read_text().startswith("<!DOCTYPE html>")
  stored = json.loads((output / "report.json").read_text())
  assert stored["made"]["command"] == shlex.join(["python", "main.py", *flags])
  assert stored["rows"] == json.loads(json.dumps(made["rows"]))
  assert sorted(path.name for path in output.iterdir()) == ["report.html", "report.json"]


def test_labels_that_differ_are_told(tmp_path):
  paths = [make_run(tmp_path / "full"), make_run(tmp_path / "static", "static")]
  images, labels = np.zeros((12, 8, 8, 3), np.uint8), np.zeros(12, np.int64)
  directory = tmp_path / "static" / "samples" / "default"
  np.savez(directory / "samples.npz", arr_0=images, arr_1=labels)
  write(directory / "metadata.json", METADATA | {"num_samples": 12})
  grids = report.make_report(paths, "out")["grids"]
  assert [len(grid["images"]) for grid in grids] == [12, 12]
  assert grids[1]["differs"] == "other labels"


@pytest.mark.parametrize(
  ("flags", "status", "words"),
  [
    (["--mode=report"], 2, "--workdirs is missing"),
    (["--mode=report", "--workdirs=a"], 2, "--output is missing"),
    (["--mode=report", "--workdirs=a", "--output=b", "--workdir=c"], 2, "--workdir is not used"),
    (
      ["--mode=report", "--workdirs=a", "--output=b", "--config=configs/digits.py"],
      2,
      "--config is not used by --mode=report",
    ),
    (
      ["--config=configs/digits.py", "--workdir=a", "--workdirs=b"],
      2,
      "--workdirs is not used by --mode=train",
    ),
    (["--mode=report", "--workdirs=/nowhere", "--output=b"], 1, "/nowhere is not the workdir"),
  ],
)
def test_wrong_flags_end_in_one_line(flags, status, words, capsys, monkeypatch):
  monkeypatch.chdir(tiny.ROOT)
  monkeypatch.setattr(main.startup, "prepare", list)
  got, stderr = run_main(capsys, *flags)
  assert (got, len(stderr.splitlines())) == (status, 1), stderr
  assert stderr.startswith("error: ")
  assert words in stderr


def test_the_same_run_does_not_count_twice(workdirs):
  with pytest.raises(UserError, match="hold the same run"):
    report.make_report([workdirs[0], workdirs[0]], "out")


def test_other_configs_of_one_method_are_arms_named_by_what_differs(tmp_path):
  paths = [make_run(tmp_path / "a", "adaptive"), make_run(tmp_path / "b", "adaptive")]
  config = json.loads((tmp_path / "b" / "config.json").read_text())
  config["rank"]["ratio"], config["checkpoint"]["keep"] = 0.25, 9
  write(tmp_path / "b" / "config.json", config)
  arms = report.make_report(paths, "out")["arms"]
  assert [arm["name"] for arm in arms] == ["adaptive (ratio 0.5)", "adaptive (ratio 0.25)"]
  assert commands.reproduce(arms[1]["runs"][0])


def test_what_changed_on_the_way_makes_another_arm_and_how_it_was_computed_does_not(tmp_path):
  runs = [tmp_path / name for name in "abcd"]
  for seed, run in enumerate(runs):
    make_run(run, seed=seed)
  configs = [json.loads((run / "config.json").read_text()) for run in runs]
  configs[1]["model"] |= {"remat": True, "scan_blocks": True}
  configs[1]["rank"]["compute"] = "masked"
  configs[2]["model"]["dtype"] = "bfloat16"
  for run, config in zip(runs, configs, strict=True):
    write(run / "config.json", config)
  change = {"step": 4, "field": "optimizer.learning_rate", "before": 0.1, "after": 0.2}
  irrelevant = {"step": 4, "field": "model.remat", "before": False, "after": True}
  lines = [json.dumps(change), json.dumps({"step": "x"}), "{", json.dumps(irrelevant)]
  (runs[3] / "changes.jsonl").write_text("\n".join(lines))
  (runs[0] / "changes.jsonl").write_text(json.dumps(irrelevant))
  made = report.make_report([str(run) for run in runs], "x")
  assert [[run["seed"] for run in arm["runs"]] for arm in made["arms"]] == [[0, 1], [2], [3]]
  assert "learning_rate at step 4 0.1 to 0.2" in made["arms"][2]["name"]
  note = "from step 4 on optimizer.learning_rate is 0.2, and was 0.1"
  assert note in made["arms"][2]["runs"][0]["notes"]


def test_the_report_s_own_command_names_workdirs_with_commas(tmp_path):
  runs = [make_run(tmp_path / name, seed=seed) for seed, name in enumerate(("a,b", 'c "d"'))]
  command = report.make_report(runs, "x")["made"]["command"]
  assert main.parse_flags(shlex.split(command)[1:]).workdirs == runs
