"""Workdirs, checkpoints, sample sets, analyses, and the DiTs that others trained."""

import contextlib
import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np

import lrdit
from lrdit.config import run_config
from lrdit.data.source import Source
from lrdit.evaluation import classifier, references
from lrdit.evaluation.features import PixelExtractor
from lrdit.experiment import Experiment
from lrdit.model import layouts, tensor_files
from lrdit.modes import analyze, evaluate
from lrdit.pretrained import open_pretrained
from lrdit.report import page
from lrdit.report.contents import make_report
from lrdit.runtime import metric_writer, store, workdir
from lrdit.sampling import sample_set
from lrdit.train.checkpoints import Checkpoints
from tests import tiny, trained, workdirs
from tests.fuzz.case import Target
from tests.truncations import write_truncation

SAMPLES = ({"seed": 0, "rank_table": {"blocks_0/qkv": [2, 4]}}, {"jax": "1"}, 6, 4, 4)
SETTINGS = classifier.ClassifierSettings(seed=0, num_steps=1)
ANALYZED = {"checkpoint_step": 8, "boundaries": [0, 500, 1000]}


@functools.cache
def _config(**fields: Any) -> Any:
  return tiny.tiny_config("method=full", **fields)


def make_config(path: pathlib.Path) -> None:
  config = _config()
  run_config.store_config(path, config)
  (path / "checkpoints" / "4").mkdir(parents=True)
  (path / "checkpoints" / "4" / "x").write_text("")
  change = {"step": 2, "field": "training.num_steps", "before": 4, "after": 8}
  (path / run_config.CHANGES).write_text(json.dumps(change) + "\n")
  (path / "data.json").write_text(json.dumps({"train": {"name": "digits", "vae": "ab"}}))
  (path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0.5}\n{"step": 2}\n')


def read_config(path: pathlib.Path) -> None:
  """Read what continuing a run reads, and open the run in a notebook."""
  run_config.check_workdir(path, _config(), create=True)
  run_config.log_process_fields(path, _config())
  workdir.check_data(path, {"train": {"name": "digits", "vae": "ab"}})
  run_config.begin_config(path, _config(), 3)
  metric_writer.MetricWriter(path, 1, tensorboard=False).close()


def open_run(path: pathlib.Path) -> None:
  lrdit.open_run(path)


def make_workdir(path: pathlib.Path) -> None:
  workdirs.make_run(path)
  change = {"step": 2, "field": "training.num_steps", "before": 4, "after": 8}
  (path / run_config.CHANGES).write_text(json.dumps(change) + "\n")


def read_report(path: pathlib.Path) -> None:
  json.dumps(make_report([str(path)], "out").to_json()).encode()


def read_page(path: pathlib.Path) -> None:
  """Draw the page, which must not hold a script."""
  text = page.render(make_report([str(path)], "out"))
  assert "<script" not in text


def read_evaluation(path: pathlib.Path) -> None:
  """Do with a kept evaluation what `--mode=evaluate` does."""
  kept = evaluate.read_kept(path / "evaluation.json", {"checkpoint_step": 8})
  kept["held_out"].get("draws")
  own = kept["samples"].get("default")
  evaluate.is_measured(_config(), own, workdirs.METADATA)
  measured = {"metadata": workdirs.METADATA, "reference": workdirs.REFERENCE}
  evaluate.merged(own, measured | {field: {} for field in evaluate.BY_EXTRACTOR})


def make_samples(path: pathlib.Path, finish: bool = True) -> None:
  """Sample, or go on with it."""
  with sample_set.SampleSetWriter(path, *SAMPLES, png_files=False) as writer:
    if writer.is_finished:
      return
    for first, count in ((0, 4), (4, 2)) if finish else ((0, 4),):
      if first >= writer.num_done:
        writer.append(np.full((count, 4, 4, 1), 7 + first, np.uint8))
    if finish:
      writer.finish(lambda index: index % 3, {"num_devices": 1})


def read_samples(path: pathlib.Path) -> None:
  """Read a finished set, and take it up to finish it or to add to it."""
  _, batches = sample_set.read_sample_set(path, 4)
  for _ in batches:
    pass
  take_up(path)


def take_up(path: pathlib.Path) -> None:
  sample_set.SampleSetWriter(path, *SAMPLES[:2], 9, *SAMPLES[3:], png_files=True).__exit__()


def _images(split: str) -> Source:
  scans = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 3), np.uint8)
  return Source(scans, np.arange(12, dtype=np.int32) % 3, 3, {"name": "made", "split": split})


