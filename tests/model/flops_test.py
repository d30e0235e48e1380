"""Analytic counts against published numbers, traced products and XLA's counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrdit.experiment import Experiment
from lrdit.model import dit, flops, low_rank
from lrdit.rank import plan as rank_schedule
from lrdit.runtime.errors import UserError
from tests.programs import traced_macs, training
from tests.tiny import DEEPER, tiny_config

DENSE = rank_schedule.dense_plan(1000)
# name: (method, rank.compute)
ARMS = {
  "full": ("full", "grouped"),
  "narrow": ("narrow", "grouped"),
  "static": ("static", "grouped"),
  "adaptive": ("adaptive", "grouped"),
  "masked": ("adaptive", "masked"),
}
# At this width elementwise operations stay below 2 %. There is one block because XLA counts the
# body of a loop once.
WIDE = dict(
  data__image_size=32,  # 256 tokens, so attention's products are 4 %
  model__hidden_size=1024,
  model__num_heads=8,
  model__depth=1,
  rank__multiple_of=8,
  rank__num_buckets=3,
  rank__dense_layers=("patch_embed", "final_layer/linear"),
)


def arm_config(arm, **fields):
  method, compute = ARMS[arm]
  return tiny_config(f"method={method}", rank__compute=compute, **(DEEPER | fields))


def forward(config, bucket, batch=4):
  """Return the forward pass at one bucket and its arguments."""
  model = Experiment(config).model()
  s = model.shape
  x = jax.ShapeDtypeStruct((batch, s.image_size, s.image_size, s.channels), jnp.float32)
  t = jax.ShapeDtypeStruct((batch,), jnp.int32)

  def function(params, x, t, y):
    return model.apply({"params": params}, x, t, y, low_rank.RankSelection(bucket))

  return function, (Experiment(config).params_template, x, t, t)


def macs_of(config):
  made = Experiment(config)
  return flops.mean_forward_macs(made.shape, made.plan)


@pytest.mark.parametrize(
  ("fields", "step", "width"),
  [
    (dict(model__hidden_size=128, model__depth=4, model__num_heads=4), 4, 96),  # the digits
    (dict(model__hidden_size=192, model__depth=6, model__num_heads=6), 12, 144),
    (dict(model__hidden_size=128, model__depth=2, model__num_heads=4, rank__ratio=0.2), 4, None),
    (dict(model__hidden_size=128, model__depth=2, model__num_heads=1, rank__ratio=1.0), 4, None),
  ],
)
def test_the_narrow_arm_is_the_widest_dense_model_of_at_most_the_static_arm_s_macs(
  fields, step, width
):
  image = dict(data__image_size=32) if width == 144 else {}
  fields = DEEPER | fields | image | dict(model__patch_size=4 if image else 2, rank__multiple_of=1)
  narrow, static = (tiny_config(f"method={arm}", **fields) for arm in ("narrow", "static"))
  found = Experiment(narrow).shape
  assert found.hidden_size % step == 0
  assert width in (found.hidden_size, None)
  assert (found.depth, found.num_heads) == (narrow.model.depth, narrow.model.num_heads)
  assert narrow.model.hidden_size == static.model.hidden_size  # the workdir resolves alike again
  assert macs_of(narrow) <= macs_of(static)
  wider = dict(fields, model__hidden_size=found.hidden_size + step)
  if found.hidden_size < static.model.hidden_size:
    assert macs_of(tiny_config("method=full", **wider)) > macs_of(static)


def test_a_narrow_arm_that_no_width_allows_is_refused():
  fields = dict(model__hidden_size=32, model__num_heads=32, rank__ratio=0.1, rank__multiple_of=1)
  with pytest.raises(UserError, match=r"no multiple of 32 .* is a width"):
    Experiment(tiny_config("method=narrow", **fields))


# Giga-MACs at 32x32x4, from Peebles and Xie 2023, tables 1 and 4.
PUBLISHED = {"S/2": 6.06, "B/2": 23.01, "L/2": 80.71, "XL/2": 118.64, "S/8": 0.36, "XL/4": 29.05}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_published_variants_have_the_published_macs(variant):
  shape = dit.DiTShape(32, 4, 1000, **dit.decode_variant(variant), learn_sigma=True)
  macs = flops.forward_macs(shape, DENSE, 0)
  assert macs / 1e9 == pytest.approx(PUBLISHED[variant], rel=0.005, abs=0.005)


@pytest.mark.parametrize(
  ("arm", "num_classes"), [("full", 0), ("narrow", 10), ("static", 10), ("adaptive", 10)]
)
def test_the_number_of_parameters_is_the_model_s(arm, num_classes):
  config = arm_config(arm, data__num_classes=num_classes)
  counted = flops.num_parameters(Experiment(config).shape, Experiment(config).plan)
  assert counted == sum(p.size for p in jax.tree.leaves(Experiment(config).params_template))


def test_a_bucket_has_as_many_parameters_as_its_slice():
  config = tiny_config()
  shape, plan = Experiment(config).shape, Experiment(config).plan
  params = jax.tree.map(lambda p: np.zeros(p.shape), Experiment(config).params_template)
  for bucket in range(plan.num_buckets):
    sliced = low_rank.slice_params(params, plan, bucket)
    counted = flops.num_parameters(shape, plan.at_bucket(bucket))
    assert counted == sum(p.size for p in jax.tree.leaves(sliced))


@pytest.mark.parametrize("method", ["full", "narrow", "static", "adaptive"])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_forward_counts_every_traced_product(method, learn_sigma):
  config = tiny_config(f"method={method}", model__learn_sigma=learn_sigma, **DEEPER)
  shape, plan = Experiment(config).shape, Experiment(config).plan
  assert plan.num_buckets == (3 if method == "adaptive" else 1)
  for bucket in range(plan.num_buckets):
    function, args = forward(config, bucket)
    traced = traced_macs(jax.make_jaxpr(function)(*args).jaxpr)
    assert traced == 4 * flops.forward_macs(shape, plan, bucket)


@pytest.mark.parametrize(
  ("arm", "num_devices"), [("full", 1), ("static", 4), ("adaptive", 4), ("masked", 1)]
)
def test_training_counts_every_traced_product(arm, num_devices):
  # The first layers, whose inputs need no gradient, are factorized as well.
  ranks = dict(rank__dense_layers=("blocks_0/mlp",), rank__match="total", rank__multiple_of=1)
  config = arm_config(arm, training__batch_size=32, **ranks)
  step, args, groups = training(config, jax.devices()[:num_devices])
  assert len(groups) == (3 if arm == "adaptive" else 1)
  counted = flops.training_macs(Experiment(config).shape, Experiment(config).plan, groups)
  assert traced_macs(jax.make_jaxpr(step)(*args).jaxpr) == counted


@pytest.mark.parametrize("rule", ["whole", "bands"])
@pytest.mark.parametrize("method", ["full", "adaptive"])
def test_muon_s_products_are_counted(method, rule):
  fields = dict(optimizer__factor_update=rule, optimizer__muon_newton_schulz_steps=3)
  made = Experiment(tiny_config(f"method={method}", optimizer__name="muon", **fields))
  params = made.params_template
  state = jax.eval_shape(made.optimizer.init, params)
  traced = traced_macs(jax.make_jaxpr(made.optimizer.update)(params, state, params).jaxpr)
  assert made.update_macs == traced > 0
  adamw = Experiment(tiny_config(f"method={method}"))
  assert adamw.update_macs == 0


@pytest.mark.parametrize("method", ["full", "adaptive"])
def test_forward_macs_match_xla_to_two_percent(method):
  config = tiny_config(f"method={method}", **WIDE)
  shape, plan = Experiment(config).shape, Experiment(config).plan
  for bucket in range(plan.num_buckets):
    function, args = forward(config, bucket)
    counted = flops.FLOPS_PER_MAC * 4 * flops.forward_macs(shape, plan, bucket)
    assert counted == pytest.approx(xla_flops(jax.jit(function), args), rel=0.02)


@pytest.mark.parametrize("arm", ["full", "adaptive"])
def test_training_macs_match_xla_to_two_percent(arm):
  """The batch is large enough that the optimizer's work does not matter."""
  config = arm_config(arm, training__batch_size=32, **WIDE)
  step, args, groups = training(config, jax.devices()[:1])
  macs = flops.training_macs(Experiment(config).shape, Experiment(config).plan, groups)
  assert flops.FLOPS_PER_MAC * macs == pytest.approx(xla_flops(step, args), rel=0.02)


