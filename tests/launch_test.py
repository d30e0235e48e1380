"""The scripts that run several arms, with a stand-in for main.py and whole on tiny models."""

import json
import os
import signal

import numpy as np
import pytest

from configs import studies
from lrdit.config.flags import parse_flags
from lrdit.config.resolve import resolve
from tests import scripts, tiny

METHODS = ("full", "narrow", "static", "adaptive")
MODES = ("train", "sample", "evaluate")
SCRIPTS = ("cifar10", "celeba", "imagenet128", "digits")
STUDIES = [(name, study) for name, own in studies.STUDIES.items() for study in own]


@pytest.fixture
def stand_in(tmp_path):
  return scripts.StandIn(tmp_path)


def command(name, *flags):
  return ["bash", f"checkout/launch/{name}.sh", *flags]


def started(stand_in):
  """Return (mode, name of the workdir or output) of every start of main.py."""
  found = []
  for record in stand_in.starts():
    flags = dict(flag.split("=", 1) for flag in record["argv"])
    directory = flags.get("--workdir") or flags["--output"]
    found.append((flags["--mode"], directory.rpartition("/")[2]))
  return found


def arms(*names):
  return [(mode, name) for name in names for mode in MODES]


def test_the_arms_run_in_order_and_are_reported(stand_in, tmp_path):
  status, stdout, stderr = stand_in.run(command("cifar10", "--config.a=b 'c' $d"), RUNS="out")
  assert (status, stdout) == (0, ""), stderr
  workdirs = [f"cifar10_{method}" for method in METHODS]
  assert started(stand_in) == [*arms(*workdirs), ("report", "cifar10_report")]
  assert stderr.splitlines()[:2] == ["== cifar10, full: train", "== cifar10, full: sample"]
  first, *_, report = (record["argv"] for record in stand_in.starts())
  config = f"--config={stand_in.root}/configs/cifar10.py:method=full"
  assert first[1:] == [config, "--config.a=b 'c' $d", f"--workdir={tmp_path}/out/cifar10_full"]
  assert report[2] == "--workdirs=" + ",".join(f"{tmp_path}/out/{name}" for name in workdirs)


def test_latents_are_encoded_once_and_serve_every_number_of_classes(stand_in, tmp_path):
  behavior = "if start == 0: pathlib.Path(flags['output']).mkdir(); "
  behavior += "(pathlib.Path(flags['output']) / 'manifest.json').touch()"
  for classes in ("1000", "7"):
    done = stand_in.run(command("imagenet128"), behavior, LATENTS="latents", CLASSES=classes)
    assert done[0] == 0, done
  workdirs = [f"imagenet128_{method}" for method in METHODS]
  once = [*arms(*workdirs), ("report", "imagenet128_report")]
  assert started(stand_in) == [("encode", "latents"), *once, *once]
  last = stand_in.starts()[-2]["argv"]
  assert last[1].endswith("imagenet128.py:method=adaptive,classes=7")
  assert last[2] == f"--config.vae.latents_dir={tmp_path}/latents"


def test_schedules_share_one_analysis(stand_in, tmp_path):
  done = stand_in.run(command("digits", "schedules"), SEEDS="3 4")
  assert done[0] == 0, done
  names = (*METHODS, "measured", "increasing", "constant")
  starts = started(stand_in)
  assert starts.pop(3) == ("analyze", "digits_full_3")
  assert starts == [
    *arms(*(f"digits_{name}_{seed}" for seed in (3, 4) for name in names)),
    ("report", "digits_schedules"),
  ]
  argv = next(r["argv"] for r in stand_in.starts() if "digits_measured_4" in str(r["argv"]))
  analysis = tmp_path / "runs" / "digits_full_3" / "analysis" / "truncation.json"
  assert {"--config.seed=4", f"--config.rank.analysis={analysis}"} <= set(argv)
  assert f"--config.evaluation.features_dir={tmp_path}/runs/digits_features" in argv


