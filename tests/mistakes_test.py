"""Mistakes in flags and paths: one line for each.

config/ has those in config files and in values of fields, environment_test.py those outside.
"""

import pytest

from lrdit.runtime.errors import UserError
from lrdit.runtime.paths import local_path
from tests.command_line import CELEBA, CIFAR, DIGITS, assert_mistake, assert_tiny_mistake

REPORT = ("--mode=report", "--output={tmp}/out")
FOLDER = (CIFAR, "--config.data.name=folder")
NPZ = (CIFAR, "--config.data.name=npz")
MEASURED = "--config.rank.schedule=measured"

# id: (flags after those of a tiny run, exit status, words of the message). {tmp} holds a file
# `file`, an empty directory `empty`, `text/a.txt` and `flags.bin`, which is not UTF-8.
MISTAKES = {
  "unknown field": (["--config.model.width=3"], 2, "--config.model.width=3: no such config field"),
  "unknown group": (["--config.modle.depth=3"], 2, "no such config field"),
  "field of the wrong type": (["--config.training.batch_size=many"], 2, "batch_size=many"),
  "fraction for a whole number": (["--config.training.num_steps=1.5"], 2, "num_steps=1.5"),
  "group instead of field": (["--config.model=3"], 2, "--config.model"),
  "unknown argument": ([f"{DIGITS}:size=S/2"], 2, "config argument 'size=S/2' is unknown"),
  "argument without a value": ([f"{DIGITS}:adaptive"], 2, "config argument 'adaptive' is unknown"),
  "missing config file": (["--config=configs/imagenet.py"], 2, "configs/imagenet.py"),
  "unknown flag": (["--work_dir=x"], 2, "Unknown command line flag 'work_dir'"),
  "argument that is no flag": (["train"], 2, "'train' is not a flag"),
  "unknown mode": (["--mode=fly"], 2, "--mode=fly"),
  "no workdir": (["--workdir="], 2, "--workdir is missing"),
  "config with a syntax error": (["--config=README.md"], 2, "--config cannot be read"),
  "field below a field": (["--config.training.batch_size.x=3"], 2, "batch_size.x=3: no such"),
  "sampling over devices": (
    ["--mode=sample", "--config.sampling.batch_size=6"],
    1,
    "sampling.batch_size=6 is not divisible by the 4 devices",
  ),
  "sampling before training": (["--mode=sample"], 1, "is not the workdir of a run"),
  "latents of no VAE": (
    ["--mode=encode", "--output=x"],
    1,
    "vae.downsample_factor=None makes a model",
  ),
  "nowhere to encode to": (["--mode=encode"], 2, "--output is missing"),
  "encoding without a VAE": (
    ["--config=configs/celeba.py", "--mode=encode", "--output=x"],
    1,
    "config.vae.path='' must name the VAE",
  ),
  "classes out of range": (["--config=configs/imagenet128.py:classes=0"], 2, "classes=0 must be"),
  "no rounds": (
    ["--mode=benchmark", "--config.benchmark.rounds=0"],
    1,
    "benchmark.rounds=0 must be a whole number from 1",
  ),
  "no steps": (
    ["--mode=benchmark", "--config.benchmark.steps=0"],
    1,
    "benchmark.steps=0 must be a whole number from 1",
  ),
  "fewer than no runs": (
    ["--mode=benchmark", "--config.benchmark.sampling_runs=-1"],
    1,
    "benchmark.sampling_runs=-1 must be a whole number from 1 to 2**31 - 1, or None (",
  ),
  "matrices of negative size": (
    ["--mode=benchmark", "--config.benchmark.matmul_size=-1"],
    1,
    "benchmark.matmul_size=-1 must be a whole number from 1 to 2**31 - 1, or None (",
  ),
  "nowhere to write a benchmark": (["--mode=benchmark", "--workdir="], 2, "--workdir is missing"),
  "benchmark over devices": (
    ["--mode=benchmark", "--config.training.batch_size=6"],
    1,
    "training.batch_size=6 is not divisible by the 4 devices",
  ),
  "benchmark of samples over devices": (
    ["--mode=benchmark", "--config.sampling.batch_size=6"],
    1,
    "sampling.batch_size=6 is not divisible by the 4 devices",
  ),
  "benchmark of an arm that cannot be": (
    [f"{DIGITS}:method=full", "--mode=benchmark", "--config.rank.multiple_of=64"],
    1,
    "multiple_of=64 is above",
  ),
  "evaluating before training": (["--mode=evaluate"], 1, "is not the workdir of a run"),
  # --config itself.
  "no such config file": (["--config=configs/typo.py"], 2, "configs/typo.py cannot be read: No"),
  "no such config file, absolute": (["--config=/nowhere/c.py"], 2, "=/nowhere/c.py cannot be read"),
  "config that is a directory": (["--config=configs"], 2, "configs cannot be read: Is a directory"),
  "config below a file": (["--config=README.md/c.py"], 2, "Not a directory"),
  "config without the name of a file": (["--config=:method=full"], 2, "names no file"),
  "a colon too many": ([f"{DIGITS}:method=full:variant=T/2"], 2, "has a colon too many"),
  "config at an address": (["--config=gs://bucket/c.py"], 2, "is an address, not a path"),
  "config of nobody": (["--config=~no_such_user/c.py"], 2, "has no home directory"),
  "unknown recipe": (
    [f"{DIGITS}:recipe=sgd"],
    2,
    "config argument 'recipe=sgd': use one of muon, dissertation",
  ),
  "empty arguments": ([f"{DIGITS}:,,"], 2, "config argument '' is unknown"),
  "argument without a key": ([f"{DIGITS}:=T/2"], 2, "config argument '=T/2' is unknown"),
  "argument twice": ([f"{DIGITS}:method=full,method=static"], 2, "method is given twice"),
  "argument of another config": ([f"{DIGITS}:classes=3"], 2, "argument 'classes=3' is unknown"),
  "arguments parted by a semicolon": (
    [f"{DIGITS}:method=full;variant=T/2"],
    1,
    "method='full;variant=T/2' must be one of",
  ),
  "no method": ([f"{DIGITS}:method="], 1, "method='' must be one of"),
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
  "photographs that are nowhere": (
    [*FOLDER, "--config.data.data_dir={tmp}/none"],
    1,
    "is no file or",
  ),
  "photographs without one": ([*FOLDER, "--config.data.data_dir={tmp}/empty"], 1, "no images"),
  "array file that is a directory": (
    [*NPZ, "--config.data.data_dir={tmp}/empty"],
    1,
    "an empty directory",
  ),
  "array file that is nowhere": ([*NPZ, "--config.data.data_dir={tmp}/none"], 1, "is no file or"),
  "array file that is text": ([*NPZ, "--config.data.data_dir={tmp}/file"], 1, "is not an .npz"),
  "array file without a name": ([*NPZ], 1, "needs config.data.data_dir"),
  # Other modes.
  "analysis before training": (["--mode=analyze"], 1, "is not the workdir of a run"),
  "unknown section": (
    ["--mode=analyze", "--config.analysis.sections=('rank',)"],
    1,
    "=('rank',) must be some of flops",
  ),
  "gradients of no examples": (
    ["--mode=analyze", "--config.analysis.batch_sizes=()"],
    1,
    "analysis.batch_sizes=() must end above 1",
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
    "from 1 to 2**31 - 1",
  ),
  "unknown extractor": (
    ["--mode=evaluate", "--config.evaluation.extractors=('fid',)"],
    1,
    "extractors=('fid',) must be some of",
  ),
  "no draws": (
    ["--mode=evaluate", "--config.evaluation.draws=0"],
    1,
    "draws=0 must be a whole number from 1",
  ),
  "too few features": (
    ["--mode=evaluate", "--config.evaluation.max_features=3"],
    1,
    "max_features=3 must be a whole number from 10",
  ),
  "unknown reference": (
    ["--mode=evaluate", "--config.evaluation.reference_split=test"],
    1,
    "reference_split='test' must be one of",
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
  "report as a dry run": (["--workdirs=a", "--dry_run"], 2, "--dry_run is not used by"),
  "report with a field": (["--workdirs=a", "--config.seed=3"], 2, "does not take: remove it"),
  "report on what is nowhere": (["--workdirs={tmp}/none"], 1, "{tmp}/none is not the workdir of a"),
  "report on a file": (["--workdirs={tmp}/file"], 1, "{tmp}/file is not the workdir of a run"),
  "report on no run": (["--workdirs={tmp}/empty"], 1, "{tmp}/empty is not the workdir of a run"),
}


@pytest.fixture
def places(tmp_path):
  """What the mistakes name."""
  (tmp_path / "file").write_text("words\n")
  (tmp_path / "empty").mkdir()
  (tmp_path / "flags.bin").write_bytes(b"--config.seed=\xff\n")
  return tmp_path


@pytest.mark.parametrize(("flags", "status", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_ends_in_one_line(flags, status, words, places, capsys, monkeypatch):
  flags = [CIFAR if flag == "--twice" else flag for flag in flags]
  assert_tiny_mistake(capsys, monkeypatch, flags, status, words, places)


@pytest.mark.parametrize(("flags", "status", "words"), REPORTS.values(), ids=REPORTS.keys())
def test_a_mistaken_report_ends_in_one_line(flags, status, words, places, capsys, monkeypatch):
  assert_mistake(capsys, monkeypatch, [*REPORT, *flags], status, words, places)


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
