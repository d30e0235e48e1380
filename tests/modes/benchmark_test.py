"""A tiny run of the real command line, results of made-up timings, and each arm. No speed."""

import contextlib
import io
import itertools
import json
import re
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import main
from lrdit.benchmark import arms as arms_module
from lrdit.benchmark import measure, results
from lrdit.experiment import Experiment
from lrdit.model import low_rank
from lrdit.modes import benchmark
from lrdit.sampling.sampler import Program
from lrdit.train import step as step_module
from tests import tiny
from tests.benchmarks import gpu_check
from tests.programs import traced_macs, training
from tests.tiny import tiny_config

FIELDS = {
  "benchmark.rounds": 3,
  "benchmark.matmul_size": 64,
  "benchmark.optimizers": '("muon",)',
  "sampling.guidance_scale": 2.0,
}
GUIDED = Program(0, True)
ARMS = ["full", "narrow", "static", "adaptive", "adaptive, masked", "adaptive, muon"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """(what was printed, benchmark.json) of one run on four devices."""
  workdir = tmp_path_factory.mktemp("benchmark") / "run"
  flags = [f"--config.{field}={value}" for field, value in FIELDS.items()]
  argv = tiny.command(workdir, "--mode=benchmark", *flags)[1:]
  with contextlib.chdir(tiny.ROOT), contextlib.redirect_stdout(io.StringIO()) as printed:
    assert main.run(argv) == 0
  assert [path.name for path in workdir.iterdir()] == ["benchmark.json"]
  return printed.getvalue(), json.loads((workdir / "benchmark.json").read_text())


def test_holds_what_its_results_must_be_quoted_with(finished):
  _, result = finished
  assert result["jax"] == jax.__version__
  assert (result["backend"], result["num_devices"]) == ("cpu", 4)
  assert (result["variant"], result["dtype"], result["batch_size"]) == ("T/2", "float32", 16)
  assert (result["rounds"], result["num_steps"], result["sampling_batch_size"]) == (3, 10, 4)
  assert result["model"]["hidden_size"] == 32
  assert result["rank"]["num_buckets"] == 2
  assert result["device_peak_bytes_of_all_arms"] is None  # a CPU does not report it
  assert result["matmul_peak"]["size"] == 64


def test_the_gpu_check_s_table_has_a_row_of_every_arm(finished):
  rows = [row[0] for row in gpu_check.benchmark_rows("T/2", finished[1])]
  expected = [f"T/2, `{arm}`, training, batch 16" for arm in ARMS]
  assert rows == expected + [f"T/2, `{arm}`, sampling, batch 4" for arm in ARMS[:4]]


def test_counts_the_work_of_every_arm_and_bucket(finished):
  _, result = finished
  training, sampling = result["training"], result["sampling"]
  assert list(training) == ARMS
  assert list(sampling) == ARMS[:4]
  for arm in training.values():
    # Parameters, their average and two moments in float32, and more.
    assert arm["memory_bytes"] > 16 * arm["num_parameters"]
    assert arm["compile_seconds"] > 0
    assert len(arm["step_seconds"]["rounds"]) == 3
    assert sum(size for size, _ in arm["rank_groups"]) == 4  # of one of the four devices
  counts = {name: arm["flops_per_step"] for name, arm in training.items()}
  assert counts["static"] < counts["adaptive, masked"] < counts["full"]
  assert counts["narrow"] <= counts["static"]
  assert counts["adaptive"] < counts["adaptive, masked"]
  assert len(training["adaptive"]["rank_groups"]) == 2
  assert training["adaptive, masked"]["rank_groups"] == [[4, 1]]
  update_macs = Experiment(tiny_config(optimizer__name="muon")).update_macs
  # Each of the four devices orthogonalizes all momenta.
  assert counts["adaptive, muon"] == counts["adaptive"] + 2 * 4 * update_macs > counts["adaptive"]
  times = {name: arm["step_seconds"]["median"] for name, arm in training.items()}
  ratio = times["adaptive, muon"] / times["adaptive"]
  assert result["ratios"]["training/adaptive, muon/adaptive"] == ratio
  for arm in sampling.values():
    assert arm["compile_seconds"] > 0
    assert sum(bucket["solver_steps"] for bucket in arm["buckets"]) == 10
    assert len(arm["run_seconds"]["rounds"]) == result["sampling_runs"]
  buckets = sampling["adaptive"]["buckets"]
  assert [bucket["bucket"] for bucket in buckets] == [0, 1]
  low, high = (bucket["flops_per_step"] for bucket in buckets)
  assert low < high


def test_counts_the_products_of_every_timed_program(finished):
  """In the traced programs: both passes of guidance, and every device."""
  _, result = finished
  config, devices = tiny_config("method=full"), jax.devices()
  step, args, _ = training(config, devices)
  of_a_device = 2 * traced_macs(jax.make_jaxpr(step)(*args).jaxpr)
  assert result["training"]["full"]["flops_per_step"] == 4 * of_a_device
  config = tiny_config("method=full", sampling__guidance_scale=2.0)
  arm = arms_module.SamplingArm(Experiment(config), devices)
  args = arm._arguments(GUIDED, arm._start, 0, 1)
  traced = traced_macs(jax.make_jaxpr(arm.sampler.run_program[GUIDED])(*args).jaxpr)
  assert result["sampling"]["full"]["buckets"][0]["flops_per_step"] == 2 * traced
  peak = arms_module.MatmulPeak(64, jnp.float32, devices)
  seconds = result["matmul_peak"]["seconds"]["median"]
  of_products = 2 * traced_macs(jax.make_jaxpr(peak._products)().jaxpr)
  assert result["matmul_peak"]["flops_per_second"] == pytest.approx(of_products / seconds)


def test_prints_a_line_per_arm_and_bucket(finished):
  printed, result = finished
  assert f"jax {jax.__version__}" in printed
  assert "medians of 3 rounds; batch 16 in training, 4 in sampling by ddim" in printed
  for name in ARMS:
    text = f"{result['training'][name]['num_parameters']:,}"
    assert re.search(rf"^{name} +{text} ", printed, re.MULTILINE)
  for bucket in range(2):
    assert re.search(rf"^adaptive, bucket {bucket} ", printed, re.MULTILINE)
  for table in printed.split("\n\n")[1:]:
    assert len({len(line) for line in table.rstrip("\n").split("\n")}) == 1


def made_up_arms():
  """A peak of 1000 FLOPs, and a full and an adaptive arm, with the seconds of every task."""

  def training(flops, seconds):
    return types.SimpleNamespace(
      rank_groups=((16, 0),),
      flops=flops,
      num_parameters=7,
      compile_seconds=1.0,
      memory_bytes=None,
      time=lambda number: seconds[number],
    )

  def sampling(flops_of_bucket, steps_of_bucket, seconds_of_bucket, run_seconds):
    return types.SimpleNamespace(
      sampler=types.SimpleNamespace(settings=types.SimpleNamespace(batch_size=4)),
      programs=[Program(bucket, bucket == 1) for bucket in flops_of_bucket],
      compile_seconds=1.0,
      solver_steps=lambda program: steps_of_bucket[program.bucket],
      step_flops=lambda program: flops_of_bucket[program.bucket],
      run_flops=lambda: sum(n * flops_of_bucket[b] for b, n in steps_of_bucket.items()),
      time_program=lambda program, number: seconds_of_bucket[program.bucket][number],
      make_run=lambda: lambda number: run_seconds[number],
    )

  peak = types.SimpleNamespace(size=5, flops=1000, time=lambda number: [1.0, 0.5, 1.0][number])
  # Two steps a timing: a step of the full arm takes 2 s, one of the adaptive arm 0.5 s.
  trained = {"full": training(1000, [4, 4, 9]), "adaptive": training(100, [1, 0.8, 1])}
  sampled = {
    "full": sampling({0: 100}, {0: 10}, {0: [2, 2, 8]}, [3, 3, 4]),
    "adaptive": sampling(
      {0: 10, 1: 40}, {0: 6, 1: 4}, {0: [0.5] * 3, 1: [1, 1, 3]}, [1.0, 1.5, 1.0]
    ),
  }
  return peak, trained, sampled


@pytest.fixture
def made_up(monkeypatch):
  """The config of three rounds of made-up arms."""
  config = tiny_config(benchmark__rounds=3, benchmark__steps=2, benchmark__sampling_runs=1)
  peak, trained, sampled = made_up_arms()
  monkeypatch.setattr(measure, "MatmulPeak", lambda *_: peak)
  monkeypatch.setattr(
    measure, "make_arms", lambda experiments, _: arms_module.Arms(experiments, trained, sampled)
  )
  return config


EXPECTED_BUCKETS = [
  {
    "bucket": 0,
    "is_guided": False,
    "solver_steps": 6,
    "flops_per_step": 10,
    "step_seconds": {"median": 0.25, "min": 0.25, "rounds": [0.25] * 3},
    "step_seconds_per_image": 0.0625,
    "flops_per_second": 40,
    "peak_fraction": 0.04,
    "time_over_highest_bucket": 0.5,
    "flops_over_highest_bucket": 0.25,
  },
  {
    "bucket": 1,
    "is_guided": True,
    "solver_steps": 4,
    "flops_per_step": 40,
    "step_seconds": {"median": 0.5, "min": 0.5, "rounds": [0.5, 0.5, 1.5]},
    "step_seconds_per_image": 0.125,
    "flops_per_second": 80,
    "peak_fraction": 0.08,
    "time_over_highest_bucket": 1,
    "flops_over_highest_bucket": 1,
  },
]


def test_results_of_known_seconds(made_up):
  written = []
  measure.measure({"full": Experiment(made_up)}, jax.devices()[:1], written.append)
  assert [result["rounds"] for result in written] == [1, 2, 3]
  assert [result["sampling"]["full"]["run_seconds"] for result in written[:2]] == [None, None]
  result = written[-1]
  assert result["matmul_peak"] == {
    "size": 5,
    "flops_per_second": 1000,
    "highest_flops_per_second": 2000,
    "seconds": {"median": 1.0, "min": 0.5, "rounds": [1.0, 0.5, 1.0]},
  }
  assert result["training"]["adaptive"] == {
    "num_parameters": 7,
    "rank_groups": [[16, 0]],
    "flops_per_step": 100,
    "compile_seconds": 1.0,
    "step_seconds": {"median": 0.5, "min": 0.4, "rounds": [0.5, 0.4, 0.5]},
    "steps_per_second": 2,
    "images_per_second": 32,
    "flops_per_second": 200,
    "peak_fraction": 0.2,
    "memory_bytes": None,
    "speedup_over_full": 4,
    "full_flops_over_these": 10,
  }
  sampled = result["sampling"]["adaptive"]
  assert sampled.pop("buckets") == EXPECTED_BUCKETS
  assert sampled == {
    "compile_seconds": 1.0,
    "flops_per_run": 220,
    "run_seconds": {"median": 3.5, "min": 3.5, "rounds": [3.5]},
    "run_seconds_from_buckets": 3.5,
    "seconds_per_image": 0.875,
    "flops_per_second": pytest.approx(220 / 3.5),
    "peak_fraction": pytest.approx(0.22 / 3.5),
    "speedup_over_full": pytest.approx(10 / 3.5),
    "full_flops_over_these": pytest.approx(1000 / 220),
  }


def test_a_benchmark_that_is_killed_keeps_its_rounds(made_up, monkeypatch, tmp_path):
  interleave = measure.interleave

  def killed_in_the_third_round(tasks, rounds, after_round):
    interleave(tasks, 2, after_round)
    raise KeyboardInterrupt

  monkeypatch.setattr(measure, "interleave", killed_in_the_third_round)
  with pytest.raises(KeyboardInterrupt):
    benchmark.benchmark(made_up, str(tmp_path), jax.devices()[:1])
  kept = json.loads((tmp_path / "benchmark.json").read_text())
  assert kept["rounds"] == 2
  assert kept["training"]["full"]["step_seconds"]["rounds"] == [2, 2]
  assert kept["sampling"]["full"]["run_seconds"] is None
  printed = results.format_results(kept)
  assert "not run" in printed
  assert "\nadaptive, bucket 1, guided " in printed


@pytest.mark.parametrize(("limit", "expected"), [(1e12, 16), (None, 16), (2.5e6, 8), (1, 1)])
def test_halves_the_batch_until_all_arms_fit(limit, expected, monkeypatch):
  """A stand-in of an arm that takes its state and 100 kB an image."""
  tried = []

  def make_arm(experiment, devices):
    tried.append(experiment.config.training.batch_size)
    return mock.Mock(memory_bytes=1_000_000 + 100_000 * tried[-1])

  monkeypatch.setattr(arms_module, "TrainingArm", make_arm)
  monkeypatch.setattr(arms_module, "bytes_of_other_arms", lambda experiments: 400_000)
  stats = None if limit is None else {"bytes_limit": limit}
  device = mock.Mock(spec=jax.Device, memory_stats=lambda: stats)
  experiments, _ = arms_module.fit_memory(arms_module.arm_experiments(tiny_config()), [device])
  assert {made.config.training.batch_size for made in experiments.values()} == {expected}
  assert expected == tried[-1]
  assert tried == [16, 8, 4, 2, 1][: len(tried)]


def test_bytes_of_other_arms_are_those_of_their_states_and_sampling_parameters():
  experiments = arms_module.arm_experiments(tiny_config())
  expected = 0
  for arm, experiment in experiments.items():
    template = experiment.params_template
    expected += 16 * sum(p.size for p in jax.tree.leaves(template)) if arm != "full" else 0
    if arm in arms_module.SAMPLING_ARMS:
      made = experiment.sampler(jax.devices()[:1])
      sliced = made.bucket_params(jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), template))
      expected += sum(p.nbytes for p in jax.tree.leaves(sliced))
  assert arms_module.bytes_of_other_arms(experiments) == expected


