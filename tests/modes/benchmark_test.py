"""A tiny run of the real command line, and the arithmetic of the report. No timings."""

import json
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrdit.experiment import Experiment
from lrdit.model import dit, flops, low_rank
from lrdit.modes import benchmark
from lrdit.rank import plan as rank_schedule
from lrdit.train import training_step
from tests import tiny
from tests.tiny import tiny_config

FIELDS = {
  "benchmark.rounds": 3,
  "benchmark.matmul_size": 64,
  "model.depth": 1,
  "rank.dense_layers": '("patch_embed","final_layer/linear")',
  "sampling.guidance_scale": 2.0,
}
ARMS = ["full", "static", "adaptive", "adaptive, masked"]
TRAINING_FIELDS = {
  "num_parameters",
  "rank_groups",
  "flops_per_step",
  "compile_seconds",
  "step_seconds",
  "steps_per_second",
  "images_per_second",
  "flops_per_second",
  "peak_fraction",
  "memory_bytes",
  "speedup_over_full",
  "full_flops_over_these",
}
BUCKET_FIELDS = {
  "bucket",
  "solver_steps",
  "flops_per_step",
  "step_seconds",
  "step_seconds_per_image",
  "flops_per_second",
  "peak_fraction",
  "time_over_highest_bucket",
  "flops_over_highest_bucket",
}
SAMPLING_FIELDS = {
  "compile_seconds",
  "buckets",
  "flops_per_run",
  "run_seconds",
  "run_seconds_from_buckets",
  "seconds_per_image",
  "flops_per_second",
  "peak_fraction",
  "speedup_over_full",
  "full_flops_over_these",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """(what was printed, benchmark.json) of one run on two devices."""
  workdir = tmp_path_factory.mktemp("benchmark") / "run"
  flags = [f"--config.{field}={value}" for field, value in FIELDS.items()]
  done = tiny.run_main(workdir, "--mode=benchmark", *flags, num_devices=2)
  assert [path.name for path in workdir.iterdir()] == ["benchmark.json"]
  return done.stdout, json.loads((workdir / "benchmark.json").read_text())


def test_says_what_its_figures_must_be_quoted_with(finished):
  _, result = finished
  assert result["jax"] == jax.__version__
  assert (result["backend"], result["num_devices"]) == ("cpu", 2)
  assert (result["variant"], result["dtype"], result["batch_size"]) == ("T/2", "float32", 16)
  assert (result["rounds"], result["num_steps"], result["sampling_batch_size"]) == (3, 10, 4)
  assert result["model"]["hidden_size"] == 32
  assert result["rank"]["num_buckets"] == 3
  assert result["device_peak_bytes_of_all_arms"] is None  # a CPU does not say
  assert result["matmul_peak"]["size"] == 64


def test_reports_training_of_every_arm(finished):
  _, result = finished
  arms, peak = result["training"], result["matmul_peak"]["flops_per_second"]
  assert list(arms) == ARMS
  for arm in arms.values():
    assert set(arm) == TRAINING_FIELDS
    seconds = arm["step_seconds"]["median"]
    assert len(arm["step_seconds"]["rounds"]) == 3
    assert seconds == np.median(arm["step_seconds"]["rounds"])
    assert arm["step_seconds"]["min"] == min(arm["step_seconds"]["rounds"])
    assert arm["images_per_second"] == pytest.approx(16 / seconds)
    assert arm["images_per_second"] == pytest.approx(16 * arm["steps_per_second"])
    assert arm["flops_per_second"] == pytest.approx(arm["flops_per_step"] / seconds)
    assert arm["peak_fraction"] == pytest.approx(arm["flops_per_second"] / peak)
    full = arms["full"]
    assert arm["speedup_over_full"] == pytest.approx(full["step_seconds"]["median"] / seconds)
    ratio = full["flops_per_step"] / arm["flops_per_step"]
    assert arm["full_flops_over_these"] == pytest.approx(ratio)
    # Parameters, their average and two moments in float32, and more.
    assert arm["memory_bytes"] > 16 * arm["num_parameters"]
    assert arm["compile_seconds"] > 0
    assert sum(size for size, _ in arm["rank_groups"]) == 8  # of one of the two devices
  counts = {name: arm["flops_per_step"] for name, arm in arms.items()}
  assert counts["static"] < counts["adaptive, masked"] < counts["full"]
  assert counts["adaptive"] < counts["adaptive, masked"]
  assert len(arms["adaptive"]["rank_groups"]) == 3
  assert arms["adaptive, masked"]["rank_groups"] == [[8, 2]]


def test_reports_sampling_of_every_arm(finished):
  _, result = finished
  arms, peak = result["sampling"], result["matmul_peak"]["flops_per_second"]
  assert list(arms) == ["full", "static", "adaptive"]
  for arm in arms.values():
    assert set(arm) == SAMPLING_FIELDS
    assert arm["compile_seconds"] > 0
    assert sum(bucket["solver_steps"] for bucket in arm["buckets"]) == 10
    total = sum(bucket["solver_steps"] * bucket["flops_per_step"] for bucket in arm["buckets"])
    assert arm["flops_per_run"] == total
    from_buckets = sum(
      bucket["solver_steps"] * bucket["step_seconds"]["median"] for bucket in arm["buckets"]
    )
    assert arm["run_seconds_from_buckets"] == pytest.approx(from_buckets)
    assert arm["run_seconds"]["median"] > 0
    seconds = arm["run_seconds_from_buckets"]
    assert arm["seconds_per_image"] == pytest.approx(seconds / 4)
    assert arm["peak_fraction"] == pytest.approx(arm["flops_per_run"] / seconds / peak)
    full = arms["full"]
    assert arm["speedup_over_full"] == pytest.approx(full["run_seconds_from_buckets"] / seconds)
    ratio = full["flops_per_run"] / arm["flops_per_run"]
    assert arm["full_flops_over_these"] == pytest.approx(ratio)


def test_counts_both_passes_of_guidance_and_every_device(finished):
  _, result = finished
  shape = dit.DiTShape(**result["model"])
  plan = rank_schedule.dense_plan(1000)
  step = result["sampling"]["full"]["buckets"][0]["flops_per_step"]
  assert step == 2 * 4 * 2 * flops.forward_macs(shape, plan, 0)
  training = 2 * flops.training_macs(shape, plan, [(16, 0)])
  assert result["training"]["full"]["flops_per_step"] == training
  seconds = result["matmul_peak"]["seconds"]["median"]
  of_products = 2 * benchmark.MATMUL_COUNT * 2 * 64**3
  assert result["matmul_peak"]["flops_per_second"] == pytest.approx(of_products / seconds)


def test_reports_every_bucket(finished):
  _, result = finished
  buckets = result["sampling"]["adaptive"]["buckets"]
  assert [bucket["bucket"] for bucket in buckets] == [0, 1, 2]
  highest = buckets[-1]
  for bucket in buckets:
    assert set(bucket) == BUCKET_FIELDS
    seconds = bucket["step_seconds"]["median"]
    assert bucket["step_seconds_per_image"] == pytest.approx(seconds / 4)
    time_ratio = seconds / highest["step_seconds"]["median"]
    assert bucket["time_over_highest_bucket"] == pytest.approx(time_ratio)
    flop_ratio = bucket["flops_per_step"] / highest["flops_per_step"]
    assert bucket["flops_over_highest_bucket"] == pytest.approx(flop_ratio)
  assert buckets[0]["flops_per_step"] < buckets[1]["flops_per_step"] < highest["flops_per_step"]


def test_prints_a_line_per_arm_and_bucket(finished):
  printed, result = finished
  assert f"jax {jax.__version__}" in printed
  for name in ARMS:
    text = f"{result['training'][name]['num_parameters']:,}"
    assert re.search(rf"^{name} +{text} ", printed, re.MULTILINE)
  for bucket in range(3):
    assert re.search(rf"^adaptive, bucket {bucket} ", printed, re.MULTILINE)
  for table in printed.split("\n\n")[1:]:
    assert len({len(line) for line in table.rstrip("\n").split("\n")}) == 1


@pytest.mark.parametrize(("limit", "expected"), [(1e12, 16), (None, 16), (2.5e6, 8), (1, 1)])
def test_halves_the_batch_until_all_arms_fit(limit, expected, monkeypatch):
  """A stand-in of an arm that takes its state and 100 kB an image."""
  tried = []

  def make_arm(config, devices):
    tried.append(config.training.batch_size)
    return mock.Mock(memory_bytes=1_000_000 + 100_000 * tried[-1])

  monkeypatch.setattr(benchmark, "TrainingArm", make_arm)
  monkeypatch.setattr(benchmark, "bytes_of_other_arms", lambda config: 400_000)
  stats = None if limit is None else {"bytes_limit": limit}
  device = mock.Mock(spec=jax.Device, memory_stats=lambda: stats)
  config = tiny_config()
  benchmark.full_arm_that_fits(config, [device])
  assert config.training.batch_size == expected == tried[-1]
  assert tried == [16, 8, 4, 2, 1][: len(tried)]


def test_bytes_of_other_arms_are_those_of_their_states_and_sampling_parameters():
  config, devices = tiny_config(model__depth=1), jax.devices()[:1]
  expected = 0
  for arm in benchmark.ARMS:
    fields = benchmark.arm_config(config, arm)
    template = Experiment(fields).params_template
    expected += 16 * sum(p.size for p in jax.tree.leaves(template)) if arm != "full" else 0
    if arm in benchmark.SAMPLING_ARMS:
      made = Experiment(fields).sampler(devices)
      sliced = made.slice_params(jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), template))
      expected += sum(p.nbytes for p in jax.tree.leaves(sliced))
  assert benchmark.bytes_of_other_arms(config) == expected


