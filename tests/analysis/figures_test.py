"""What each figure of an analysis shows, read from its artists."""

import copy
import io
import itertools

import numpy as np
import PIL.Image
import pytest

from lrdit.analysis import (
  figures,
  gradient_figures,
  plot_style,
  spectra,
  weight_figures,
  weight_spectra,
)
from lrdit.analysis.unit_cache import UnitCache
from lrdit.model import dit
from lrdit.rank.plan import LayerRanks, RankPlan, dense_plan

pytestmark = pytest.mark.floats

TITLE = "digits adaptive DiT-T/2, step 8"
BOUNDARIES = [0, 44, 371, 1000]
GROUPS = [{"t_first": a, "t_last": b - 1} for a, b in itertools.pairwise(BOUNDARIES)]
SHAPE = dit.DiTShape(
  image_size=4, channels=1, num_classes=0, hidden_size=8, depth=2, num_heads=2, patch_size=2
)
RANKS = {f"blocks_{i}/attn/qkv": LayerRanks(4, (2, 6)) for i in range(2)}


def texts(figure):
  """All that is written in a figure."""
  import matplotlib.text

  return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text()]


def legend(figure):
  return [text.get_text() for text in figure.legends[0].get_texts()]


def panel(figure, title):
  (found,) = [axes for axes in figure.axes if axes.get_title() == title]
  return found


def size_of(png):
  return PIL.Image.open(io.BytesIO(png)).size


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  def analyze(plan):
    rng, params = np.random.default_rng(0), {}
    for name, (dim_in, dim_out) in dit.layer_shapes(SHAPE).items():
      layer = params
      for key in name.split("/"):
        layer = layer.setdefault(key, {})
      layer["kernel"] = rng.standard_normal((dim_in, dim_out))
      if name in plan.by_name:
        layer["down"], layer["up"] = layer["kernel"][:, :6], rng.standard_normal((6, dim_out))
    cache = UnitCache(tmp_path_factory.mktemp("cache") / "weights", {})
    return weight_spectra.analyze_weights(params, plan, SHAPE, BOUNDARIES, cache)

  low_rank = RankPlan(1000, ((0, 1), (500, 0)), tuple(RANKS.items()))
  return {"dense": analyze(dense_plan(1000)), "low_rank": analyze(low_rank)}


@pytest.fixture
def gradients():
  def entry(value):
    return {measure: value + 0.01 * i for i, measure in enumerate(spectra.MEASURES)}

  def condition(base):
    return {
      "layers": {
        f"blocks_0/{name}": {
          "kind": kind,
          "dim_in": 8,
          "dim_out": dim_out,
          "measures": [
            [{"normalised": entry(base + 0.1 * g + 0.02 * b)} for b in range(2)] for g in range(3)
          ],
        }
        for name, kind, dim_out in (
          ("attn/qkv", "attention", 24),
          ("attn/proj", "attention", 8),
          ("mlp/fc1", "mlp", 32),
        )
      },
      "kinds": {
        kind: [[entry(base + 0.1 * g + 0.02 * b) for b in range(2)] for g in range(3)]
        for kind in ("attention", "mlp")
      },
    }

  def overlap(base):
    values = (np.eye(3) * (0.9 - base) + base).tolist()
    tables = {"cross_half": {"left": values, "right": values}}
    return {
      "kinds": {kind: tables | RANDOM | {"left": [[1.0]]} for kind in ("attention", "mlp")},
    }

  return {
    "groups": GROUPS,
    "batch_sizes": [16, 64],
    "subspace_rank": 2,
    "conditions": {"data": condition(0.1), "shuffled": condition(0.3), "noise": condition(0.2)},
    "overlap": {"data": overlap(0.2), "shuffled": overlap(0.7), "noise": overlap(0.4)},
  }


RANDOM = {"random_left": 0.25, "random_right": 0.167}
TRUNCATION = {
  "boundaries": BOUNDARIES,
  "ranks": [2, 4, 8],
  "baseline": [0.1, 0.2, 0.3],
  "rise": [[0.5, 0.3, 0.1], [0.05, 0.02, 0.004], [0.0, -1e-5, 1e-3]],
}