def test_arms_differ_in_method_compute_and_optimizer_alone():
  overrides = {"optimizer__name": "lion", "benchmark__optimizers": ("muon", "adamw")}
  config = tiny_config("method=static", rank__ratio=0.4, **overrides)
  experiments, own = arms_module.arm_experiments(config), config.optimizer.name
  expected = {arm: (*fields, own) for arm, fields in arms_module.ARMS.items()}
  expected["adaptive, muon"] = ("adaptive", "grouped", "muon")
  expected["adaptive, adamw"] = ("adaptive", "grouped", "adamw")
  assert experiments.keys() == expected.keys()
  for arm, fields in expected.items():
    made = experiments[arm].config.to_dict()
    assert (made["method"], made["rank"]["compute"], made["optimizer"]["name"]) == fields
    made["method"], made["rank"]["compute"] = config.method, config.rank.compute
    made["optimizer"]["name"] = own
    assert made == config.to_dict()


def test_every_round_times_every_task_once_in_turn():
  calls = []

  def make(name):
    return lambda number: calls.append((number, name)) or float(number)

  rounds = []
  measure.interleave({name: make(name) for name in "abc"}, 4, lambda s: rounds.append(len(s["a"])))
  assert rounds == [1, 2, 3, 4]
  order = ["".join(name for number, name in calls if number == n) for n in range(4)]
  assert order == ["abc", "bca", "cab", "abc"]