def test_a_study_of_photographs_trains_the_small_model_with_its_seeds(stand_in, tmp_path):
  done = stand_in.run(command("cifar10", "photographs", "--config.data.data_dir=x"), SEEDS="1 2")
  assert done[0] == 0, done
  assert started(stand_in) == [
    *arms(*(f"cifar10_{method}_{seed}" for seed in (1, 2) for method in METHODS)),
    ("report", "cifar10_photographs"),
  ]
  argv = stand_in.starts()[-2]["argv"]
  assert argv[1].endswith("configs/cifar10.py:method=adaptive,variant=XS/4")
  features = f"--config.evaluation.features_dir={tmp_path}/runs/cifar10_features"
  assert {"--config.data.data_dir=x", "--config.seed=2", features} <= set(argv)


@pytest.mark.parametrize(("name", "study"), STUDIES)
def test_the_arms_of_a_study_share_runs_and_resolve(name, study, tmp_path):
  """Every arm's recipe, arguments and fields are what main.py takes."""
  seen, everything = {}, {}
  for other in studies.STUDIES[name].values():
    for own, arm in other.arms(tmp_path, "0").items():
      assert everything.setdefault(own, arm) == arm
  for own, arm in studies.STUDIES[name][study].arms(tmp_path, "0").items():
    fields = [f"--config.{field}" for field in arm.fields if not field.startswith("rank.analysis")]
    fields = [field.replace("schedule=measured", "schedule=midpeak") for field in fields]
    config = f"--config={tiny.ROOT}/configs/{name}.py:method={arm.argument}"
    flags = parse_flags(["main.py", config, f"--workdir={tmp_path}", *fields])
    seen[own] = resolve(flags.config).to_json()
  assert len(set(seen.values())) == len(seen)


@pytest.mark.parametrize("name", studies.STUDIES)
def test_what_a_study_compresses_is_an_arm_of_it(name, tmp_path):
  own = studies.STUDIES[name]["compression"].arms(tmp_path, "0")
  starts = {f.partition("=")[2] for arm in own.values() for f in arm.fields if "init.from_" in f}
  (start,) = starts
  assert start in {f"{tmp_path}/{name}_{arm}_{{seed}}" for arm in own}


@pytest.mark.parametrize("status", [1, 2, 75])
def test_an_unfinished_command_ends_all_with_its_status(stand_in, status):
  done = stand_in.run(command("digits"), f"if start == 4: sys.exit({status})")
  assert done[0] == status
  assert started(stand_in) == arms("digits_full_0", "digits_narrow_0")[:5]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("handler", "status"), [("stop_on_sigterm", 75), ("", 143)])
def test_a_signal_to_the_group_stops_it_once(stand_in, number, handler, status):
  process = stand_in.start(command("cifar10"), f"work({handler})")
  stand_in.wait_for_work(1, process)
  os.killpg(process.pid, number)
  done = scripts.finish(process)
  assert done[:2] == (status, "saved\n" if handler else "")
  assert len(stand_in.starts()) == 1
  stand_in.assert_all_have_ended()


@pytest.mark.parametrize(
  ("name", "flags", "environment", "words"),
  [
    ("celeba", ["--config.vae.latents_dir=x"], {}, "latents_dir=x: this command sets the field"),
    ("cifar10", ["--workdir=x"], {}, "'--workdir=x' is not of the form --config.GROUP.FIELD=VALUE"),
    ("cifar10", ["--config.method=full"], {}, "--config.method=full: this command sets the field"),
    ("digits", ["--config.seed=1"], {}, "--config.seed=1: this command sets the field"),
    ("digits", ["schedules", "--config.rank.schedule=constant"], {}, "this command sets the field"),
    (
      "digits",
      ["widths"],
      {},
      f"'widths' is no study of digits: use one of {', '.join(studies.STUDIES['digits'])}",
    ),
    ("cifar10", ["arms"], {}, "'arms' is no study of cifar10: use one of photographs, rates, "),
    ("celeba", ["arms"], {}, "'arms' is no study of celeba: use one of none"),
    *(("imagenet128", [], {"CLASSES": n}, f"CLASSES={n} is not") for n in ("1001", "0", "4x")),
  ],
)
def test_a_wrong_argument_ends_before_anything_runs(stand_in, name, flags, environment, words):
  scripts.assert_wrong_argument(stand_in.run(command(name, *flags), **environment), words)
  assert not stand_in.starts()


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(stand_in, name):
  status, stdout, stderr = stand_in.run(command(name, "--config.seed=1", "--help"))
  assert (status, stderr) == (0, "")
  assert "Usage: " in stdout
  assert name in stdout


