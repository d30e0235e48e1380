"""Evaluation of a tiny trained run, in this process."""

import json
import shutil

import jax
import numpy as np
import pytest

from lrdit.data import pipeline
from lrdit.evaluation import held_out
from lrdit.experiment import Experiment
from lrdit.modes import analyze, benchmark, evaluate, sample, train
from lrdit.runtime import parallel
from lrdit.runtime.errors import UserError
from lrdit.runtime.locks import owned
from tests import tiny
from tests.trained import noisy_params

FIELDS = {
  "evaluation__extractors": ("classifier", "pixel"),
  "evaluation__classifier_steps": 3,
}


def config_of(**overrides):
  return tiny.tiny_config(**(FIELDS | overrides))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A run of 8 steps with its export."""
  workdir = tmp_path_factory.mktemp("trained")
  for mode in (train.train, sample.sample):
    mode(config_of(), str(workdir), jax.devices()[:1])
  return workdir


def read(workdir):
  return json.loads((workdir / "evaluation.json").read_text())


def losses(config, num_devices, draws=2):
  """Held-out losses of parameters that predict something."""
  devices = jax.devices()[:num_devices]
  return held_out.held_out_losses(
    Experiment(config).eval_step(devices),
    parallel.replicate(noisy_params(config_of()), devices),
    Experiment(config).source("eval"),
    parallel.batch_slots(config.training.batch_size, devices),
    config.training.batch_size,
    draws,
  )


@pytest.fixture(scope="module")
def reference():
  return losses(config_of(), num_devices=1)


def test_losses_do_not_depend_on_devices_seed_or_compute(reference):
  """Groups of ranks and one mask compute the same; the draws are no run's own."""
  other = losses(config_of(seed=1, rank__compute="masked"), num_devices=4)
  np.testing.assert_array_equal(other.count, reference.count)
  np.testing.assert_allclose(other.loss_sum, reference.loss_sum, rtol=1e-5)


def test_every_example_is_counted_once_a_draw(reference):
  assert reference.count.sum() == 2 * 299
  assert (reference.count > 0).all()
  weighted = np.dot(reference.group_means, reference.count) / reference.count.sum()
  assert reference.mean == pytest.approx(weighted, rel=1e-12)


def test_another_draw_has_other_noise_and_timesteps(reference):
  once = losses(config_of(), num_devices=1, draws=1)
  assert once.count.sum() == 299
  second = reference.loss_sum.sum() - once.loss_sum.sum()
  assert abs(second / once.loss_sum.sum() - 1) > 1e-4


def test_a_shift_moves_each_example_to_another_slot():
  source, slots = tiny.load_digits("eval"), parallel.batch_slots(128, jax.devices())
  seen = []
  for shift in (0.0, 0.5):
    batches = list(pipeline.eval_batches(source, slots, 128, shift))
    rows = [b["image"].reshape(-1, 64)[b["weight"].reshape(-1) == 1] for b in batches]
    seen.append([row.tobytes() for row in np.concatenate(rows)])
  assert sorted(seen[0]) == sorted(seen[1]) == sorted(i.tobytes() for i in source.images)
  assert sum(a == b for a, b in zip(*seen, strict=True)) < 10


@pytest.fixture(scope="module")
def evaluated(trained):
  """The run with its evaluation.json."""
  evaluate.evaluate(config_of(), str(trained), jax.devices()[:1])
  return trained


@pytest.fixture
def copy(evaluated, tmp_path):
  return shutil.copytree(evaluated, tmp_path / "run")


def test_two_evaluations_agree_to_the_last_digit(copy, tmp_path):
  """Also where the classifier and the reference are made anew."""
  texts = []
  for features in ("", "", str(tmp_path / "features")):
    config = config_of(evaluation__features_dir=features)
    evaluate.evaluate(config, str(copy), jax.devices()[:1])
    evaluation = read(copy)
    (copy / "evaluation.json").unlink()
    assert evaluation.pop("settings")["features_dir"] == features
    for settings in evaluation["samples"]["default"]["settings"].values():
      assert settings.pop("features_dir") == features
    texts.append(json.dumps(evaluation))
  assert texts[0] == texts[1] == texts[2]
  assert (copy / "features" / "classifier.npz").exists()
  metrics = json.loads(texts[0])["samples"]["default"]["figures"]
  for extractor in ("classifier", "pixel"):
    assert metrics[f"{extractor}_frechet_distance"] > 0
    assert 0 <= metrics[f"{extractor}_precision"] <= 1
  assert 0 <= metrics["classifier_recognition_accuracy"] <= 1
  assert not any("fid" in name.lower() for name in metrics)


