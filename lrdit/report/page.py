"""A report as one HTML page that loads nothing: text escaped, plots and images inline.

Axes: n samples, H W image.
"""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from lrdit.data import images
from lrdit.report import compare, plots

DASH = "—"
VOID = ("meta", "img")
GRID_COLUMNS = 10

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b636e; --line: #d5dae0;
  --page: #ffffff; --band: #f4f6f8; --warn: #9a4b00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #a0a8b3;
  --line: #3a414b; --page: #15181c; --band: #1f242a; --warn: #f0a35a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 74rem; color: var(--ink);
  background: var(--page); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p, ul { margin: .4rem 0; max-width: 46rem; }
ul { padding-left: 1.2rem; }
.soft { color: var(--soft); font-size: .875rem; }
.warn { color: var(--warn); font-size: .875rem; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; margin: .6rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: left; vertical-align: top; white-space: nowrap;
  border-top: 1px solid var(--line); }
thead th { border-top: 0; }
thead th { vertical-align: bottom; white-space: normal; min-width: 7rem; }
tbody th { font-weight: 400; position: sticky; left: 0; background: var(--page);
  white-space: normal; min-width: 8.5rem; max-width: 17rem; }
td .soft, td .warn { display: block; white-space: normal; min-width: 8rem; max-width: 20rem; }
.section th { background: var(--band); font-weight: 600; white-space: normal; max-width: none; }
.section span { display: inline-block; position: sticky; left: .7rem;
  max-width: min(60rem, calc(100vw - 4rem)); }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin-right: .4em; }