def test_spectra_of_a_dense_model_by_kind_and_depth(weights):
  figure = weight_figures.spectra(weights["dense"], TITLE)
  assert f"Singular spectra of the weights: {TITLE}" in texts(figure)
  assert [a.get_title() for a in figure.axes] == ["attention", "MLP", "adaLN", "other layers"]
  assert legend(figure) == ["block 0", "block 1", "outside the blocks"]
  attention = panel(figure, "attention")
  assert attention.get_yscale() == "log" and len(attention.lines) == 4
  assert attention.get_xlabel() == "index / min(D_in, D_out)"
  sigma = weights["dense"]["layers"]["blocks_0/attn/qkv"]["buckets"][0]["singular_values"]
  np.testing.assert_allclose(attention.lines[0].get_xdata(), np.arange(1, 9) / 8)
  np.testing.assert_allclose(attention.lines[0].get_ydata(), np.array(sigma) / sigma[0])


def test_spectra_of_a_low_rank_model_by_bucket(weights):
  figure = weight_figures.spectra(weights["low_rank"], TITLE)
  assert legend(figure) == ["bucket 0: t 500-999", "bucket 1: t 0-499", "dense layers"]
  ends = {line.get_xdata()[-1] for line in panel(figure, "attention").lines}
  assert ends == {2 / 8, 6 / 8, 1.0}
  assert {line.get_color() for line in panel(figure, "MLP").lines} == {"#808080"}


def test_a_model_of_zeros_has_a_plot(weights):
  zeros = copy.deepcopy(weights["dense"])
  for layer in zeros["layers"].values():
    layer["buckets"][0]["singular_values"] = [0.0] * 8
  assert size_of(plot_style.png(weight_figures.spectra(zeros, TITLE)))


def test_ranks_of_weights_by_depth(weights):
  figure = weight_figures.ranks(weights["low_rank"], TITLE)
  assert {f"{name}\n/ min(D_in, D_out)" for name in plot_style.MEASURE_TITLES.values()} <= set(
    texts(figure)
  )
  assert legend(figure) == ["attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2", "adaln"]
  assert "patch_embed" in texts(figure)
  attention = panel(figure, "attention")
  qkv, proj = attention.lines[:2]
  np.testing.assert_array_equal(qkv.get_xdata(), [0, 1])
  # Half of the timesteps have each bucket.
  low, high = (
    entry["normalised"]["stable_rank"]
    for entry in weights["low_rank"]["layers"]["blocks_0/attn/qkv"]["buckets"]
  )
  assert qkv.get_ydata()[0] == pytest.approx((low + high) / 2)
  assert len(attention.collections) == 1  # qkv's band; the others are dense
  (dense,) = weights["low_rank"]["layers"]["blocks_0/attn/proj"]["buckets"]
  assert proj.get_ydata()[0] == pytest.approx(dense["normalised"]["stable_rank"])


def test_a_mean_that_differs_by_rounding_draws_no_band(weights):
  """A dense layer has one rank: its mean over the groups is that rank, on every machine."""
  nudged = copy.deepcopy(weights["dense"])
  for layer in nudged["layers"].values():
    for measure in spectra.MEASURES:
      value = layer["buckets"][0]["normalised"][measure]
      layer["groups"][-1][measure] = np.nextafter(value, 0)
      layer["groups"][0][measure] = np.nextafter(value, 0)
  figure = weight_figures.ranks(nudged, TITLE)
  assert [len(panel(figure, title).collections) for title in ("attention", "MLP", "adaLN")] == [
    0
  ] * 3


def test_other_layers_have_their_own_axis(gradients):
  """Their ranks are far larger, as some of them are a few values wide."""
  for condition in gradients["conditions"].values():
    measured = condition["kinds"]["mlp"]
    condition["kinds"]["other"] = [[{k: 9 * v for k, v in b.items()} for b in g] for g in measured]
  figure = gradient_figures.ranks(gradients, TITLE)
  first, other = panel(figure, "attention"), panel(figure, "other layers")
  assert not first.get_shared_y_axes().joined(first, other)
  assert first.get_ylim()[1] < 1 < other.get_ylim()[1]
  assert other.get_ylim()[0] == 0


