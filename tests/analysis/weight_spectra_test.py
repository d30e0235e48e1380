"""Spectra of weights against numpy on the kernels themselves."""

import json

import numpy as np
import pytest

from lrdit.analysis import spectra, weight_spectra
from lrdit.analysis.unit_cache import UnitCache
from lrdit.model import dit
from lrdit.rank.plan import LayerRanks, RankPlan, dense_plan

SHAPE = dit.DiTShape(
  image_size=8,
  channels=1,
  num_classes=3,
  hidden_size=16,
  depth=2,
  num_heads=2,
  patch_size=2,
)
BOUNDARIES = (0, 4, 10, 20)
# Bucket 1 at t < 6 and t >= 18, bucket 0 between.
SEGMENTS = ((0, 1), (6, 0), (18, 1))
LOW_RANK = {
  "blocks_0/adaln": LayerRanks(8, (5, 12)),
  "blocks_0/attn/qkv": LayerRanks(8, (4, 9)),
  "blocks_1/mlp/fc2": LayerRanks(8, (3, 16)),
}
PLAN = RankPlan(20, SEGMENTS, tuple(LOW_RANK.items()))


def random_params(plan, seed=0):
  rng = np.random.default_rng(seed)
  params = {"y_embedder": {"embedding": np.ones((4, 16), np.float32)}}
  for name, (dim_in, dim_out) in dit.layer_shapes(SHAPE).items():
    shapes = {"kernel": (dim_in, dim_out), "bias": (dim_out,)}
    if name in plan.by_name:
      rank = plan.by_name[name].max_rank
      shapes = {"down": (dim_in, rank), "up": (rank, dim_out), "bias": (dim_out,)}
    layer = {key: rng.standard_normal(s, np.float32) for key, s in shapes.items()}
    tree = params
    for key in name.split("/")[:-1]:
      tree = tree.setdefault(key, {})
    tree[name.split("/")[-1]] = layer
  return params


@pytest.fixture
def analyze(tmp_path):
  def run(params, plan, key=None):
    cache = UnitCache(tmp_path / "weights", key or {})
    return weight_spectra.analyze_weights(params, plan, SHAPE, BOUNDARIES, cache)

  return run


def kernel_at(layer_params, rank):
  if rank is None:
    return layer_params["kernel"].astype(np.float64)
  down, up = (layer_params[key].astype(np.float64) for key in ("down", "up"))
  return down[:, :rank] @ up[:rank]


def expected_entry(kernel):
  sigma = np.linalg.svd(kernel, compute_uv=False)
  return spectra.measures(sigma)  # which spectra_test holds against the definitions


def test_kinds_of_all_layers():
  kinds = {name: weight_spectra.layer_kind(name) for name in dit.layer_shapes(SHAPE)}
  assert kinds == {
    "patch_embed": "other",
    "t_embedder/fc1": "other",
    "t_embedder/fc2": "other",
    "final_layer/adaln": "adaln",
    "final_layer/linear": "other",
  } | {
    f"blocks_{i}/{layer}": kind
    for i in range(2)
    for layer, kind in {
      "adaln": "adaln",
      "attn/qkv": "attention",
      "attn/proj": "attention",
      "mlp/fc1": "mlp",
      "mlp/fc2": "mlp",
    }.items()
  }
  assert weight_spectra.layer_kind("blocks_13/attn/qkv") == "attention"
  assert set(kinds.values()) == set(weight_spectra.KINDS)


@pytest.mark.parametrize("shape", [(16, 48), (64, 16), (4, 4)])
def test_a_dense_layer(shape):
  kernel = np.random.default_rng(0).standard_normal(shape, np.float32)
  bias = np.full(shape[1], np.nan, np.float32)  # is not looked at
  found = weight_spectra.analyze_layer({"kernel": kernel, "bias": bias}, None)
  assert (found["dim_in"], found["dim_out"]) == shape
  (entry,) = found["buckets"]
  assert entry["active_rank"] is None
  exact = np.linalg.svd(kernel.astype(np.float64), compute_uv=False)
  np.testing.assert_allclose(entry["singular_values"], exact, rtol=1e-6)
  for name, value in expected_entry(kernel.astype(np.float64)).items():
    assert entry[name] == pytest.approx(value, rel=1e-6)
    assert entry["normalised"][name] == pytest.approx(value / min(shape), rel=1e-6)
  assert json.loads(json.dumps(found)) == found