.plots { display: grid; gap: 1.2rem; align-items: end;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.grids { display: flex; flex-wrap: wrap; gap: 1.2rem; align-items: end; }
figure { margin: 0; min-width: 0; }
.plots figure { max-width: 36rem; }
.grids figure { width: min(100%, 22rem); }
figcaption { font-size: .875rem; margin-bottom: .3rem; }
svg { width: 100%; height: auto; display: block; color: var(--ink); }
svg text { font-family: system-ui, sans-serif !important; }
.grids img { width: 100%; height: auto; display: block; image-rendering: pixelated;
  background: #fff; }
pre { overflow-x: auto; background: var(--band); border-radius: 6px; padding: .7rem .9rem;
  margin: .4rem 0; font-size: .8rem; line-height: 1.45; }
"""


class Html(str):
  """Text that is markup already."""


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
  """An element; children that are no `Html` are escaped, and so are attributes.

  Args:
    name: of the element.
    *children: text or elements; None is left out, other values become text.
    **attributes: a trailing underscore is dropped ("class_"); None is left out.
  """
  written = "".join(
    f' {key.rstrip("_")}="{html.escape(str(value))}"'
    for key, value in attributes.items()
    if value is not None
  )
  inner = join(children)
  return Html(f"<{name}{written}/>" if name in VOID else f"<{name}{written}>{inner}</{name}>")


def join(children: Iterable[Any]) -> Html:
  """Elements and escaped text one after another; None is left out."""
  kept = (child for child in children if child is not None)
  return Html("".join(c if isinstance(c, Html) else html.escape(str(c)) for c in kept))


def format_value(value: float, form: str) -> str:
  """A number for reading; report.json has it in full.

  Args:
    value: the number.
    form: "count", "macs", "rate", "seconds", "loss", "ratio" or "share".
  """
  if form == "count":
    return f"{value:,.0f}"
  if form == "macs":
    return _with_prefix(value)
  if form == "share":
    return f"{100 * value:.2f} %"
  if form == "seconds":
    return _duration(value)
  return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.4g}"


def _with_prefix(value: float) -> str:
  for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if abs(value) >= factor:
      return f"{value / factor:.4g} {prefix}"
  return f"{value:.4g}"


def _plural(count: int, noun: str) -> str:
  return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _duration(seconds: float) -> str:
  if seconds < 60:
    return f"{seconds:.3g} s"
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f"{minutes} min {rest} s"
  return f"{minutes // 60} h {minutes % 60} min"


def _format_pair(mean: float, std: float, form: str) -> str:
  """A mean and its spread, with as many decimals as two digits of the spread need."""
  if form == "seconds":
    return f"{_duration(mean)} ± {_duration(std)}"
  factor, unit = (100.0, " %") if form == "share" else (1.0, "")
  mean, std = factor * mean, factor * std
  if std <= compare.ROUNDING * abs(mean):
    return f"{format_value(mean / factor, form)} ± 0"
  if min(abs(mean) or 1, std) < 1e-4:
    return f"{mean:.4g} ± {std:.2g}{unit}"
  exponent = int(f"{std:.1e}".partition("e")[2])  # of the std as it is shown
  decimals = max(0, 1 - exponent)
  return f"{mean:,.{decimals}f} ± {std:,.{decimals}f}{unit}"


def _counted(group: dict[str, Any]) -> str:
  """Of how many values a mean is."""
  n, runs = group["n"], group["num_runs"]
  seeds = _plural(runs, "seed")
  return seeds if n == runs else f"{seeds}, n = {n} exports"


def _cell(cell: dict[str, Any], form: str) -> Html:
  """One quantity of one arm."""
  if "exact" in cell:
    if form == "buckets":
      return tag("td", *(_bucket_line(k, bucket) for k, bucket in enumerate(cell["exact"])))
    return tag("td", format_value(cell["exact"], form))
  if not cell["groups"]:
    return tag("td", DASH, title="missing")
  parts: list[Html] = []
  for group in cell["groups"]:
    if group["std"] is None:
      text = format_value(group["mean"], form)
    else:
      text = _format_pair(group["mean"], group["std"], form)
    parts += [tag("div", text), tag("span", _counted(group), class_="soft")]
    if group["differs"]:
      parts.append(tag("span", f"⚠ not comparable: {group['differs']}", class_="warn"))
  return tag("td", *parts)


def _bucket_line(number: int, bucket: dict[str, Any]) -> Html:
  macs = format_value(bucket["forward_macs"], "macs")
  parameters = format_value(bucket["parameters"], "macs")
  told = f"{parameters} parameters, {bucket['timesteps']:,} timesteps"
  return tag("div", f"{number}: {macs}, ", tag("small", told))


def _settings_text(settings: dict[str, Any]) -> str:
  """How samples were drawn, in words where the field is known."""
  known = dict(settings)
  words = [str(known.pop("solver", "")), f"{known.pop('num_steps', '?')} steps"]
  words += [f"guidance {known.pop('guidance_scale', '?')}", f"{known.pop('weights', '?')} weights"]
  words += [f"{known.pop('num_samples', '?')} images", f"{known.pop('dtype', '?')}"]
  words += [f"{field} {value}" for field, value in known.items() if value is not None]
  return ", ".join(filter(None, words))


def _section_row(row: dict[str, Any], columns: int) -> Html:
  text = row["section"]
  if row.get("settings") is not None:
    text += f": {_settings_text(row['settings'])}"
  return tag("tr", tag("th", tag("span", text), colspan=columns), class_="section")


def _swatch(number: int) -> Html:
  return tag("span", class_="swatch", style=f"background:{plots.colour_of(number)}")


def _with_sections(rows: Sequence[dict[str, Any]], lines: Iterable[Html], columns: int) -> Html:
  """Table rows, with a heading wherever the section or the settings change."""
  parts, before = [], None
  for row, line in zip(rows, lines, strict=True):
    here = (row["section"], row.get("settings"))
    if here != before:
      parts.append(_section_row(row, columns))
    parts, before = [*parts, line], here
  return join(parts)


def arms_table(report: dict[str, Any]) -> Html:
  """Quantities by rows, arms by columns."""
  arms = report["arms"]
  rows = [row for row in report["rows"] if not compare.is_shared(row)]
  head = [tag("th", "")] + [
    tag("th", _swatch(i), arm["name"], scope="col") for i, arm in enumerate(arms)
  ]
  lines = (
    tag(
      "tr",
      tag("th", row["label"], scope="row"),
      *(_cell(cell, row["format"]) for cell in row["cells"]),
    )
    for row in rows
  )
  body = _with_sections(rows, lines, len(arms) + 1)
  table = tag("table", tag("thead", tag("tr", *head)), tag("tbody", body))
  return join([tag("div", table, class_="wide", tabindex=0), _shared_figures(report)])


def _shared_figures(report: dict[str, Any]) -> Html:
  """What samples were measured with: once, unless the arms differ."""
  rows = [row for row in report["rows"] if compare.is_shared(row)]
  parts = []
  drawn = compare.unique(row["settings"] for row in rows)
  for settings in drawn:
    told = "; ".join(_shared_text(report, row) for row in rows if row["settings"] == settings)
    which = f" ({_settings_text(settings)})" if len(drawn) > 1 else ""
    parts.append(tag("p", f"Samples{which}: {told}.", class_="soft"))
  return join(parts)


def _shared_text(report: dict[str, Any], row: dict[str, Any]) -> str:
  of_arms = []
  for arm, cell in zip(report["arms"], row["cells"], strict=True):
    values = [value["value"] for group in cell["groups"] for value in group["values"]]
    texts = dict.fromkeys(format_value(value, row["format"]) for value in values)
    if texts:
      of_arms.append((" and ".join(texts), arm["name"]))
  texts = dict.fromkeys(text for text, _ in of_arms)
  if len(texts) == 1:
    return f"{row['label']} {next(iter(texts))}"
  told = ", ".join(f"{text} of {name}" for text, name in of_arms)
  return f"{row['label']} {told or DASH}"


def claim_section(report: dict[str, Any]) -> Html:
  """Whether each adaptive arm keeps what is claimed of it."""
  parts = []
  for claim in report["claim"]:
    name = "adaptive" if claim["arm"] is None else report["arms"][claim["arm"]]["name"]
    if len(report["claim"]) > 1:
      parts.append(tag("h3", _swatch(claim["arm"]), name))
    settings = [check["settings"] for check in claim["checks"] if check["settings"]]
    several = len(compare.unique(settings)) > 1
    heads = ("", "", "difference", "target", "ratio of MACs")
    head = tag("thead", tag("tr", *(tag("th", text) for text in heads)))
    lines = (_claim_row(check, several) for check in claim["checks"])
    table = tag("table", head, tag("tbody", *lines))
    parts.append(tag("div", table, class_="wide", tabindex=0))
    for method, also in claim["also"].items():
      if also:
        text = f"⚠ {name} differs from {method} also in {', '.join(also)}."
        parts.append(tag("p", text, class_="warn"))
  return join(parts)


def _claim_row(check: dict[str, Any], tell_settings: bool) -> Html:
  head = f"{check['label']}, against {check['against']}"
  if tell_settings and check["settings"]:
    head += f" ({_settings_text(check['settings'])})"
  if "value" in check:
    verdict = check["verdict"]
    verdict = verdict if verdict.startswith("one seed") else f"difference {verdict}"
    words = tag("span", f"{check['better']} is better; {verdict}", class_="soft")
    error = check["standard_error"]
    text = f"{check['value']:+.2f}" + (f" ± {error:.2f}" if error is not None else "")
    value = f"{text} {check['unit']}"
  else:
    words, value = tag("span", check["reason"], class_="soft"), DASH
  macs = DASH if check["macs_ratio"] is None else f"{check['macs_ratio']:.4f}"
  outcome = tag("td", tag("strong", check["outcome"]), words)
  return tag(
    "tr",
    tag("th", head, scope="row"),
    outcome,
    tag("td", value),
    tag("td", check["target"]),
    tag("td", macs),
  )


def _compared(cell: dict[str, Any], how: str) -> Html:
  """A ratio or a difference, its standard error and what it is worth."""
  if "missing" in cell:
    return tag("td", DASH, tag("span", cell["missing"], class_="soft"))
  value, error = cell["value"], cell["standard_error"]
  unit = " points" if how == "points" else ""
  sign = "+" if how == "points" else ""
  text = f"{value:{sign}.2f}" if how == "points" else f"{value:.4f}"
  if error is not None:
    text += f" ± {error:.2f}" if how == "points" else f" ± {error:.4f}"
  verdict = None if cell["verdict"] == "exact" else tag("span", cell["verdict"], class_="soft")
  return tag("td", text + unit, verdict)


def comparison_tables(report: dict[str, Any]) -> Html:
  """A table of ratios and differences for each baseline arm."""
  arms, found = report["arms"], report["comparisons"]
  if not found:
    return tag("p", f"{DASH} There is no other arm beside a full or static one to compare.")
  parts = []
  for baseline in dict.fromkeys(comparison["baseline"] for comparison in found):
    against = [c for c in found if c["baseline"] == baseline]
    heads = [tag("th", "")] + [
      tag("th", _swatch(c["arm"]), arms[c["arm"]]["name"], scope="col") for c in against
    ]
    rows = against[0]["rows"]
    lines = (
      tag(
        "tr",
        tag("th", row["label"], DIFFERENCE[row["compare"]], scope="row"),
        *(_compared(c["rows"][i], row["compare"]) for c in against),
      )
      for i, row in enumerate(rows)
    )
    body = _with_sections(rows, lines, len(against) + 1)
    table = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", body))
    parts.append(tag("h3", "Against ", _swatch(baseline), arms[baseline]["name"]))
    parts.append(tag("div", table, class_="wide", tabindex=0))
    for c in against:
      if c["also"]:
        text = f"⚠ {arms[c['arm']]['name']} differs from it also in {', '.join(c['also'])}."
        parts.append(tag("p", text, class_="warn"))
  return join(parts)


DIFFERENCE = {"ratio": ": ratio", "points": ": difference"}


def _plot(svg: str | None, caption: str, warning: str = "") -> Html:
  body = Html(svg) if svg else tag("p", f"{DASH} no workdir holds it", class_="soft")
  told = tag("div", warning, class_="warn") if warning else None
  return tag("figure", tag("figcaption", caption, told), body)


def _left_out(arms: Sequence[dict[str, Any]]) -> str:
  """Which runs the plot of held-out losses does not show, and why."""
  told = [
    f"{count} of {_plural(len(arm['runs']), 'run')} of {arm['name']} ({differs})"
    for arm in arms
    for differs, count in arm["loss_by_timestep"]["left_out"].items()
  ]
  return f"⚠ Left out, as measured otherwise: {', '.join(told)}" if told else ""


def plots_section(report: dict[str, Any]) -> Html:
  """r(t), losses by timestep and training curves."""
  arms = report["arms"]
  layer = report["layer"]
  return join(
    [
      tag("h2", "Rank over timesteps"),
      tag(
        "div",
        _plot(plots.rank_over_t(arms, layer), f"Layer {layer}; a dense arm has its largest rank"),
        _plot(plots.ratio_over_t(arms), "All factorised layers together; a dense arm has 1"),
        class_="plots",
      ),
      tag("h2", "Loss by timestep"),
      tag(
        "div",
        _plot(plots.loss_over_t(arms, "held_out"), "Held-out split, EMA weights", _left_out(arms)),
        _plot(
          plots.loss_over_t(arms, "training"), "Training, last tenth of each run's logged windows"
        ),
        class_="plots",
      ),
      tag("p", "Bars: one standard deviation over the seeds.", class_="soft"),
      tag("h2", "Training curves"),
      tag(
        "div",
        _plot(plots.training_curves(arms, "train/loss"), "Training loss"),
        _plot(plots.training_curves(arms, "eval/loss"), "Held-out loss, EMA weights"),
        class_="plots",
      ),
    ]
  )


def _data_url(pixels: np.ndarray) -> str:
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, format="PNG")
  return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def samples_section(report: dict[str, Any]) -> Html:
  """The same indices of each arm side by side."""
  grids = report["grids"]
  if not grids:
    return tag("p", f"{DASH} No workdir holds an export of samples.")
  first = grids[0]
  labels = first["labels"]
  text = f"Samples 0 to {len(first['images']) - 1} of each, row by row. "
  if labels is not None:
    text += f"Labels: {', '.join(map(str, labels[:GRID_COLUMNS]))}"
    text += ", …" if len(labels) > GRID_COLUMNS else "."
  figures = [_grid_figure(report, grid) for grid in grids]
  shown = {grid["arm"] for grid in grids}
  missing = [arm["name"] for i, arm in enumerate(report["arms"]) if i not in shown]
  note = tag("p", f"{DASH} No samples of {', '.join(missing)}.") if missing else None
  return join([tag("p", text), tag("div", *figures, class_="grids"), note])


def _grid_figure(report: dict[str, Any], grid: dict[str, Any]) -> Html:
  name = report["arms"][grid["arm"]]["name"]
  settings = dict(grid["settings"])
  drawn = f"seed {settings.pop('seed', '?')}, step {settings.pop('checkpoint_step', '?')}"
  pixels = images.make_grid(grid["images"], GRID_COLUMNS)
  warning = f"⚠ drawn otherwise than the first: {grid['differs']}" if grid["differs"] else None
  caption = tag(
    "figcaption",
    _swatch(grid["arm"]),
    name,
    tag("div", f"{drawn}, {grid['workdir']}", class_="soft"),
    tag("div", warning, class_="warn") if warning else None,
  )
  height, width = pixels.shape[:2]
  source, text = _data_url(pixels), f"Grid of samples of {name}"
  return tag("figure", caption, tag("img", src=source, alt=text, width=width, height=height))


def notes_section(report: dict[str, Any]) -> Html:
  """What is missing or unfinished, by workdir."""
  items = [
    tag("li", tag("code", run["workdir"]), f": {note}")
    for arm in report["arms"]
    for run in arm["runs"]
    for note in run["notes"]
  ]
  return tag("ul", *items) if items else tag("p", "Nothing is missing.")


def _versions_text(versions: dict[str, Any]) -> str:
  return ", ".join(f"{name} {value or DASH}" for name, value in versions.items())


def commands_section(report: dict[str, Any]) -> Html:
  """What made each workdir, and this page."""
  parts = []
  for i, arm in enumerate(report["arms"]):
    parts.append(tag("h3", _swatch(i), arm["name"]))
    for run in arm["runs"]:
      commands = "\n".join(run["commands"])
      fallback = f"{DASH} no file of configs/ has the fields of its config.json"
      parts.append(tag("p", tag("code", run["workdir"]), f", seed {run['seed']}"))
      parts.append(tag("pre", commands, tabindex=0) if commands else tag("p", fallback))
  made = report["made"]
  parts += [tag("h3", "Versions"), _versions_table(report)]
  parts += [tag("h3", "This page"), tag("pre", made["command"], tabindex=0)]
  parts.append(tag("p", f"{made['time']}; {_versions_text(made['versions'])}", class_="soft"))
  return join(parts)


def _versions_table(report: dict[str, Any]) -> Html:
  """With what each workdir was evaluated and each of its exports drawn."""
  fields = ("lrdit", "jax", "flax", "python", "backend")
  lines = []
  for run in (run for arm in report["arms"] for run in arm["runs"]):
    software = (run["evaluation"] or {}).get("software")
    told = {"evaluation": software if isinstance(software, dict) else {}}
    told |= {f"export {name}": drawn["metadata"] for name, drawn in run["exports"].items()}
    for name, recorded in told.items():
      cells = (tag("td", recorded.get(field) or DASH) for field in fields)
      lines.append(tag("tr", tag("th", f"{run['workdir']}, {name}", scope="row"), *cells))
  head = tag("thead", tag("tr", *(tag("th", text) for text in ("", *fields))))
  return tag("div", tag("table", head, tag("tbody", *lines)), class_="wide", tabindex=0)


HOW_TO_READ = """Figures are means over the runs of an arm that differ in nothing but their seed,
± one standard deviation (n - 1); one run shows no spread. In the comparison ± is the standard
error of the ratio or difference, and the seeds' spread is the larger of both arms' standard
deviations. MACs (2 FLOPs each) are per image, of a forward pass or of all solver steps. Training
time counts the steps alone, without compilation, evaluation and checkpoints, on whatever machine
each run had. Images/s of samples are of all that were drawn, also of those that an interruption or
a cut left out. A figure that was measured otherwise than the first of its row is marked ⚠ and
compared with nothing."""


def render(report: dict[str, Any]) -> str:
  """The page of what `report.make_report` collected; well-formed as XML too."""
  arms = report["arms"]
  count = sum(len(arm["runs"]) for arm in arms)
  title = f"lrdit: {', '.join(arm['name'] for arm in arms)}"
  head = tag(
    "head",
    tag("meta", charset="utf-8"),
    tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
    tag("title", title),
    tag("style", Html(STYLE)),
  )
  counted = f"{_plural(len(arms), 'arm')}, {_plural(count, 'run')}. {report['made']['time']}."
  body = tag(
    "body",
    tag("h1", "Comparison of arms"),
    tag("p", counted, class_="soft"),
    tag("h2", "Claim"),
    claim_section(report),
    tag("h2", "Arms"),
    arms_table(report),
    tag("p", HOW_TO_READ, class_="soft"),
    tag("h2", "Comparison"),
    comparison_tables(report),
    tag("h2", "Missing or unfinished"),
    notes_section(report),
    plots_section(report),
    tag("h2", "Samples"),
    samples_section(report),
    tag("h2", "Commands and versions"),
    commands_section(report),
  )
  return "<!DOCTYPE html>\n" + tag("html", head, body, lang="en") + "\n"
