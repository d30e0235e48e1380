"""Mistakes on the command line, in config files and in the environment: one line for each.

`main_test.BAD_INPUTS` has those of single fields; here are the others, by kind. All but the
environment's are told within this process.
"""

import os
import subprocess
import sys

import pytest

from lrdit.config import flags as command_line
from lrdit.config import schema as common
from lrdit.experiment import Experiment
from lrdit.runtime import cluster, startup
from lrdit.runtime.errors import UserError, as_user_error
from lrdit.runtime.paths import local_path
from tests import tiny
from tests.main_test import BAD_INPUTS, DIGITS, assert_one_line, run_in_process

CIFAR = "--config=configs/cifar10.py"
CELEBA = "--config=configs/celeba.py"
REPORT = ("--mode=report", "--output={tmp}/out")
FOLDER = (CIFAR, "--config.data.name=folder")
NPZ = (CIFAR, "--config.data.name=npz")
MEASURED = "--config.rank.schedule=measured"
SHARES = "--config.rank.measured_shares="
BOUNDARIES = "--config.rank.measured_boundaries="

# id: (text of a config file, ARGUMENT with its colon, words that name the cause). The words
# begin after the path of the file.
CONFIG_FILES = {
  "a syntax error": ("x = 1\ndef get_config(:\n", "", ":2: SyntaxError"),
  "a wrong indent": ("def get_config():\n  x = 1\n    y = 2\n", "", ":3: IndentationError"),
  "a zero byte": ("x = '\0'\n", "", ": SyntaxError: source code"),
  "another encoding": (b"x = '\xff'\n", "", ":1: SyntaxError: (unicode error)"),
  "nothing in it": ("", "", " defines no function get_config"),
  "get_config is no function": ("get_config = 3\n", "", " defines no function get_config"),
  "an error while it is read": (
    "\n\nraise RuntimeError('no\\nno')\n",
    "",
    ":3: RuntimeError: no no",
  ),
  "an error of get_config": (
    "def get_config(arg=''):\n  fields = {}\n  return fields['size']\n",
    "",
    ":3: KeyError: 'size'",
  ),
  "an import that fails": ("import no_such_module\n", "", ":1: ModuleNotFoundError: No module"),
  "a name that common has not": (
    "from configs.common import get_config\n",
    "",
    ":1: ImportError: cannot import name",
  ),
  "an end of the process": ("import sys\nsys.exit(3)\n", "", ":2: SystemExit: 3"),
  "no end": ("def get_config():\n  return get_config()\n", "", ":2: RecursionError"),
  "no return": ("def get_config():\n  pass\n", "", " returns NoneType, not a ConfigDict"),
  "a dict": ("def get_config():\n  return {}\n", "", " returns dict, not a ConfigDict"),
  "no room for an argument": (
    "def get_config():\n  return {}\n",
    ":method=full",
    ": too many positional arguments: leave out what follows the colon",
  ),
  "an argument that is missing": (
    "def get_config(arg):\n  return {}\n",
    "",
    ": missing a required argument: 'arg': write FILE:ARGUMENT",
  ),
  "a field that does not exist": (
    (
      "from configs import digits\n\n"
      "def get_config(arg=''):\n"
      "  config = digits.get_config(arg)\n"
      "  config.data.num_clases = 3\n"
      "  return config\n"
    ),
    "",
    ':5: AttributeError: \'Key "num_clases" does not exist',
  ),
  "a value of another type": (
    (
      "from configs import digits\n\n"
      "def get_config(arg=''):\n"
      "  config = digits.get_config(arg)\n"
      "  config.training.batch_size = 'many'\n"
      "  return config\n"
    ),
    "",
    ":5: TypeError: Could not override field 'batch_size'",
  ),
}

