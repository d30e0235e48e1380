"""The package as a notebook uses it: `lrdit.open_run` and what it opens."""

import jax
import numpy as np
import pytest

import lrdit
from lrdit.config.run_config import store_config
from lrdit.experiment import Experiment
from lrdit.modes import sample
from lrdit.runtime.errors import UserError
from lrdit.sampling.sample_set import read_sample_set
from tests import tiny
from tests.trained import make_noisy_run, noisy_params


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return make_noisy_run(tmp_path_factory.mktemp("opened"))


def test_a_run_is_as_it_was_trained(workdir):
  run, config = lrdit.open_run(workdir), tiny.tiny_config()
  assert run.config.to_dict() == config.to_dict()
  assert run.plan == run.experiment.plan
  jax.tree.map(np.testing.assert_array_equal, run.params("raw"), noisy_params(config))


def test_samples_are_those_of_the_command_line(workdir):
  sample.sample(tiny.tiny_config(), str(workdir), jax.devices()[:1])
  _, batches = read_sample_set(workdir / "samples" / "default", 10)
  written = np.concatenate([images for images, _ in batches])
  run = lrdit.open_run(workdir)
  sampled = run.sample(6)
  assert sampled.dtype == np.uint8
  assert sampled.shape == (6, 8, 8, 1)
  # Another batch size may round otherwise.
  assert np.abs(sampled.astype(int) - written[:6]).max() <= 1
  assert np.abs(run.sample(2, seed=1).astype(int) - sampled[:2]).max() > 1


def test_sampling_again_compiles_nothing(workdir, monkeypatch):
  run = lrdit.open_run(workdir)
  first = run.sample(4)
  monkeypatch.setattr(Experiment, "sampler", None)  # making another one would call it
  np.testing.assert_array_equal(run.sample(4), first)
  with pytest.raises(TypeError):
    run.sample(4, num_steps=3)


def test_labels_are_one_class_or_one_for_each_image(workdir):
  run = lrdit.open_run(workdir)
  balanced, given = run.sample(4), run.sample(4, labels=[0, 1, 2, 3])
  np.testing.assert_array_equal(balanced, given)
  three = run.sample(4, labels=3, params=run.params())
  np.testing.assert_array_equal(three[3], given[3])
  assert (three[0] != given[0]).any()


@pytest.mark.parametrize(
  ("labels", "message"),
  [
    (10, "label 10 is not a class: use whole numbers from 0 to 9"),
    ([0, -1], "label -1 is not a class"),
    ([0, 1, 2], r"labels of shape \(3,\) are given for 2 images: give one, or 2"),
    ([1], "give one, or 2"),
  ],
)
def test_labels_that_no_image_can_have_are_refused(workdir, labels, message):
  with pytest.raises(UserError, match=message):
    lrdit.open_run(workdir).sample(2, labels=labels)


def test_a_field_that_sampling_lacks_is_refused(workdir):
  with pytest.raises(UserError, match=r"sampling has no field num_step: use some of .*, num_steps"):
    lrdit.open_run(workdir).sample(2, num_step=3)


def test_labels_of_a_model_without_classes_are_refused(tmp_path):
  store_config(tmp_path, tiny.tiny_config(data__num_classes=0))
  with pytest.raises(UserError, match="the model has no classes: leave them out"):
    lrdit.open_run(tmp_path).sample(2, labels=0)


def test_mistakes_are_refused(workdir, tmp_path):
  with pytest.raises(UserError, match="not the workdir of a run"):
    lrdit.open_run(tmp_path)
  with pytest.raises(UserError, match=r"config\.sampling\.solver=.euler. must be one of"):
    lrdit.open_run(workdir).sample(1, solver="euler")
  with pytest.raises(AttributeError, match="no attribute 'nothing'"):
    lrdit.nothing  # noqa: B018