def test_a_finished_evaluation_is_left_alone(copy, monkeypatch, told):
  before = (copy / "evaluation.json").read_bytes()
  monkeypatch.setattr(held_out, "held_out_losses", None)  # measuring would call them
  monkeypatch.setattr(Experiment, "extractors", None)
  for extractors in (("classifier", "pixel"), ("pixel",), ()):
    config = config_of(evaluation__extractors=extractors)
    evaluate.evaluate(config, str(copy), jax.devices()[:1])
    assert told.messages[-1].endswith("is complete for step 8; delete it to measure again")
  assert (copy / "evaluation.json").read_bytes() == before
  for changed in (dict(evaluation__draws=2), dict(evaluation__max_features=20)):
    with pytest.raises(TypeError, match="NoneType"):
      evaluate.evaluate(config_of(**changed), str(copy), jax.devices()[:1])
  # A sample set that was written again is measured again.
  path = copy / "samples" / "default" / "metadata.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"num_starts": 9}))
  with pytest.raises(TypeError, match="NoneType"):
    evaluate.evaluate(config_of(), str(copy), jax.devices()[:1])


def test_metrics_of_other_sample_sets_are_kept_while_the_checkpoint_is_the_same(copy, monkeypatch):
  other = config_of(sampling__name="other", sampling__seed=5)
  sample.sample(other, str(copy), jax.devices()[:1])
  monkeypatch.setattr(held_out, "held_out_losses", None)  # held-out losses are kept as well
  evaluate.evaluate(other, str(copy), jax.devices()[:1])
  evaluation = read(copy)
  assert sorted(evaluation["samples"]) == ["default", "other"]
  assert evaluation["samples"]["other"]["metadata"]["seed"] == 5
  key = {name: evaluation[name] for name in ("checkpoint_step", "checkpoint_digest")}
  path = copy / "evaluation.json"
  assert evaluate.read_kept(path, key)["samples"].keys() == {"default", "other"}
  for changed in ({"checkpoint_step": 9}, {"checkpoint_digest": ""}):
    assert evaluate.read_kept(path, key | changed) == {"held_out": {}, "samples": {}}


def test_metrics_over_another_extractor_join_those_that_still_hold():
  kept = dict(metadata={"n": 1}, reference={"r": 1})
  kept |= dict(figures={"a": 1.0}, extractors={"a": {}}, settings={"a": {}})
  new = kept | dict(figures={"b": 2.0}, extractors={"b": {}}, settings={"b": {}})
  joined = evaluate.merged(kept, new)
  assert (joined["figures"], list(joined["extractors"])) == ({"a": 1.0, "b": 2.0}, ["a", "b"])
  for field in ("metadata", "reference"):
    assert evaluate.merged(kept | {field: {"other": 1}}, new) == new
  assert evaluate.merged(None, new) == new


def test_statistics_of_something_else_are_refused(copy):
  with pytest.raises(UserError, match="is a reference of something else: num_features"):
    fewer = config_of(evaluation__max_features=20)
    evaluate.evaluate(fewer, str(copy), jax.devices()[:1])
  with pytest.raises(UserError, match="num_steps"):
    longer = config_of(evaluation__classifier_steps=4)
    evaluate.evaluate(longer, str(copy), jax.devices()[:1])


def test_samples_of_other_weights_or_settings_are_refused(copy):
  other = config_of(sampling__num_steps=5, sampling__seed=7)
  with pytest.raises(UserError, match=r"of something else: num_steps .* seed"):
    evaluate.evaluate(other, str(copy), jax.devices()[:1])
  path = copy / "samples" / "default" / "metadata.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"checkpoint_digest": "0"}))
  with pytest.raises(UserError, match="of something else: checkpoint_digest"):
    evaluate.evaluate(config_of(), str(copy), jax.devices()[:1])


def test_a_run_is_measured_on_its_own_data(copy):
  data = json.loads((copy / "data.json").read_text())
  data["eval"]["num_examples"] = 3
  (copy / "data.json").write_text(json.dumps(data))
  with pytest.raises(UserError, match="on other data: num_examples"):
    evaluate.evaluate(config_of(), str(copy), jax.devices()[:1])


@pytest.mark.parametrize(
  ("mode", "directory", "use"),
  [
    (sample.sample, "samples/default", "sample"),
    (evaluate.evaluate, "", "evaluate"),
    (evaluate.evaluate, "samples/default", "sample"),
    (analyze.analyze, "analysis", "analyze"),
    (benchmark.benchmark, "", "benchmark"),
  ],
)
def test_what_another_process_writes_is_left_to_it(trained, mode, directory, use):
  (trained / directory).mkdir(exist_ok=True)
  with owned(trained / directory, use), pytest.raises(UserError, match=r"is in use by process \d+"):
    mode(config_of(), str(trained), jax.devices()[:1])


def test_a_run_in_training_is_sampled_and_evaluated(trained):
  with owned(trained, "train"):
    sample.sample(config_of(), str(trained), jax.devices()[:1])
    with owned(trained / "samples" / "default", "another"):
      evaluate.evaluate(config_of(evaluation__extractors=()), str(trained), jax.devices()[:1])
  assert not list(trained.rglob("*.lock"))