def xla_flops(function, args):
  """Return XLA's count before optimisation, elementwise operations included."""
  return function.lower(*args).cost_analysis()["flops"]


@pytest.mark.parametrize("is_guided", [False, True])
def test_a_solver_step_of_each_bucket_matches_xla(is_guided):
  """XLA counts the body of the loop over solver steps once."""
  low = None if is_guided else 1e9
  guidance = dict(sampling__guidance_scale=2.0, sampling__guidance_min_noise=low)
  config = tiny_config(**guidance, **WIDE)
  sampler, batch = Experiment(config).sampler(jax.devices()[:1]), 4
  template = Experiment(config).params_template
  plan, shape = sampler.model.plan, sampler.model.shape
  x = jax.ShapeDtypeStruct((batch, 32, 32, 1), jnp.float32)
  y, index = (jax.ShapeDtypeStruct((batch,), d) for d in (jnp.int32, jnp.uint32))
  assert list(sampler.run_program) == [(bucket, is_guided) for bucket in range(3)]
  for (bucket, _), run in sampler.run_program.items():
    sliced = jax.eval_shape(lambda p, b=bucket: low_rank.slice_params(p, plan, b), template)
    step, passes = np.zeros(1, np.int32), np.array([1 + is_guided])
    counted = batch * flops.sampling_macs(shape, plan.at_bucket(bucket), step, passes)
    found = xla_flops(run, (sliced, (x, x), y, index, np.int32(0), np.int32(1)))
    assert flops.FLOPS_PER_MAC * counted == pytest.approx(found, rel=0.02)


def test_sampling_macs_are_the_sum_over_steps():
  limits = dict(sampling__guidance_min_noise=0.5, sampling__guidance_max_noise=2.0)
  experiment = Experiment(
    tiny_config(sampling__num_steps=20, sampling__guidance_scale=2.0, **limits)
  )
  sampler = experiment.sampler(jax.devices()[:1])
  shape, plan, expected = sampler.model.shape, sampler.model.plan, 0
  for (bucket, is_guided), first, end in sampler.segments:
    expected += (1 + is_guided) * (end - first) * flops.forward_macs(shape, plan, bucket)
  assert {program.is_guided for program in sampler.run_program} == {False, True}
  assert experiment.sampling_macs == expected


def test_matched_arms_have_equal_mean_macs():
  """With match `activated` the mean MACs equal the static arm's, to within the multiple."""
  static, adaptive = (
    flops.mean_forward_macs(Experiment(c).shape, Experiment(c).plan)
    for c in (tiny_config(f"method={m}", **WIDE) for m in ("static", "adaptive"))
  )
  assert adaptive == pytest.approx(static, rel=0.03)