def test_a_low_rank_layer_at_each_bucket_as_its_product():
  rng = np.random.default_rng(1)
  params = {
    "down": rng.standard_normal((24, 10), np.float32),
    "up": rng.standard_normal((10, 18), np.float32),
  }
  ranks = LayerRanks(6, (3, 7, 7, 10))  # two buckets of a narrow layer may have the same rank
  found = weight_spectra.analyze_layer(params, ranks)
  assert (found["dim_in"], found["dim_out"]) == (24, 18)
  assert [entry["active_rank"] for entry in found["buckets"]] == [3, 7, 7, 10]
  for entry, rank in zip(found["buckets"], ranks.active, strict=True):
    kernel = kernel_at(params, rank)
    exact = np.linalg.svd(kernel, compute_uv=False)[:rank]
    np.testing.assert_allclose(entry["singular_values"], exact, rtol=1e-6)
    for name, value in expected_entry(kernel).items():
      assert entry[name] == pytest.approx(value, rel=1e-6)
      assert entry["normalised"][name] == pytest.approx(value / 18, rel=1e-6)


def test_a_model_by_layer_kind_bucket_and_group(analyze):
  params = random_params(PLAN)
  found = analyze(params, PLAN)
  assert list(found["layers"]) == list(dit.layer_shapes(SHAPE))
  assert json.loads(json.dumps(found)) == found

  groups = [(0, 3, [0, 1]), (4, 9, [4 / 6, 2 / 6]), (10, 19, [0.8, 0.2])]
  for group, (first, last, shares) in zip(found["groups"], groups, strict=True):
    assert (group["t_first"], group["t_last"]) == (first, last)
    assert group["bucket_shares"] == pytest.approx(shares)
  assert found["segments"] == [
    {"t_first": 0, "t_last": 5, "bucket": 1},
    {"t_first": 6, "t_last": 17, "bucket": 0},
    {"t_first": 18, "t_last": 19, "bucket": 1},
  ]

  by_kind = {kind: [] for kind in weight_spectra.KINDS}
  for name, (dim_in, dim_out) in dit.layer_shapes(SHAPE).items():
    tree = params
    for key in name.split("/"):
      tree = tree[key]
    ranks = LOW_RANK[name].active if name in LOW_RANK else (None,)
    share = [
      {m: v / min(dim_in, dim_out) for m, v in expected_entry(kernel_at(tree, r)).items()}
      for r in ranks
    ]
    layer = found["layers"][name]
    assert [entry["normalised"] for entry in layer["buckets"]] == [
      pytest.approx(s, rel=1e-6) for s in share
    ]
    share = share if len(share) == 2 else share * 2
    # Timestep by timestep, as the definition has it.
    at_t = [share[1 if t < 6 or t >= 18 else 0] for t in range(20)]
    of_group = [at_t[0:4], at_t[4:10], at_t[10:20]]
    for measure in spectra.MEASURES:
      means = [np.mean([x[measure] for x in group]) for group in of_group]
      assert [g[measure] for g in layer["groups"]] == pytest.approx(means, rel=1e-6)
    by_kind[layer["kind"]].append((share, layer["groups"]))

  assert list(found["kinds"]) == list(weight_spectra.KINDS)
  for kind, layers in by_kind.items():
    assert len(layers) == {"attention": 4, "mlp": 4, "adaln": 3, "other": 4}[kind]
    for field, of_layer in (("buckets", 0), ("groups", 1)):
      for i, mean in enumerate(found["kinds"][kind][field]):
        assert mean == {
          m: pytest.approx(np.mean([layer[of_layer][i][m] for layer in layers]), rel=1e-6)
          for m in spectra.MEASURES
        }


def test_a_dense_model_is_the_same_in_every_group(analyze):
  plan = dense_plan(20)
  found = analyze(random_params(plan), plan)
  for kind in found["kinds"].values():
    (bucket,) = kind["buckets"]
    assert kind["groups"] == [pytest.approx(bucket)] * 3
  assert found["segments"] == [{"t_first": 0, "t_last": 19, "bucket": 0}]


def test_an_interrupted_analysis_goes_on(analyze, monkeypatch):
  params, calls, real = random_params(PLAN), [], weight_spectra.analyze_layer

  def counted(layer_params, ranks):
    if len(calls) == 6 and not allowed:
      raise KeyboardInterrupt
    calls.append(layer_params)
    return real(layer_params, ranks)

  monkeypatch.setattr(weight_spectra, "analyze_layer", counted)
  allowed = False
  with pytest.raises(KeyboardInterrupt):
    analyze(params, PLAN)
  allowed = True
  found = analyze(params, PLAN)
  assert len(calls) == 15  # none twice
  assert analyze(params, PLAN) == found
  assert len(calls) == 15
  assert analyze(params, PLAN, key={"step": 9}) == found
  assert len(calls) == 30