def test_ranks_of_active_weights_by_timestep_group(weights):
  assert weight_figures.groups(weights["dense"], TITLE) is None
  figure = weight_figures.groups(weights["low_rank"], TITLE)
  assert legend(figure) == ["attention", "MLP", "adaLN", "other layers"]
  first = panel(figure, "entropy rank").patches[0].get_data()
  np.testing.assert_array_equal(first.edges, BOUNDARIES)
  groups = weights["low_rank"]["kinds"]["attention"]["groups"]
  np.testing.assert_array_equal(first.values, [group["entropy_rank"] for group in groups])
  assert first.values[0] > first.values[2]


def test_ranks_of_every_layer_s_gradient(gradients):
  figure = gradient_figures.layers(gradients, TITLE)
  assert f"Entropy rank of the gradients, batch size 64: {TITLE}" in texts(figure)
  maps = [axes.images[0].get_array() for axes in figure.axes if axes.images]
  for values, base in zip(maps, (0.1, 0.3, 0.2), strict=True):
    np.testing.assert_allclose(values, 3 * [base + 0.03 + 0.1 * np.arange(3)])
  labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
  assert labels == ["blocks_0/attn/qkv", "blocks_0/attn/proj", "blocks_0/mlp/fc1"]
  assert figure.axes[0].yaxis_inverted()


def test_ranks_of_gradients_by_timestep_beside_the_nulls(gradients):
  figure = gradient_figures.ranks(gradients, TITLE)
  assert f"Ranks of the gradients by timestep group: {TITLE}" in texts(figure)
  assert legend(figure) == [
    "data, batch size 16",
    "data, batch size 64",
    "null: timesteps shuffled, batch size 64",
    "null: noise-only targets, batch size 64",
  ]
  first = panel(figure, "attention")
  assert len(figure.axes) == 2 * len(spectra.MEASURES)
  steps = [patch.get_data() for patch in first.patches]
  assert len(steps) == 4  # both batch sizes of the data, the larger one of the nulls
  np.testing.assert_array_equal(steps[0].edges, BOUNDARIES)
  np.testing.assert_allclose(steps[0].values, [0.1, 0.2, 0.3])
  np.testing.assert_allclose(steps[2].values, [0.32, 0.42, 0.52])
  np.testing.assert_allclose(first.lines[0].get_xdata(), [22, 207.5, 685.5])
  styles = [patch.get_linestyle() for patch in first.patches]
  assert styles[0] == styles[1] == "-" and len({str(style) for style in styles}) == 3
  assert first.patches[1].get_edgecolor() == first.patches[2].get_edgecolor()
  assert first.get_ylim()[0] == 0 and first.get_ylim()[1] > 0.52  # nothing is cut off
  assert first.get_shared_y_axes().joined(first, panel(figure, "MLP"))
  assert figure.axes[-1].get_xlabel() == "timestep t"


@pytest.mark.parametrize(("side", "expected"), [("left", "0.250"), ("right", "0.167")])
def test_overlap_of_gradients_beside_the_nulls(gradients, side, expected):
  figure = gradient_figures.overlap(gradients, side, TITLE)
  assert any(f"(random subspaces: {expected})" in text for text in texts(figure))
  assert f"({'D_in' if side == 'left' else 'D_out'})" in figure.get_suptitle()
  maps = [axes.images[0] for axes in figure.axes if axes.images]
  assert len(maps) == 6
  for image, base in zip(maps, [0.2, 0.7, 0.4] * 2, strict=True):
    np.testing.assert_allclose(image.get_array()[0], [0.9, base, base])
    assert image.get_clim() == (0, 0.9)
  assert "mean cos² of the principal angles" in texts(figure)
  assert [t.get_text() for t in figure.axes[-2].get_xticklabels()] == ["0", "44", "371"]