def test_arms_differ_in_method_and_compute_alone():
  config = tiny_config("method=static", rank__ratio=0.4)
  for arm, (method, compute) in benchmark.ARMS.items():
    made = benchmark.arm_config(config, arm).to_dict()
    assert (made["method"], made["rank"]["compute"]) == (method, compute)
    made["method"], made["rank"]["compute"] = config.method, config.rank.compute
    assert made == config.to_dict()


def test_every_round_times_every_task_once_in_turn():
  calls = []

  def make(name):
    return lambda number: calls.append((number, name)) or float(number)

  seconds = benchmark.interleave({name: make(name) for name in "abc"}, 4, lambda: None)
  assert seconds == {key: [0.0, 1.0, 2.0, 3.0] for key in "abc"}
  order = ["".join(name for number, name in calls if number == n) for n in range(4)]
  assert order == ["abc", "bca", "cab", "abc"]


def test_the_parts_of_a_run_are_the_whole_run():
  """Rounds that do not divide the steps, and more rounds than steps."""
  for rounds in (1, 3, 12):
    config = tiny_config(benchmark__rounds=rounds, sampling__num_steps=10)
    arm = benchmark.SamplingArm(config, jax.devices()[:1])
    ranges = []

    def run_range(carry, first, end, ranges=ranges):
      ranges.append((first, end))
      return carry

    arm._run_range = run_range
    part = arm.make_run()
    for number in range(rounds):
      assert part(number) > 0
    covered = [i for first, end in ranges for i in range(first, end)]
    assert covered == list(range(10))