def make_features(path: pathlib.Path) -> None:
  """Write a reference, and a classifier that was not trained."""
  references.open_reference(path / "r.npz", _images("train"), PixelExtractor(4, 3), 8)
  network = classifier.ClassifierNetwork(4, 3)
  shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 4, 4, 3), np.float32))
  params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes["params"])
  extractor = classifier.ClassifierExtractor(params, 4, 3, 3)
  store.save_arrays(path / classifier.WEIGHTS, classifier.flatten(params))
  record = {"format": 1, "data": {s: _images(s).fingerprint for s in ("train", "eval")}}
  record |= {"image_size": 4, "num_channels": 3, "num_classes": 3}
  record |= {"settings": vars(SETTINGS), "digest": extractor.digest, "held_out_accuracy": 0.5}
  store.write_json(path / classifier.RECORD, record)


def read_features(path: pathlib.Path) -> None:
  references.open_reference(path / "r.npz", _images("train"), PixelExtractor(4, 3), 8)
  if (path / classifier.RECORD).exists():  # otherwise one is trained
    classifier.open_classifier(path, _images("train"), _images("eval"), SETTINGS)


def read_truncation(path: pathlib.Path) -> None:
  fields = dict(rank__schedule="measured", rank__analysis=str(path / "truncation.json"))
  Experiment(tiny.tiny_config(**fields))


class _Analysis(analyze.Analysis):
  """An analysis of random parameters, which has no checkpoint to read."""

  def __init__(self, path: pathlib.Path):
    self.experiment = Experiment(_config())
    self._directory, self.key, self.title = path, ANALYZED, "title"
    self.plan, self.boundaries = self.experiment.plan, ANALYZED["boundaries"]
    self.params = layouts.nest(trained.random_params(_config()))


def read_analysis(path: pathlib.Path) -> None:
  """Take a section's result from its file, if it is there, and draw it."""
  analyze.analyze_weights(_Analysis(path))


def make_checkpoint(path: pathlib.Path) -> None:
  params = layouts.nest(trained.random_params(_config()))
  trained.save_checkpoint(path, _config(), step=4, params=params, keep=2)
  trained.save_checkpoint(path, _config(), step=8, params=params, keep=2)


def read_checkpoint(path: pathlib.Path) -> None:
  """Restore what sampling restores, and what another run starts from.

  It is what was saved, whichever step it is from.
  """
  config, saved = _config(), trained.random_params(_config())
  with contextlib.closing(Checkpoints(path)) as checkpoints:
    template = Experiment(config).params_template
    _, found = checkpoints.restore_params(template, ["raw", "ema"])
    _, stored, alone = checkpoints.restore_run("raw")
  assert run_config.as_config(stored).to_dict() == config.to_dict()
  for params in (alone, *found.values()):
    restored = layouts.flat(params)
    assert all(np.array_equal(restored[name], value) for name, value in saved.items())


def _dit_config(path: pathlib.Path) -> Any:
  return _config(init__from_=str(path))


def make_dit(path: pathlib.Path, layout: str) -> None:
  config = _config()
  shape, params = Experiment(config).shape, trained.random_params(config)
  own = layout == layouts.OWN
  tensors = params if own else layouts.to_tensors(layout, params, shape)
  tensor_files.write_safetensors(path / "model.safetensors", tensors, {})
  if layout != layouts.OFFICIAL:
    fields = {} if own else layouts.diffusers_config(shape)
    fields["lrdit"] = run_config.trained_with(config)
    (path / "config.json").write_text(json.dumps(fields))


def make_torch(path: pathlib.Path) -> None:
  import torch

  config = _config()
  tensors = layouts.to_tensors(
    layouts.OFFICIAL, trained.random_params(config), Experiment(config).shape
  )
  stored = {key: torch.tensor(value) for key, value in tensors.items()}
  torch.save({"model": stored, "ema": stored}, path / "diffusion_pytorch_model.bin")


def read_dit(path: pathlib.Path) -> None:
  config = _dit_config(path)
  open_pretrained(config, Experiment(config).shape)


TARGETS = {
  "config": Target(make_config, read_config, leave=("checkpoints/*",)),
  "open_run": Target(make_config, open_run, leave=("checkpoints/*", "*.jsonl", "data.json")),
  "report": Target(make_workdir, read_report),
  "page": Target(make_workdir, read_page),
  "evaluation": Target(make_workdir, read_evaluation, leave=("samples/*", "*.jsonl", "*g.json")),
  "samples": Target(make_samples, read_samples, leave=("grid.png",)),
  "unfinished": Target(functools.partial(make_samples, finish=False), take_up),
  "features": Target(make_features, read_features),
  "truncation": Target(lambda path: write_truncation(path / "truncation.json"), read_truncation),
  "analysis": Target(read_analysis, read_analysis, leave=("*.png",)),
  "checkpoint": Target(make_checkpoint, read_checkpoint),
  "dit_torch": Target(make_torch, read_dit, needs="torch"),
}
for name in layouts.LAYOUTS:
  TARGETS[f"dit_{name}"] = Target(functools.partial(make_dit, layout=name), read_dit)
