"""What devices exchange, and where arrays are."""

import math
import re

import jax
import numpy as np
import pytest

from lrdit.experiment import Experiment
from lrdit.runtime import parallel
from tests.programs import training
from tests.tiny import tiny_config

SHAPE = re.compile(r"([a-z]\d+)\[([\d,]*)\]")


def reduced_values(text):
  """Return how many values of each dtype the all-reduce operations of compiled code take."""
  counts = {}
  for result in re.findall(r"(?m)^.*? = (.*) all-reduce(?:-start)?\(", text):
    for dtype, dims in SHAPE.findall(result):
      size = math.prod(int(d) for d in dims.split(",") if d)
      counts[dtype] = counts.get(dtype, 0) + size
  return counts


@pytest.mark.parametrize("method", ["full", "adaptive"])
def test_a_step_moves_the_gradient_between_devices_and_little_else(method):
  """Beside it, the loss, the sums of the groups and whether the batch is finite."""
  config = tiny_config(f"method={method}")
  step, args, _ = training(config, jax.devices()[:4])
  text = step.lower(*args).compile().as_text()
  counts = reduced_values(text)
  num_params = sum(math.prod(x.shape) for x in jax.tree.leaves(Experiment(config).params_template))
  groups = Experiment(config).curriculum.num_groups
  assert counts == {"f32": num_params + 1 + groups, "s32": groups + 1}
  others = re.findall(r"(all-gather|all-to-all|reduce-scatter|collective-\w+)(?:-start)?\(", text)
  assert not others


def test_batches_are_spread_over_the_devices():
  devices = jax.devices()
  batch = {"image": np.zeros((4, 2, 3), np.float32)}
  [placed] = list(parallel.prefetch(iter([batch]), devices))
  rows = {s.device: s.data.shape for s in placed["image"].addressable_shards}
  assert rows == dict.fromkeys(devices, (1, 2, 3))


def test_sampling_uses_all_devices():
  config = tiny_config(sampling__batch_size=8, model__depth=1, rank__num_buckets=1)
  sampler = Experiment(config).sampler(jax.devices())
  params = sampler.bucket_params(jax.device_get(Experiment(config).initial_params()))
  images = sampler.sample_batch(params, np.arange(8), np.zeros(8, np.int32))
  rows = {s.device: s.data.shape[0] for s in images.addressable_shards}
  assert rows == dict.fromkeys(jax.devices(), 2)


def test_reading_takes_one_device_s_copy():
  state = parallel.replicate({"a": np.arange(3, dtype=np.float32)}, jax.devices())
  read = parallel.read(state)
  np.testing.assert_array_equal(read["a"], np.arange(3))
  assert isinstance(read["a"], np.ndarray)