def test_a_run_by_parts_ends_where_the_sampler_does():
  config = tiny_config(benchmark__rounds=3)
  arm = benchmark.SamplingArm(config, jax.devices()[:1])
  carry = arm._start
  for first, end in ((0, 4), (4, 5), (5, 10)):
    carry = arm._run_range(carry, first, end)
  whole = arm._run_range(arm._start, 0, 10)
  np.testing.assert_allclose(carry[0], whole[0], rtol=1e-5, atol=1e-6)
  assert np.abs(whole[0]).max() > 0


def test_gradients_of_the_random_parameters_are_not_zero():
  """Zeros would flatter: fresh parameters leave most gradients exactly zero."""
  config = tiny_config(model__depth=1)
  model = Experiment(config).model()
  params = jax.jit(lambda: benchmark.random_params(config))()
  x = jnp.asarray(benchmark.random_images(config, 4))
  t = y = jnp.arange(4)

  def loss(params):
    selection = low_rank.uniform_selection(4, 2)
    return jnp.square(model.apply({"params": params}, x, t, y, selection)).mean()

  grads = jax.grad(loss)(params)
  assert all(np.count_nonzero(g) for g in jax.tree.leaves(grads))


def test_times_the_very_step_of_training_with_its_state_donated(monkeypatch):
  program = mock.Mock(memory_analysis=lambda: None)
  monkeypatch.setattr(benchmark.TrainingArm, "_compile", lambda self: program)
  arm = benchmark.TrainingArm(tiny_config("method=full", model__depth=1), jax.devices()[:1])
  assert arm.memory_bytes is None
  assert arm._step.__wrapped__.func is training_step.train_step
  lowered = arm._step.lower(arm._state, arm._batch, arm._key)
  donated = re.findall(r"tf\.aliasing_output|jax\.buffer_donor", lowered.as_text())
  state = arm._state
  # All but what the last stage leaves unread.
  assert len(donated) >= len(jax.tree.leaves((state.params, state.ema_params, state.opt_state)))