# id: (flags after those of a tiny run, exit status, words of the message). {tmp} holds a file
# `file`, an empty directory `empty`, `text/a.txt` and `flags.bin`, which is not UTF-8.
MISTAKES = {
  # --config itself.
  "no such config file": (["--config=configs/typo.py"], 2, "configs/typo.py cannot be read: No"),
  "no such config file, absolute": (["--config=/nowhere/c.py"], 2, "=/nowhere/c.py cannot be read"),
  "config that is a directory": (["--config=configs"], 2, "configs cannot be read: Is a directory"),
  "config below a file": (["--config=README.md/c.py"], 2, "Not a directory"),
  "config without the name of a file": (["--config=:method=full"], 2, "names no file"),
  "a colon too many": ([f"{DIGITS}:method=full:variant=T/2"], 2, "has a colon too many"),
  "config at an address": (["--config=gs://bucket/c.py"], 2, "is an address, not a path"),
  "config of nobody": (["--config=~no_such_user/c.py"], 2, "has no home directory"),
  "empty arguments": ([f"{DIGITS}:,,"], 2, "config argument '' is unknown"),
  "argument without a key": ([f"{DIGITS}:=T/2"], 2, "config argument '=T/2' is unknown"),
  "argument twice": ([f"{DIGITS}:method=full,method=static"], 2, "method is given twice"),
  "argument of another config": ([f"{DIGITS}:classes=3"], 2, "argument 'classes=3' is unknown"),
  "arguments parted by a semicolon": (
    [f"{DIGITS}:method=full;variant=T/2"],
    1,
    "method='full;variant=T/2' is unknown",
  ),
  "no method": ([f"{DIGITS}:method="], 1, "method='' is unknown"),
  "variant without a patch": ([f"{DIGITS}:variant=S"], 1, "variant='S' is unknown"),
  "variant with a patch of 0": ([f"{DIGITS}:variant=S/0"], 1, "variant='S/0' is unknown"),
  "variant with a negative patch": ([f"{DIGITS}:variant=S/-2"], 1, "variant='S/-2' is unknown"),
  "variant with two patches": ([f"{DIGITS}:variant=T/2/2"], 1, "variant='T/2/2' is unknown"),
  "classes that are words": (["--config=configs/imagenet128.py:classes=x"], 2, "classes=x must be"),
  "classes above all": (["--config=configs/imagenet128.py:classes=1001"], 2, "classes=1001 must"),
  "no number of classes": (["--config=configs/imagenet128.py:classes="], 2, "classes= must be"),
  # Overrides.
  "index into a tuple": (["--config.rank.dense_layers[0]=x"], 2, "dense_layers[0]=x: no such"),
  "group as a dict": (["--config.data={'name':'digits'}"], 2, "data is a group of fields"),
  "group without a value": (["--config.data"], 2, "data is a group of fields"),
  "field below a string": (["--config.data.name.x=3"], 2, "--config.data.name.x=3: no such"),
  "field without a name": (["--config.=3"], 2, "--config.=3: no such config field"),
  "field with two dots": (["--config..seed=3"], 2, "did you mean --config.seed?"),
  "group with a dot at its end": (["--config.model.=3"], 2, "--config.model.=3: no such"),
  "field in another case": (["--config.Seed=3"], 2, "did you mean --config.seed?"),
  "flag in another case": (["--Config.seed=3"], 2, "did you mean --config.seed?"),
  "field misspelt": (["--config.model.dept=3"], 2, "did you mean --config.model.depth?"),
  "field with an accent": (["--config.séed=3"], 2, "did you mean --config.seed?"),
  "value parted by a blank in one word": (["--config.seed 3"], 2, "did you mean --config.seed?"),
  "field without its value": (["--config.seed"], 2, "Missing value for flag --config.seed"),
  "field with an empty value": (["--config.seed="], 2, "--config.seed=: invalid literal"),
  "field that cannot be denied": (["--noconfig.seed"], 2, "Unknown command line flag"),
  "whole number with a point": (["--config.training.batch_size=16.0"], 2, "batch_size=16.0: inv"),
  "whole number with an exponent": (["--config.training.num_steps=1e3"], 2, "num_steps=1e3: inv"),
  "number that is a word": (["--config.rank.ratio=half"], 2, "ratio=half: could not convert"),
  "flip that is neither": (["--config.data.flip=maybe"], 2, "flip=maybe: "),
  "tuple that is not closed": (["--config.rank.dense_layers=(a b"], 2, "dense_layers=(a b: "),
  "layers in a list of lists": (["--config.rank.dense_layers=[[1]]"], 1, "must be names of layers"),
  "layers in a dict": (["--config.rank.dense_layers={1:2}"], 1, "must be names of layers"),
  # Flags.
  "config twice": ([CIFAR, "--config.seed=1", "--twice"], 2, "already defined as"),
  "workdir misspelt": (["--worksdir=x"], 2, "did you mean --workdir?"),
  "mode without a value": (["--mode"], 2, "Missing value for flag --mode"),
  "empty mode": (["--mode="], 2, "--mode=: value should be one of"),
  "mode in another case": (["--mode=Train"], 2, "--mode=Train: value should be one of"),
  "word after the flags": (["stray"], 2, "'stray' is not a flag"),
  "flag without a name": (["--=3"], 2, "'--=3' is not a flag"),
  "three dashes": (["---"], 2, "Unknown command line flag '-'"),
  "debug denied with a value": (["--nodebug=3"], 2, "does not take an argument"),
  "missing flagfile": (["--flagfile={tmp}/none"], 2, "No such file or directory: '{tmp}/none'"),
  "flagfile that is a directory": (["--flagfile={tmp}/empty"], 2, "Is a directory"),
  "flagfile without a name": (["--flagfile"], 2, "--flagfile with no argument"),
  "flagfile that is no text": (["--flagfile={tmp}/flags.bin"], 2, "--flagfile names no text"),
  "output of a training": (["--output=x"], 2, "--output is not used by --mode=train"),
  "output of sampling": (["--mode=sample", "--output=x"], 2, "not used by --mode=sample"),
  "workdirs of a training": (["--workdirs=a,b"], 2, "--workdirs is not used by --mode=train"),
  # Several processes.
  "process alone": (["--process_id=-1"], 2, "go together: give all"),
  "coordinator alone": (["--coordinator=a:1"], 2, "go together: give all"),
  "no processes": (["--num_processes=0"], 2, "--num_processes=0 must be in [1"),
  "fewer than no processes": (["--num_processes=-2"], 2, "--num_processes=-2 must be in [1"),
  "processes without end": (
    ["--coordinator=a:1", "--num_processes=99999999999999999999", "--process_id=0"],
    2,
    "must be in [1, 2147483647]",
  ),
  "second of one process": (
    ["--coordinator=a:1", "--num_processes=1", "--process_id=1"],
    2,
    "--process_id=1 is not in [0, 1)",
  ),
  "process counted from one": (
    ["--coordinator=a:1", "--num_processes=2", "--process_id=2"],
    2,
    "--process_id=2 is not in [0, 2): it counts from 0",
  ),
  "coordinator without a port": (
    ["--coordinator=node", "--num_processes=2", "--process_id=0"],
    2,
    "--coordinator=node is not HOST:PORT",
  ),
  "coordinator with a port too high": (
    ["--coordinator=node:65536", "--num_processes=2", "--process_id=0"],
    2,
    "--coordinator=node:65536 is not HOST:PORT",
  ),
  "empty coordinator": (
    ["--coordinator=", "--num_processes=2", "--process_id=0"],
    2,
    "--coordinator= is not HOST:PORT",
  ),
  "processes that are words": (["--num_processes=two"], 2, "--num_processes=two: invalid literal"),
  "analysis by several": (
    ["--mode=analyze", "--coordinator=a:1", "--num_processes=2", "--process_id=0"],
    2,
    "--mode=analyze is for one process",
  ),
  # Paths.
  "workdir in a bucket": (["--workdir=gs://bucket/run"], 2, "--workdir=gs://bucket/run is an addr"),
  "workdir in another bucket": (["--workdir=s3://b/run"], 2, "--workdir=s3://b/run is an address"),
  "workdir as a URL": (["--workdir=file:///tmp/run"], 2, "not a path on this machine: write /tmp"),
  "workdir as a short URL": (["--workdir=file:/tmp/run"], 2, "write /tmp/run"),
  "workdir on another host": (["--workdir=ssh://host/run"], 2, "mount it and name the directory"),
  "workdir of nobody": (["--workdir=~no_such_user/run"], 2, "~no_such_user has no home directory"),
  "workdir below a file": (["--workdir={tmp}/file/run"], 1, "Not a directory"),
  "workdir with too long a name": ([f"--workdir={{tmp}}/{'x' * 300}"], 1, "File name too long"),
  "output in a bucket": (
    [CELEBA, "--mode=encode", "--output=hf://datasets/x"],
    2,
    "--output=hf://datasets/x is an address",
  ),
  "data in a bucket": ([CIFAR, "--config.data.data_dir=s3://b"], 1, "data.data_dir=s3://b is an"),
  "VAE in a bucket": ([CELEBA, "--config.vae.path=gs://b/vae"], 1, "vae.path=gs://b/vae is an"),
  "latents in a bucket": ([CELEBA, "--config.vae.latents_dir=gs://b"], 1, "latents_dir=gs://b is"),
  "analysis in a bucket": (
    [MEASURED, "--config.rank.analysis=https://host/truncation.json"],
    1,
    "rank.analysis=https://host/truncation.json is an address",
  ),
  "features in a bucket": (
    ["--mode=evaluate", "--config.evaluation.features_dir=gs://b"],
    1,
    "evaluation.features_dir=gs://b is an address",
  ),
  "weights at an address": (
    ["--mode=evaluate", "--config.evaluation.inception_weights=https://host/w.pth"],
    1,
    "evaluation.inception_weights=https://host/w.pth is an address",
  ),
  "data of nobody": ([CIFAR, "--config.data.data_dir=~no_such_user"], 1, "has no home directory"),
  "VAE of a model on pixels": (["--config.vae.path=x"], 1, "vae.path='x' is not used by a model"),
  "latents of a model on pixels": (
    ["--config.vae.latents_dir=x"],
    1,
    "latents_dir='x' is not used",
  ),
  "VAE that is nowhere": (
    [CELEBA, "--mode=encode", "--output={tmp}/out", "--config.vae.path={tmp}/none"],
    1,
    "the VAE {tmp}/none does not exist",
  ),
  "VAE that is no VAE": (
    [CELEBA, "--mode=encode", "--output={tmp}/out", "--config.vae.path={tmp}/file"],
    1,
    "{tmp}/file is not a safetensors file",
  ),
  "VAE without weights": (
    [CELEBA, "--mode=encode", "--output={tmp}/out", "--config.vae.path={tmp}/empty"],
    1,
    "{tmp}/empty has no .safetensors file",
  ),
  "latents that are nowhere": (
    [CELEBA, "--config.vae.latents_dir={tmp}/none"],
    1,
    "no latents under {tmp}/none",
  ),
  "latents that are a file": (
    [CELEBA, "--config.vae.latents_dir={tmp}/file"],
    1,
    "{tmp}/file",
  ),
  "photographs that are a file": ([*FOLDER, "--config.data.data_dir={tmp}/file"], 1, "{tmp}/file"),
  "photographs that are nowhere": ([*FOLDER, "--config.data.data_dir={tmp}/none"], 1, "not exist"),
  "photographs without one": ([*FOLDER, "--config.data.data_dir={tmp}/empty"], 1, "no images"),
  "array file that is a directory": ([*NPZ, "--config.data.data_dir={tmp}/empty"], 1, "not a file"),
  "array file that is nowhere": ([*NPZ, "--config.data.data_dir={tmp}/none"], 1, "not a file"),
  "array file that is text": ([*NPZ, "--config.data.data_dir={tmp}/file"], 1, "is not an .npz"),
  "array file without a name": ([*NPZ], 1, "needs config.data.data_dir"),
  # Combinations of fields.
  "measured without an analysis": ([MEASURED], 1, "rank.analysis='' is missing"),
  "analysis that is nowhere": (
    [MEASURED, "--config.rank.analysis={tmp}/none"],
    1,
    "none' is not there",
  ),
  "analysis that is text": ([MEASURED, "--config.rank.analysis={tmp}/file"], 1, "not an analysis"),
  "analysis that nothing reads": (["--config.rank.analysis=x"], 1, "needs rank.schedule=measured"),
  "shares that nothing reads": ([f"{SHARES}(1,)"], 1, "needs rank.schedule=measured"),
  "boundaries that nothing reads": ([f"{BOUNDARIES}(0,9)"], 1, "needs rank.schedule=measured"),
  "measured at equal size": ([MEASURED, "--config.rank.match=total"], 1, "must be activated where"),
  "shares above one": (
    [MEASURED, f"{SHARES}(0.5,2)", f"{BOUNDARIES}(0,500,1000)"],
    1,
    "must be numbers in (0, 1]",
  ),
  "shares that are words": (
    [MEASURED, f"{SHARES}('x',1)", f"{BOUNDARIES}(0,500,1000)"],
    1,
    "must be numbers in (0, 1]",
  ),
  "fewer boundaries than shares": (
    [MEASURED, f"{SHARES}(0.5,1)", f"{BOUNDARIES}(0,500)"],
    1,
    "must rise from 0 to 1000 and be one more than",
  ),
  "shares without boundaries": ([MEASURED, f"{SHARES}(0.5,1)"], 1, "measured_boundaries=() must"),
  "fewer timesteps than solver steps": (
    ["--config.diffusion.num_train_timesteps=5"],
    1,
    "num_steps=10 must lie in [1, 5]",
  ),
  "one timestep": (["--config.diffusion.num_train_timesteps=1"], 1, "num_train_timesteps=1 must"),
  "no groups": (["--config.curriculum.boundaries=()"], 1, "boundaries=() must be two or more"),
  "blocks before the first": (["--config.rank.last_n_blocks=-1"], 1, "last_n_blocks=-1 must lie"),
  "model too narrow for its rank": (
    ["--config.model.hidden_size=4"],
    1,
    "is above the static rank",
  ),
  "noise of ddpm": (
    ["--config.sampling.solver=ddpm", "--config.sampling.eta=1"],
    1,
    "eta=1.0 is noise of ddim",
  ),
  "latents that clip": ([CELEBA, "--config.sampling.clip_x_0=true"], 1, "would cut latents"),
  "guidance without end": (["--config.sampling.guidance_scale=1001"], 1, "in [0.0, 1000.0]"),
  "labels that are a fraction": (["--config.sampling.labels=3.0"], 1, "labels='3.0' is unknown"),
  "labels in a list": (["--config.sampling.labels=0,1"], 1, "labels='0,1' is unknown"),
  "labels below the first": (["--config.sampling.labels=-1"], 1, "labels='-1' is unknown"),
  "no labels": (["--config.sampling.labels="], 1, "labels='' is unknown"),
  "export without a name": (["--config.sampling.name="], 1, "must be the name of a directory"),
  "export with a line end": (["--config.sampling.name=a\nb"], 1, "printable characters"),
  "export with too long a name": (
    [f"--config.sampling.name={'x' * 300}"],
    1,
    "at most 100 printable characters",
  ),
  "rate that is 0 in float32": (["--config.optimizer.learning_rate=1e-40"], 1, "0 in float32"),
  "clipping that is 0 in float32": (["--config.optimizer.grad_clip_norm=1e-40"], 1, "0 in float32"),
  "decay beyond float32": (["--config.optimizer.weight_decay=1e39"], 1, "must be below 1e30"),
  "cache beyond any machine": (["--config.data.cache_gib=1e300"], 1, "cache_gib=1e+300 must be"),
  # Other modes.
  "analysis before training": (["--mode=analyze"], 1, "is not the workdir of a run"),
  "unknown section": (
    ["--mode=analyze", "--config.analysis.sections=('rank',)"],
    1,
    "names an unknown section 'rank'",
  ),
  "gradients of no examples": (
    ["--mode=analyze", "--config.analysis.batch_sizes=()"],
    1,
    "analysis.batch_sizes=() must be rising numbers",
  ),
  "gradients of one example": (
    ["--mode=analyze", "--config.analysis.batch_sizes=(1,)"],
    1,
    "must end above 1",
  ),
  "batches that fall": (
    ["--mode=analyze", "--config.analysis.batch_sizes=(4,2)"],
    1,
    "analysis.batch_sizes=(4, 2) must be rising numbers",
  ),
  "a cut to rank 0": (
    ["--mode=analyze", "--config.analysis.ranks=(0,)"],
    1,
    "analysis.ranks=(0,) must be rising numbers",
  ),
  "ranks without end": (
    ["--mode=analyze", "--config.analysis.ranks=(99999999999999999999,)"],
    1,
    "up to 2147483647",
  ),
  "unknown extractor": (
    ["--mode=evaluate", "--config.evaluation.extractors=('fid',)"],
    1,
    "names an unknown extractor 'fid'",
  ),
  "no draws": (["--mode=evaluate", "--config.evaluation.draws=0"], 1, "draws=0 must be at least 1"),
  "too few features": (
    ["--mode=evaluate", "--config.evaluation.max_features=3"],
    1,
    "max_features=3 must be at least 10",
  ),
  "unknown reference": (
    ["--mode=evaluate", "--config.evaluation.reference_split=test"],
    1,
    "reference_split='test' is unknown",
  ),
  "benchmark of too many steps": (
    ["--mode=benchmark", "--config.sampling.num_steps=1001"],
    1,
    "num_steps=1001 must lie in [1, 1000]",
  ),
}

