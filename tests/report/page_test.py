"""The page and its plots: well-formed, complete, loading nothing, and escaped."""

import copy
import html.parser
import re
import xml.etree.ElementTree as ElementTree

import numpy as np

from lrdit.report import page as report_page
from lrdit.report import plots
from lrdit.report.page import format_pair, format_value
from tests.workdirs import SOFTWARE


class Checker(html.parser.HTMLParser):
  """Checks that elements close in order, and collects ids, tags and references."""

  def __init__(self):
    super().__init__()
    self.open, self.ids, self.loads, self.tags = [], [], [], set()

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    self.open.append(tag)
    self._attributes(attrs)

  def handle_startendtag(self, tag, attrs):
    self.tags.add(tag)
    self._attributes(attrs)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def _attributes(self, attrs):
    for name, value in attrs:
      if name == "id":
        self.ids.append(value)
      if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
        self.loads.append(value)
      self.loads += re.findall(r"url\(([^)]*)\)", value or "")


def test_the_page_is_well_formed_and_loads_nothing(page):
  checker = Checker()
  checker.feed(page)
  assert checker.open == []
  ElementTree.fromstring(page.split("\n", 1)[1])
  assert len(checker.ids) == len(set(checker.ids)) > 0
  ids = {f"#{name}" for name in checker.ids}
  assert checker.loads
  for target in checker.loads:
    assert target.startswith("data:image/png;base64,") or target in ids, target
  assert not checker.tags & {"script", "link", "iframe", "object", "embed", "base"}
  assert "@import" not in page
  # Names of XML vocabularies are the only addresses.
  addresses = set(re.findall(r"""https?://[^"'\s<]+""", page))
  assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
  assert page.count("<svg") == 10
  assert page.count("<img") == 6  # a grid and a path of each arm


def test_the_page_opens_with_pictures_and_tables_follow(page):
  order = ("Quality against compute", "Samples", "Rank over timesteps", "The path of one sample")
  order += ("Claim", "Arms", "Comparison")
  places = [page.index(f"<h2>{title}</h2>") for title in order]
  assert places == sorted(places)
  assert page.index("<table>") > places[3]
  assert "<li>t 900<br/>r 3</li>" in page
  assert "<strong>missed by 0.483 %</strong>" in page
  assert "full is better; difference larger than the seeds&#39; spread" in page


def test_how_samples_were_measured_stands_below_the_arms(page):
  arms, measured = page.split("<h2>Arms</h2>")[1].split("<h3>How the samples were measured</h3>")
  measured = measured.split("<h2>")[0]
  for label, value in (("real held-out images", "98.70 %"), ("images compared", "20")):
    assert label not in arms
    assert label in measured
    assert f"<td><div>{value}" in measured


def test_versions_of_evaluations_and_samples(page, workdirs):
  page_rows = re.findall(r'<tr><th scope="row">([^<]*, (?:ev|sa)[^<]*)</th>(.*?)</tr>', page)
  assert len(page_rows) == 2 * len(workdirs)
  cells = "".join(f"<td>{SOFTWARE[f]}</td>" for f in ("lrdit", "jax", "flax", "python", "backend"))
  assert dict(page_rows)[f"{workdirs[0]}, evaluation"] == cells
  sampled = "<td>—</td><td>0.10.2</td><td>—</td><td>—</td><td>cpu</td>"
  assert dict(page_rows)[f"{workdirs[0]}, samples default"] == sampled


def test_text_is_escaped(made):
  evil = '<script>alert("1")</script>&'
  made = copy.deepcopy(made)
  for arm in made.arms:
    arm.name += evil
    for run in arm.runs:
      run.notes, run.workdir, run.commands = [evil], evil, [evil]
  page = report_page.render(made)
  assert "<script" not in page
  assert "&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt;&amp;" in page
  ElementTree.fromstring(page.split("\n", 1)[1])


def test_plots_are_the_same_every_time(made):
  svg = plots.training_curves(made.arms, "train/loss")
  assert svg == plots.training_curves(made.arms, "train/loss")
  assert plots.color_of(0).upper() in svg.upper()
  assert "currentColor" in svg
  assert "#ffffff" not in svg.lower()  # no ground of its own, which a dark page would show


def test_quality_is_plotted_against_any_cost(made):
  by_key = {row.key: row for row in made.rows}
  loss = by_key["held_out_loss_ema"]
  over_macs, over_time = (
    plots.quality_over(made.arms, by_key[key], loss)
    for key in ("mean_forward_macs", "training_seconds")
  )
  for svg, key in ((over_macs, "mean_forward_macs"), (over_time, "training_seconds")):
    assert by_key[key].label in svg
    assert loss.label in svg
    assert all(arm.name in svg for arm in made.arms)
  differing = copy.deepcopy(loss)
  differing.cells[1].summaries[0].differs = "held_out.draws 8, not 4"
  svg = plots.quality_over(made.arms, by_key["mean_forward_macs"], differing)
  assert "static" in svg
  assert "adaptive" not in svg


def test_curves_of_few_points_show_each(made):
  def markers(count):
    arm = copy.deepcopy(made.arms[2])
    arm.runs[0].curves["train/loss"] = ([*range(count)], [1.0 + i for i in range(count)])
    svg = plots.training_curves([arm], "train/loss")
    return svg.count(f"fill: {plots.color_of(0).lower()}")

  assert markers(1) > 0 == markers(40)
  assert markers(3) - markers(1) == 2


def test_long_curves_are_shortened_to_means():
  steps, means = plots.shorten(range(1201), [*range(1200), None])
  assert len(steps) <= plots.MAX_POINTS
  assert (steps[0], means[0]) == (1.0, 1.0)
  assert np.isnan(means[-1]) == np.isnan(means).any()


def test_numbers_for_reading():
  assert format_value(1272324, "count") == "1,272,324"
  assert format_value(306_600, "macs") == "306.6 k"
  assert format_value(0.985, "share") == "98.50 %"
  assert format_value(3725, "seconds") == "1 h 2 min"
  assert format_pair(0.20812, 0.00213, "loss") == "0.2081 ± 0.0021"
  assert format_pair(0.985, 0.002, "share") == "98.50 ± 0.20 %"
  assert format_pair(0.5, 0.01, "loss") == "0.500 ± 0.010"
  assert format_pair(0.5, 0.00999, "loss") == "0.500 ± 0.010"
  assert format_pair(0.1 + 0.2, 0.3 - 0.1 * 3, "loss") == "0.3 ± 0"
