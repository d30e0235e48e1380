"""A field of `sampling` is declared once: sample sets and the report take it from the schema."""

import json

import pytest

from lrdit.config import run_config, sample_settings
from lrdit.config.checks import whole
from lrdit.config.field import Field, Role
from lrdit.config.schema import FIELDS
from lrdit.experiment import Experiment
from lrdit.report.contents import make_report
from tests import tiny
from tests.workdirs import make_run, make_samples


@pytest.mark.parametrize("role", [Role.SAMPLES, Role.FREE])
def test_a_new_field_reaches_sample_sets_and_the_report(role, monkeypatch, tmp_path):
  monkeypatch.setitem(FIELDS, "sampling.new", Field(1, "A new one", whole(), role=role))
  config, defines = tiny.tiny_config(sampling__new=2, **tiny.DEEPER), role is Role.SAMPLES
  settings = Experiment(config).sample_settings(8, "ab", "")
  assert settings.get("new") == (2 if defines else None)
  path = tmp_path / "run"
  samples = {"one": make_samples(path, "one", new=1), "two": make_samples(path, "two", new=2)}
  workdir = make_run(path, "adaptive", samples=samples)
  run_config.check_workdir(workdir, config, create=False)  # free to differ
  made = make_report([workdir], "out")
  accuracy = [row for row in made.rows if row.key == "classifier_recognition_accuracy"]
  assert [row.settings.get("new") for row in accuracy] == ([1, 2] if defines else [None])
  commands = [command for command in made.arms[0].runs[0].commands if "mode=sample" in command]
  assert ["--config.sampling.new=2" in command for command in commands] == [False, True]


def test_sets_of_earlier_versions_have_the_defaults_of_new_fields(monkeypatch, tmp_path):
  """They are compared with sets of this version."""
  monkeypatch.setitem(FIELDS, "sampling.new", Field(1, "A new one", whole(), role=Role.SAMPLES))
  paths = [tmp_path / name for name in ("old", "today")]
  fields = [{}, {"new": 1}]
  for path, method, own in zip(paths, ("adaptive", "full"), fields, strict=True):
    make_run(path, method, samples={"one": make_samples(path, "one", **own)})
  made = make_report(list(map(str, paths)), "out")
  accuracy = [row for row in made.rows if row.key == "classifier_recognition_accuracy"]
  assert [row.settings["new"] for row in accuracy] == [1]


def test_a_record_gives_the_fields_back():
  config = tiny.tiny_config(sampling__use_ema=False, sampling__eta=0.5, sampling__labels="3")
  record = json.loads(json.dumps(sample_settings.to_record(config)))
  assert sample_settings.from_record(record).items() <= config.sampling.to_dict().items()
  given = [value for value in record.values() if value is not None]
  assert len(sample_settings.from_record(record)) == len(given)
  unlabeled = sample_settings.to_record(tiny.tiny_config(data__num_classes=0))
  assert "labels" not in sample_settings.from_record(unlabeled)