# As those, but whole command lines.
REPORTS = {
  "report on nothing": (["--workdirs="], 2, "--workdirs is missing"),
  "report on a comma": (["--workdirs=,"], 2, "--workdirs=, names a directory without a name"),
  "report with a comma too many": (["--workdirs=a,,b"], 2, "without a name: leave out a comma"),
  "report on a bucket": (["--workdirs=a,gs://b"], 2, "--workdirs=gs://b is an address"),
  "report into a bucket": (["--workdirs=a", "--output=gs://b"], 2, "--output=gs://b is an address"),
  "report to nowhere": (["--workdirs=a", "--output="], 2, "--output is missing"),
  "report with a config": (["--workdirs=a", DIGITS], 2, "--config is not used by --mode=report"),
  "report with a workdir": (["--workdirs=a", "--workdir=b"], 2, "--workdir is not used by"),
  "report with a field": (["--workdirs=a", "--config.seed=3"], 2, "does not take: leave it out"),
  "report on what is nowhere": (["--workdirs={tmp}/none"], 1, "{tmp}/none is not the workdir of a"),
  "report on a file": (["--workdirs={tmp}/file"], 1, "{tmp}/file is not the workdir of a run"),
  "report on no run": (["--workdirs={tmp}/empty"], 1, "{tmp}/empty is not the workdir of a run"),
}


