"""No code in files that were read is run, and what they say is escaped where it is shown."""

import ast
import shutil
import xml.etree.ElementTree as ElementTree

import pytest

from lrdit.report import page
from lrdit.report.contents import make_report
from tests import workdirs
from tests.tiny import ROOT

RUNS_CODE = {"pickle.load", "pickle.loads", "eval", "os.system", "os.popen", "marshal.loads"}
RUNS_CODE |= {"yaml.load", "joblib.load", "dill.load", "cloudpickle.load"}


def unsafe_calls(text):
  """Calls that may run what a file holds, as (line, name)."""
  for node in ast.walk(ast.parse(text)):
    if not isinstance(node, ast.Call):
      continue
    name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
    is_unsafe = name in RUNS_CODE or given.get("shell", "False") != "False"
    is_unsafe |= given.get("allow_pickle", "False") != "False"
    is_unsafe |= name.endswith("torch.load") and given.get("weights_only") != "True"
    is_unsafe |= name.endswith("Environment") and given.get("autoescape") != "True"
    if is_unsafe:
      yield node.lineno, name


def test_nothing_is_unpickled_or_run():
  paths = [ROOT / "main.py", *ROOT.glob("lrdit/**/*.py")]
  assert {str(p): found for p in paths if (found := [*unsafe_calls(p.read_text())])} == {}


@pytest.mark.parametrize(
  "line",
  [
    "np.load(path, allow_pickle=True)",
    "torch.load(path)",
    "torch.load(path, weights_only=False)",
    "pickle.load(file)",
    "subprocess.run(text, shell=True)",
    "jinja2.Environment(loader=loader)",
    "eval(text)",
  ],
)
def test_an_unsafe_call_is_seen(line):
  assert [*unsafe_calls(line)]


EVIL = "<script>alert('1')</script>&"


def test_names_in_a_workdir_are_escaped_on_the_page(tmp_path):
  """The names are those of the workdir, a sample set, data, fields, metrics and layers."""
  name = EVIL.replace("/", "_")
  run = tmp_path / name
  workdirs.make_run(run)
  shutil.copytree(run / "samples" / "default", run / "samples" / name)

  def spoil_config(config):
    config["model"]["variant"] = config["method"] = config["data"]["name"] = EVIL
    config["model"][EVIL] = EVIL

  def spoil_evaluation(evaluation):
    own = evaluation["samples"].pop("default")
    own["figures"][f"{EVIL}_frechet_distance"] = 3.0
    own["reference"]["split"] = evaluation["software"]["jax"] = EVIL
    evaluation["samples"] |= {name: own, EVIL: own}

  workdirs.edit(run / "config.json", spoil_config)
  workdirs.edit(run / "evaluation.json", spoil_evaluation)
  workdirs.edit(run / "data.json", lambda data: data["train"].update(name=EVIL, classes=[EVIL]))
  for file in run.glob("samples/*/metadata.json"):
    workdirs.edit(file, lambda found: found.update(solver=EVIL, labels=EVIL, backend=EVIL))
  for file in run.glob("samples/*/path.json"):
    workdirs.edit(file, lambda found: found.update(label=EVIL, ranks={EVIL: [EVIL, 8]}))
  text = page.render(make_report([str(run)], str(tmp_path / "out")))
  assert text.count("&lt;script&gt;") > 10
  assert "<script" not in text
  ElementTree.fromstring(text.split("\n", 1)[1])