# Whole runs.


@pytest.fixture
def checkout(tmp_path):
  return scripts.copy_checkout(tmp_path / "checkout", "configs", "launch", "lrdit", "main.py")


def start(checkout, name, fields, *study, **environment):
  flags = [f"--config.{field}={value}" for field, value in (tiny.OVERRIDES | fields).items()]
  return scripts.start(
    command(name, *study, *flags), checkout.parent, tiny.environment(**environment)
  )


@pytest.mark.slow
def test_digits_go_on_where_they_were_stopped_and_repeat_nothing(checkout, tmp_path):
  fields = {"training.num_steps": 100, "checkpoint.every_steps": 100}
  runs = [tmp_path / "runs" / f"digits_{method}_3" for method in METHODS]

  process = start(checkout, "digits", fields, SEEDS="3")
  scripts.wait_until(lambda: scripts.has_lines(runs[1] / "metrics.jsonl"), process)
  os.killpg(process.pid, signal.SIGTERM)
  status, _, stderr = scripts.finish(process)
  assert status == 75, stderr
  assert not (runs[1] / "checkpoints" / "100").exists()
  first_arm = finished_files(runs[0])

  status, _, stderr = scripts.finish(start(checkout, "digits", fields, SEEDS="3"))
  assert status == 0, stderr
  assert "resuming from the checkpoint of step" in stderr
  assert finished_files(runs[0]) == first_arm
  for method, workdir in zip(METHODS, runs, strict=True):
    assert (workdir / "checkpoints" / "100" / "ema_params").is_dir()
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    assert evaluation["checkpoint_step"] == 100
    assert evaluation["samples"]["default"]["metadata"]["method"] == method
    assert not (workdir / "features").exists()
  report = json.loads((tmp_path / "runs" / "digits_arms" / "report.json").read_text())
  assert [arm["method"] for arm in report["arms"]] == list(METHODS)

  all_arms = finished_files(tmp_path / "runs")
  status, _, stderr = scripts.finish(start(checkout, "digits", fields, SEEDS="3"))
  assert status == 0, stderr
  assert finished_files(tmp_path / "runs") == all_arms

  status, _, stderr = scripts.finish(
    start(checkout, "digits", fields | {"rank.ratio": 0.25}, SEEDS="3")
  )
  assert status == 1
  assert "holds another run: rank.ratio" in stderr.splitlines()[-1]


def finished_files(directory):
  """Return when checkpoints and samples were written, and the text of metrics."""
  parts, times = {"checkpoints", "samples"}, scripts.times(directory)
  texts = {path: path.read_text() for path in times if path.name == "metrics.jsonl"}
  return {path: when for path, when in times.items() if parts & {*path.parts}} | texts


@pytest.mark.slow
def test_celeba_runs_the_arms_on_latents(checkout, tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8)
  np.savez(tmp_path / "images.npz", image=images)
  fields = {
    "data.name": "npz",
    "data.data_dir": "images.npz",  # relative to where the script is called
    "data.image_size": 32,
    "vae.path": tiny.GOLDEN / "sd_vae_tiny",
    "training.num_steps": 2,
    "evaluation.extractors": (),
  }
  status, _, stderr = scripts.finish(start(checkout, "celeba", fields, LATENTS="latents"))
  assert status == 0, stderr
  assert np.load(tmp_path / "latents" / "eval.npy").shape[1:] == (2, 2, 4, 4, 4)
  for method in METHODS:
    samples = tmp_path / "runs" / f"celeba_{method}" / "samples" / "default" / "samples.npz"
    with np.load(samples) as export:
      assert export["arr_0"].shape == (10, 32, 32, 3)


@pytest.mark.slow
def test_schedules_are_reported_as_arms(checkout, tmp_path):
  fields = {"training.num_steps": 20}
  status, _, stderr = scripts.finish(start(checkout, "digits", fields, "schedules", SEEDS="3"))
  assert status == 0, stderr
  report = json.loads((tmp_path / "runs" / "digits_schedules" / "report.json").read_text())
  schedules = ("logistic_decreasing", "measured", "increasing", "constant")
  names = [
    "full",
    "narrow",
    "static",
    *(f"adaptive (schedule {schedule})" for schedule in schedules),
  ]
  assert [arm["name"] for arm in report["arms"]] == names