def defaults():
  """{field: default} of a config."""

  def walk(config, prefix):
    for name, value in config.items():
      if hasattr(value, "items"):
        yield from walk(value, f"{prefix}{name}.")
      else:
        yield f"{prefix}{name}", value

  return dict(walk(common.get_default_config("full", "T/2"), ""))


# What no field of a type can be. Strings, and the elements of tuples, have rules of their own.
NEVER = {
  float: ("nan", "inf", "-inf", "-1", "1e400", "", "x"),
  int: ("-99999999999999999999", "99999999999999999999", "2147483648.5", "nan", "", "x"),
  bool: ("maybe", "2", ""),
}
NEVER_BY_FIELD = {field: NEVER.get(type(value), ()) for field, value in defaults().items()}


@pytest.fixture
def places(tmp_path):
  """What the mistakes name."""
  (tmp_path / "file").write_text("words\n")
  (tmp_path / "empty").mkdir()
  (tmp_path / "flags.bin").write_bytes(b"--config.seed=\xff\n")
  return tmp_path


def assert_mistake(capsys, monkeypatch, argv, status, words, tmp):
  before = sorted(tmp.rglob("*"))
  argv = [flag.replace("{tmp}", str(tmp)) for flag in argv]
  got, stderr = run_in_process(capsys, monkeypatch, argv)
  assert_one_line(got, status, stderr, words.replace("{tmp}", str(tmp)))
  assert sorted(tmp.rglob("*")) == before  # nothing was written


