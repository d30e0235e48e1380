"""A report as one self-contained HTML page, rendered from page.html.j2."""

import itertools
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from lrdit.report import plots
from lrdit.report.compare import ROUNDING, Difference, Row, Summary
from lrdit.report.contents import Report
from lrdit.report.pictures import GRID_COLUMNS
from lrdit.report.rows import is_shared

DASH = "—"
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def format_value(value: float, form: str) -> str:
  """Format a number for readers; report.json has full precision.

  `form` is "count", "macs", "rate", "seconds", "loss", "ratio" or "share".
  """
  if form == "count":
    return f"{value:,.0f}"
  if form == "macs":
    factor, prefix = next(((f, f" {p}") for f, p in PREFIXES if abs(value) >= f), (1, ""))
    return f"{value / factor:.4g}{prefix}"
  if form == "share":
    return f"{100 * value:.2f} %"
  if form == "seconds":
    return _duration(value)
  return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.4g}"


def _duration(seconds: float) -> str:
  if seconds < 60:
    return f"{seconds:.3g} s"
  minutes, rest = divmod(round(seconds), 60)
  return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def format_pair(mean: float, std: float | None, form: str) -> str:
  """Format a mean and its spread, with the decimals of the spread's two leading digits."""
  if std is None:
    return format_value(mean, form)
  if form == "seconds":
    return f"{_duration(mean)} ± {_duration(std)}"
  if std <= ROUNDING * abs(mean):
    return f"{format_value(mean, form)} ± 0"
  factor, unit = (100.0, " %") if form == "share" else (1.0, "")
  mean, std = factor * mean, factor * std
  if min(abs(mean) or 1, std) < 1e-4:
    return f"{mean:.4g} ± {std:.2g}{unit}"
  exponent = int(f"{std:.1e}".partition("e")[2])  # of the rounded std
  decimals = max(0, 1 - exponent)
  return f"{mean:,.{decimals}f} ± {std:,.{decimals}f}{unit}"


def _with_error(value: float, error: float | None, form: str) -> str:
  return f"{value:{form}}" + ("" if error is None else f" ± {error:{form.lstrip('+')}}")


def format_difference(difference: Difference) -> str:
  """Format a ratio or a difference in points with its standard error."""
  form, unit = ("+.2f", " points") if difference.compare == "points" else (".4f", "")
  return _with_error(difference.value, difference.standard_error, form) + unit


def plural(count: int, noun: str) -> str:
  """Return "1 run" or "2 runs"."""
  return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def count_values(summary: Summary) -> str:
  """Format the number of values behind a mean."""
  seeds = plural(summary.num_runs, "seed")
  return seeds if summary.n == summary.num_runs else f"{seeds}, n = {summary.n} sets of samples"


def describe_settings(settings: dict[str, Any]) -> str:
  """Format sampling settings, known fields first."""
  known = dict(settings)
  words = [str(known.pop("solver", "")), f"{known.pop('num_steps', '?')} steps"]
  words += [f"guidance {known.pop('guidance_scale', '?')}", f"{known.pop('weights', '?')} weights"]
  words += [f"{known.pop('num_samples', '?')} images", f"{known.pop('dtype', '?')}"]
  words += [f"{field} {value}" for field, value in known.items() if value is not None]
  return ", ".join(filter(None, words))


def sections(lines: Sequence[tuple[Row | Difference, Sequence]]) -> list[tuple[str, list]]:
  """Group a table's (row, cells) under headings, by section and settings."""

  def heading(line: tuple[Row | Difference, Sequence]) -> str:
    settings = line[0].settings
    return line[0].section + ("" if settings is None else f": {describe_settings(settings)}")

  return [(title, list(own)) for title, own in itertools.groupby(lines, heading)]


def _tables(report: Report) -> dict[str, Any]:
  """Return the sections of both tables of arms, and of the comparisons with each baseline."""
  lines = {False: [], True: []}
  for row in report.rows:
    lines[is_shared(row)].append((row, row.cells))
  baselines = []
  for baseline in dict.fromkeys(comparison.baseline for comparison in report.comparisons):
    against = [c for c in report.comparisons if c.baseline == baseline]
    differences = [(cells[0], cells) for cells in zip(*(c.rows for c in against), strict=True)]
    baselines.append((baseline, against, sections(differences)))
  arms, shared = map(sections, lines.values())
  return {"arms": arms, "shared": shared, "baselines": baselines}


def _pictures(report: Report) -> dict[str, list[tuple[str | None, str]]]:
  arms, by_key = report.arms, {row.key: row for row in report.rows}
  distances = [row for row in report.rows if row.key.endswith("_frechet_distance")]
  macs, held_out = by_key["mean_forward_macs"], by_key["held_out_loss_ema"]
  costs = [macs, by_key["training_seconds"]]
  measured = [(held_out, "Held-out split, EMA weights")]
  if distances:  # show the distance that most arms have
    row = max(distances, key=lambda row: sum(bool(cell.summaries) for cell in row.cells))
    measured.append((row, f"Samples: {describe_settings(row.settings)}"))
  quality = [(plots.quality_over(arms, c, row), text) for row, text in measured for c in costs]
  r_label, ratio_label = "active rank r(t)", "active / dense parameters"
  r = plots.over_t("rank", arms, lambda model: model.active_rank.get(report.layer), r_label)
  ratio = plots.over_t("ratio", arms, lambda model: model.ratio, ratio_label)
  rank = [
    (r, f"Layer {report.layer}; a dense arm has its largest rank"),
    (ratio, "All factorized layers together; a dense arm has 1"),
  ]
  loss = [
    (plots.loss_over_t(arms, "held_out"), "Held-out split, EMA weights"),
    (plots.loss_over_t(arms, "training"), "Training, last tenth of each run's logged windows"),
  ]
  curves = [
    (plots.training_curves(arms, "train/loss"), "Training loss"),
    (plots.training_curves(arms, "eval/loss"), "Held-out loss, EMA weights"),
  ]
  return {"quality": quality, "rank": rank, "loss": loss, "curves": curves}


def render(report: Report) -> str:
  """Return the page, which is also well-formed XML."""
  loader, undefined = jinja2.PackageLoader("lrdit.report", ""), jinja2.StrictUndefined
  environment = jinja2.Environment(
    loader=loader, undefined=undefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
  )
  environment.filters |= {"value": format_value, "pair": format_pair, "count": count_values}
  environment.filters |= {"difference": format_difference, "error": _with_error, "plural": plural}
  environment.filters |= {"settings": describe_settings, "svg": Markup}
  names = {"DASH": DASH, "COLUMNS": GRID_COLUMNS, "color_of": plots.color_of}
  shown = {"arms": report.arms, "tables": _tables(report), "plots": _pictures(report)}
  return environment.get_template("page.html.j2").render(names | shown, report=report)