@pytest.fixture(scope="module")
def adaptive_sampler():
  """The sampling arm of ten solver steps in three buckets, the noisier half of them guided."""
  guidance = dict(sampling__guidance_scale=2.0, sampling__guidance_min_noise=1.0)
  config = tiny_config(sampling__num_steps=10, **guidance)
  return arms_module.SamplingArm(Experiment(config), jax.devices()[:1])


@pytest.mark.parametrize("rounds", [1, 3, 12])
def test_the_parts_of_a_run_are_the_whole_run(rounds, adaptive_sampler, monkeypatch):
  """Rounds that do not divide the steps, and more rounds than steps."""
  ranges = []
  monkeypatch.setattr(adaptive_sampler, "_rounds", rounds)
  monkeypatch.setattr(
    adaptive_sampler, "_run_range", lambda carry, *steps: ranges.append(range(*steps)) or carry
  )
  part = adaptive_sampler.make_run()
  for number in range(rounds):
    assert part(number) > 0
  assert [*itertools.chain(*ranges)] == list(range(10))


def test_a_run_by_parts_ends_where_the_sampler_does(adaptive_sampler):
  carry = adaptive_sampler._start
  for first, end in ((0, 4), (4, 5), (5, 10)):
    carry = adaptive_sampler._run_range(carry, first, end)
  programs = adaptive_sampler.programs
  assert {program.is_guided for program in programs} == {False, True}
  flops = [adaptive_sampler.solver_steps(p) * adaptive_sampler.step_flops(p) for p in programs]
  assert adaptive_sampler.run_flops() == sum(flops)
  whole = adaptive_sampler._run_range(adaptive_sampler._start, 0, 10)
  np.testing.assert_allclose(carry[0], whole[0], rtol=1e-5, atol=1e-6)
  assert np.abs(whole[0]).max() > 0