@pytest.mark.parametrize(("flags", "status", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_ends_in_one_line(flags, status, words, places, capsys, monkeypatch):
  flags = [CIFAR if flag == "--twice" else flag for flag in flags]
  own = any(flag.startswith("--config=") for flag in flags)
  argv = tiny.command(places / "run", *flags)[3 if own else 2 :]
  assert_mistake(capsys, monkeypatch, argv, status, words, places)


@pytest.mark.parametrize(("flags", "status", "words"), REPORTS.values(), ids=REPORTS.keys())
def test_a_mistaken_report_ends_in_one_line(flags, status, words, places, capsys, monkeypatch):
  assert_mistake(capsys, monkeypatch, [*REPORT, *flags], status, words, places)


@pytest.mark.parametrize(
  ("text", "argument", "words"), CONFIG_FILES.values(), ids=CONFIG_FILES.keys()
)
@pytest.mark.parametrize("where", ["absolute", "relative"])
def test_a_broken_config_file_is_named(text, argument, words, where, tmp_path, capsys, monkeypatch):
  (tmp_path / "mine").write_bytes(text if isinstance(text, bytes) else text.encode())
  path = tmp_path / "mine"
  if where == "relative":  # to a directory that is not the checkout
    monkeypatch.setattr(tiny, "ROOT", tmp_path)
    path = "mine"
  argv = [f"--config={path}{argument}", f"--workdir={tmp_path}/run"]
  assert_mistake(capsys, monkeypatch, argv, 2, f"{path}{words}", tmp_path)


def test_a_config_file_whose_import_is_broken_names_what_it_imports(tmp_path, capsys, monkeypatch):
  (tmp_path / "mine.py").write_text("import broken_neighbour\n")
  (tmp_path / "broken_neighbour.py").write_text("x = (\n")
  monkeypatch.syspath_prepend(tmp_path)
  argv = [f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run"]
  words = f"{tmp_path}/broken_neighbour.py:1: SyntaxError"
  assert_mistake(capsys, monkeypatch, argv, 2, words, tmp_path)


def test_debug_shows_where_a_config_file_fails(tmp_path, capsys, monkeypatch):
  (tmp_path / "mine.py").write_text("def get_config():\n  return 1 / 0\n")
  argv = [f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run"]
  status, stderr = run_in_process(capsys, monkeypatch, argv)
  assert_one_line(status, 2, stderr, "mine.py:2: ZeroDivisionError: division by zero")
  for flag in ("--debug", "--debug=true", "-debug"):
    status, stderr = run_in_process(capsys, monkeypatch, [flag, *argv])
    assert status == 2
    assert f'File "{tmp_path}/mine.py", line 2, in get_config' in stderr
    assert stderr.rstrip().splitlines()[-1].startswith("error: --config cannot be read")


def test_a_config_of_another_program_lacks_fields(tmp_path, capsys, monkeypatch):
  (tmp_path / "mine.py").write_text(
    "from ml_collections import ConfigDict\n"
    "def get_config():\n  return ConfigDict({'seed': 0, 'learning_rate': 0.1})\n"
  )
  argv = [f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run"]
  words = ": begin get_config with configs.common.get_default_config"
  assert_mistake(capsys, monkeypatch, argv, 2, words, tmp_path)


def test_a_config_of_one_s_own_is_used(tmp_path, monkeypatch):
  """Wherever it lies, and in any order of flags; its own argument is handed to it."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "mine.py").write_text(
    "from configs import digits\n"
    "def get_config(arg):\n  config = digits.get_config()\n  config.seed = int(arg)\n"
    "  return config\n"
  )
  (tmp_path / "flags").write_text("--config.training.num_steps=7\n--workdir=w\n")
  argv = ["main.py", "--config.data.flip", "--config.model.depth", "3", "--config", "mine.py:5"]
  values = command_line.parse_flags([*argv, "--flagfile=flags", "--noconfig.model.remat"])
  config = values.config
  assert (config.seed, config.training.num_steps, config.model.depth) == (5, 7, 3)
  assert (config.data.flip, config.model.remat, values.workdir) == (True, False, "w")


@pytest.mark.parametrize("field", [field for field, never in NEVER_BY_FIELD.items() if never])
def test_what_no_field_of_the_type_can_be(field, tmp_path, capsys, monkeypatch):
  for value in NEVER_BY_FIELD[field]:
    argv = tiny.command(tmp_path / "run", f"--config.{field}={value}")[2:]
    status = 2 if value in ("", "x", "maybe", "2") or value.endswith(".5") else None
    got, stderr = run_in_process(capsys, monkeypatch, argv)
    assert status in (None, got)
    assert_one_line(got, got if got in (1, 2) else 1, stderr, field.rpartition(".")[2])
    assert not (tmp_path / "run").exists()


def test_there_are_150_mistakes():
  assert len(MISTAKES) + len(REPORTS) + len(CONFIG_FILES) + len(BAD_INPUTS) >= 150
  # All modes, and all kinds: flags, fields, files, paths, processes.
  modes = {flag for flags, _, _ in MISTAKES.values() for flag in flags if "--mode=" in flag}
  assert {
    f"--mode={mode}" for mode in command_line.MODES if mode not in ("train", "report")
  } <= modes


# Paths.


def test_paths_of_this_machine_are_left_as_they_are(monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")
  for given, read in {
    "": "",
    "runs/a": "runs/a",
    "~/a": "/home/me/a",
    "a:b": "a:b",
    "./gs:/a": "./gs:/a",
    "a//b": "a//b",
    "a~": "a~",
  }.items():
    assert local_path("--workdir", given) == read
  for given in ("gs://b", "S3://b", "a+b://c", "file:/a", "~no_such_user", "a\0b"):
    with pytest.raises(UserError, match=r"^--workdir="):
      local_path("--workdir", given)


def test_the_default_directory_of_datasets_may_be_unset_or_empty_or_wrong(monkeypatch):
  config = tiny.tiny_config(data__name="cifar10", data__image_size=32, data__num_channels=3)
  monkeypatch.setenv("TFDS_DATA_DIR", "")
  monkeypatch.setenv("HOME", "/nowhere")
  with pytest.raises(UserError, match="no prepared cifar10 under /nowhere/tensorflow_datasets"):
    Experiment(config).source("train")
  monkeypatch.setenv("TFDS_DATA_DIR", "gs://bucket")
  with pytest.raises(UserError, match=r"^TFDS_DATA_DIR=gs://bucket is an address"):
    Experiment(config).source("train")


# The environment: read while jax is imported, so that each needs a process.

ENVIRONMENTS = {
  "no such platform": ({"JAX_PLATFORMS": "cuda"}, "JAX_PLATFORMS=cuda: no device to compute on"),
  "no number of devices": (
    {"JAX_NUM_CPU_DEVICES": "two"},
    "JAX_NUM_CPU_DEVICES=two in the environment is not a number",
  ),
  "no truth": ({"JAX_ENABLE_X64": "maybe"}, "JAX_ENABLE_X64=maybe in the environment: invalid"),
  "unknown generator": (
    {"JAX_DEFAULT_PRNG_IMPL": "mt19937"},
    "JAX_DEFAULT_PRNG_IMPL=mt19937 in the environment: Invalid value",
  ),
  "no seconds": ({"TQDM_MININTERVAL": "soon"}, "TQDM_MININTERVAL=soon in the environment: could"),
  "unknown flag of XLA": (
    {"XLA_FLAGS": "--xla_nonsense=1"},
    "XLA_FLAGS=--xla_nonsense=1 in the environment: Unknown flag",
  ),
  "no value of XLA's": (
    {"XLA_FLAGS": "--xla_force_host_platform_device_count=two"},
    "Couldn't interpret value two for flag xla_force_host_platform_device_count",
  ),
}


@pytest.mark.parametrize(("variables", "words"), ENVIRONMENTS.values(), ids=ENVIRONMENTS.keys())
def test_a_mistake_in_the_environment_names_the_variable(variables, words, tmp_path):
  command = [sys.executable, "main.py", DIGITS, f"--workdir={tmp_path}/run"]
  environment = {"JAX_PLATFORMS": "cpu", "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
  done = subprocess.run(
    command,
    cwd=tiny.ROOT,
    env=environment | variables,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert_one_line(done.returncode, 2, done.stderr, words)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", ["two", "0", "-5", "1.5"])
def test_devices_are_counted_from_one(given, monkeypatch):
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", given)
  with pytest.raises(UserError, match=f"JAX_NUM_CPU_DEVICES={given} "):
    startup.prepare()


@pytest.mark.parametrize("name", cluster.COUNTS)
def test_counts_of_processes_may_be_empty_but_not_words(name):
  alone = {"TPU_SKIP_MDS_QUERY": "1"}
  assert cluster.detection_method(alone | {name: ""}) is None
  for given in ("x", "-1", "2.0"):
    with pytest.raises(UserError, match=f"{name}={given} in the environment"):
      cluster.detection_method(alone | {name: given})


def test_a_process_whose_others_never_come_says_so_and_ends(tmp_path):
  """As in `srun -n 4 --pty bash`: SLURM tells of four processes, and one is started."""
  slurm = {
    "SLURM_JOB_ID": str(os.getpid()),  # the coordinator's port follows from it
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
  }
  program = (
    "import sys, main; from lrdit.runtime import startup; startup.prepare(); "
    "from lrdit.runtime import cluster; "
    "cluster.START_SECONDS, cluster.LOGGED_AFTER_SECONDS = 3, 1; "
    "sys.exit(main.run(['main.py', *sys.argv[1:]]))"
  )
  done = subprocess.run(
    [sys.executable, "-c", program, DIGITS, f"--workdir={tmp_path}/run"],
    cwd=tiny.ROOT,
    env=tiny.environment() | slurm,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == 75, done.stderr
  waiting, error = done.stderr.splitlines()
  for line in (waiting, error):
    assert (
      "--num_processes=1 runs this process alone (there are several by SLURM_STEP_NUM_TASKS=4"
      in line
    )
  assert waiting.startswith("a process: waiting for the other processes, up to 3 s")
  assert error.startswith("a process: error: the other processes cannot be reached (not all came")
  assert not (tmp_path / "run").exists()


def test_what_jax_was_asked_to_look_for_is_told_as_such(monkeypatch):
  error = FloatingPointError("invalid value (inf) encountered in div")
  assert as_user_error(error) is None
  monkeypatch.setenv("JAX_DEBUG_INFS", "1")
  assert "which JAX_DEBUG_INFS in the environment looked for" in str(as_user_error(error))


# Limits of the system.


@pytest.mark.parametrize(
  ("error", "words"),
  [
    (OSError(24, "Too many open files", "x"), "too many open files: the limit of this process is"),
    (RuntimeError("open failed: Too many open files"), "raise it by 'ulimit -n NUMBER'"),
    (MemoryError(), "out of memory (the machine gives no more)"),
    (OSError(12, "Cannot allocate memory"), "out of memory"),
    (RuntimeError("can't start new thread"), "raise 'ulimit -u NUMBER'"),
  ],
)
def test_a_limit_of_the_system_is_named(error, words):
  assert words in str(as_user_error(error))
  wrapped = ValueError("a library's")
  wrapped.__cause__ = error
  assert words in str(as_user_error(wrapped))
