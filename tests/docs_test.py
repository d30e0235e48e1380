"""README.md and docs/*.md: links, images, commands, config fields and paths that exist."""

import functools
import importlib.util
import itertools
import re
import shlex

import pytest

from lrdit.config import flags, recipe
from lrdit.runtime.store import flatten
from tests.packages import MAY_IMPORT
from tests.tiny import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# What an inline code span may name: a file of the repository, or a field of the config.
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
FILE = re.compile(r"(?:lrdit|tests|docs|launch|configs)/[\w/.-]+\.(?:py|sh|md|txt|yaml|sbatch|png)")
OWN_FILE = re.compile(r"\.(?:py|json|npz|jsonl|html|md|png|npy|part|log|safetensors)$")
FIELD = re.compile(r"\"?(?:--config\.)?([a-z_]+\.[a-z_0-9]+)(?:[=(].*)?")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


@functools.cache
def prose_of(page):
  """The page's text without its fenced blocks."""
  return FENCE.sub("", page.read_text())


@functools.cache
def anchors_of(page):
  """The anchors that GitHub gives a page's headings."""
  headings = re.findall(r"^#+ (.+)$", prose_of(page), re.M)
  anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
  assert len({*anchors}) == len(anchors), "two headings of one name"
  return anchors


@functools.cache
def default_fields():
  return set(flatten(recipe.load(str(ROOT / "configs/digits.py")).to_dict()))


def commands_of(page):
  """The words of each of our commands in a page's fenced blocks and inline code."""
  fenced = [body for language, body in FENCE.findall(page.read_text()) if language != "python"]
  lines = "\n".join(fenced).replace("\\\n", " ").splitlines() + SPAN.findall(prose_of(page))
  for line in lines:
    if re.match(r"(?:\w+=\S+ )*(?:python|bash|sbatch|kubectl apply|mpirun) ", line):
      words = shlex.split(line, comments=True)
      yield list(itertools.dropwhile(re.compile(r"\w+=").match, words))


def check_main(words):
  """Parses the flags of main.py as it does, with stand-ins for flags that a line leaves out."""
  given = {word.partition("=")[0] for word in words}
  mode = next((w.partition("=")[2] for w in words if w.startswith("--mode=")), "train")
  assert mode in flags.MODES, mode
  needed = {"config": "configs/digits.py", "workdir": "runs/x", "output": "x", "workdirs": "a,b"}
  absent = [name for name in flags.MODES[mode] if f"--{name}" not in given]
  flags.parse_flags(["main.py", *words, *(f"--{name}={needed[name]}" for name in absent)])


def check_module(name, words):
  """Checks that a module exists and knows the options that it is given."""
  spec = importlib.util.find_spec(name)
  assert spec, name
  path = ROOT / name.replace(".", "/")
  source = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
  for option in (word.partition("=")[0] for word in words if word.startswith("--")):
    assert f'"{option}"' in source, f"{name} has no option {option}"


def check_script(path, words):
  """Checks that a launch file exists, and the flags of main.py that it passes on."""
  assert (ROOT / path).is_file(), path
  own = {"--parts", "--minutes", "--dry_run"} if path.endswith("gpu_check.sh") else set()
  rest = [word for word in words if word.startswith("--") and word.partition("=")[0] not in own]
  if rest and not path.endswith("test.sh"):
    check_main(rest)


def is_dead(page, target):
  """Whether a link of a page leads nowhere."""
  path, _, anchor = target.partition("#")
  found = (page.parent / path).resolve() if path else page
  return not found.exists() or (anchor and anchor not in anchors_of(found))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(page):
  targets = [t for t in LINK.findall(prose_of(page)) if not re.match(r"\w+:", t)]
  assert not [target for target in targets if is_dead(page, target)]


@each_page
def test_commands_parse(page, monkeypatch):
  monkeypatch.chdir(ROOT)
  for words in commands_of(page):
    if "main.py" in words:
      check_main(words[words.index("main.py") + 1 :])
    elif words[:2] == ["python", "-m"]:
      if words[2] != "pytest":
        check_module(words[2], words[3:])
    else:
      script = next(word for word in words if word.startswith("launch/"))
      check_script(script, words[words.index(script) + 1 :])


@each_page
def test_code_spans_name_what_exists(page):
  groups = {field.partition(".")[0] for field in default_fields()}
  unknown = []
  for span in SPAN.findall(prose_of(page)):
    paths = [path for path in FILE.findall(span) if "NAME" not in path]
    unknown += [path for path in paths if not (ROOT / path).exists()]
    field = FIELD.fullmatch(span)
    is_field = field and field[1].partition(".")[0] in groups and not OWN_FILE.search(span)
    unknown += [span] if is_field and field[1] not in default_fields() else []
  assert not unknown


@each_page
def test_pages_are_short(page):
  limit = 150 if page.name == "README.md" else 120
  if page.name != "configuration.md":  # which is generated, a line for each field
    assert len(page.read_text().splitlines()) <= limit


@each_page
def test_prose_is_at_most_120_columns_wide(page):
  lines = prose_of(page).splitlines()
  assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]


def test_design_has_the_import_table():
  text = (ROOT / "docs/design.md").read_text()
  rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", text, re.M)
  assert [name for name, _ in rows] == [*MAY_IMPORT]
  for name, allowed in rows:
    if allowed != "all above":
      assert sorted(re.findall(r"`(\w+)`", allowed)) == sorted(MAY_IMPORT[name]), name