def test_gradients_of_the_random_parameters_are_not_zero():
  """Zeros would flatter: fresh parameters leave most gradients exactly zero."""
  experiment = Experiment(tiny_config())
  model, template = experiment.model(), experiment.params_template
  params = jax.jit(lambda: arms_module.random_params(template))()
  x = jnp.asarray(arms_module.random_images(experiment.shape, 4))
  t = y = jnp.arange(4)

  def loss(params):
    selection = low_rank.RankSelection(1)
    return jnp.square(model.apply({"params": params}, x, t, y, selection)).mean()

  grads = jax.jit(jax.grad(loss))(params)
  assert all(np.count_nonzero(g) for g in jax.tree.leaves(grads))


def test_times_the_very_step_of_training_with_its_state_donated(monkeypatch):
  program = mock.Mock(memory_analysis=lambda: None)
  monkeypatch.setattr(arms_module.TrainingArm, "_compile", lambda self: program)
  experiment = Experiment(tiny_config("method=full"))
  arm = arms_module.TrainingArm(experiment, jax.devices()[:1])
  assert arm.memory_bytes is None
  assert arm._step.__wrapped__.func is step_module.train_step
  lowered = arm._step.lower(arm._state, arm._batch, arm._key)
  donated = re.findall(r"tf\.aliasing_output|jax\.buffer_donor", lowered.as_text())
  state = arm._state
  # All but what the last stage leaves unread.
  assert len(donated) >= len(jax.tree.leaves((state.params, state.ema_params, state.opt_state)))