def test_heat_map_of_rank_truncation():
  figure = figures.truncation(TRUNCATION, TITLE, ("r(t)", [8] * 500 + [3] * 500))
  heat = figure.axes[0]
  assert f"Rank truncation: {TITLE}" in texts(figure) and legend(figure) == ["r(t)"]
  assert heat.get_ylabel() == "rank k that the factorized layers are cut to"
  assert [t.get_text() for t in heat.get_yticklabels()] == ["2", "4", "8"]
  mesh, contours = heat.collections[:2]
  corners = mesh.get_coordinates()
  np.testing.assert_array_equal(corners[0, :, 0], BOUNDARIES)
  np.testing.assert_allclose(corners[:, 0, 1], 2 ** np.array([0.5, 1.5, 2.5, 3.5]))
  assert mesh.norm(0.5) == pytest.approx(1) and (mesh.get_array()[2, :2] < mesh.norm.vmin).all()
  colors = mesh.get_cmap()(mesh.norm(mesh.get_array()))
  gray = mesh.get_cmap().get_under()
  assert (colors[2, :2] == gray).all() and not (colors[:2] == gray).all(-1).any()
  # The line at 0.1 crosses the first group's column between the ranks 2 and 4, evenly in the log.
  levels = [0.003, 0.01, 0.03, 0.1, 0.3]
  np.testing.assert_allclose(contours.levels, np.log10(levels))
  path = contours.get_paths()[levels.index(0.1)]
  at = path.vertices[np.abs(path.vertices[:, 0] - 22) < 1e-6][0, 1]
  assert at == pytest.approx(2 + 2 * np.log(0.5 / 0.1) / np.log(0.5 / 0.05))
  step = heat.lines[0]
  np.testing.assert_array_equal(step.get_ydata()[[0, -1]], [8, 3])


@pytest.mark.parametrize("rise", [0.0, -1e-3, 1e-8])
def test_rounding_is_no_rise(rise):
  assert figures.truncation(TRUNCATION | {"rise": [[rise] * 3] * 3}, TITLE) is None


def test_losses_by_group():
  by_name = {"held-out": [0.1, None, 0.3], "training": [0.2, 0.3, 0.4], "none": [None] * 3}
  figure = figures.losses(BOUNDARIES, by_name, TITLE)
  (axes,) = figure.axes
  assert axes.get_xlabel().startswith("timestep t") and axes.get_ylabel() == "mean loss (per value)"
  assert legend(figure) == ["held-out", "training"]
  np.testing.assert_array_equal(axes.patches[0].get_data().values, [0.1, np.nan, 0.3])


def test_what_is_missing_is_left_out(gradients):
  """Timestep groups without a measurement, and subspaces of a gradient of zero."""
  for overlap in gradients["overlap"].values():
    overlap["kinds"]["mlp"]["cross_half"]["left"][0] = [None] * 3
  missing = TRUNCATION | {"rise": [[0.5, None, 0.1], [0.05, None, 0.004], [0.0, None, 1e-3]]}
  made = [
    gradient_figures.overlap(gradients, "left", TITLE),
    figures.truncation(missing, TITLE),
    figures.truncation(TRUNCATION | {"ranks": [2], "rise": [[0.5, 0.1, None]]}, TITLE),
  ]
  assert all(size_of(plot_style.png(figure)) for figure in made)


def test_nothing_to_draw_is_no_figure(tmp_path):
  assert figures.truncation(TRUNCATION | {"rise": [[None] * 3] * 3}, TITLE) is None
  assert figures.losses(BOUNDARIES, {"held-out": [None] * 3}, TITLE) is None
  plot_style.write_png(tmp_path / "none.png", None)
  assert list(tmp_path.iterdir()) == []


def test_a_file_is_written_whole_and_always_the_same(tmp_path, monkeypatch):
  path = tmp_path / "losses.png"
  made = [figures.losses(BOUNDARIES, {"held-out": [0.1, 0.2, 0.3]}, TITLE) for _ in range(2)]
  plot_style.write_png(path, made[0])
  first = path.read_bytes()
  assert size_of(first) == (1140, 600) and first == plot_style.png(made[1])

  def fail(figure):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(plot_style, "png", fail)
  with pytest.raises(OSError, match="No space left"):
    plot_style.write_png(path, made[1])
  assert [p.name for p in tmp_path.iterdir()] == ["losses.png"] and path.read_bytes() == first
