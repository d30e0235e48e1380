"""The package as others get it: a wheel, and the environment that launch/setup.sh makes."""

import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import scripts, tiny

SOURCES = ("LICENSE", "README.md", "lrdit", "pyproject.toml", "setup.cfg")
BUILD = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"


def run(*words, cwd, **environment):
  done = subprocess.run(
    [str(word) for word in words],
    cwd=cwd,
    env=os.environ | {"PYTHONPATH": ""} | environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_a_wheel_trains_outside_the_checkout(tmp_path):
  """main.py and configs/ are the user's own, copied from the checkout; lrdit is the wheel's."""
  source, user = (scripts.copy_checkout(tmp_path / n, *f) for n, f in FILES.items())
  name = run(sys.executable, "-c", BUILD, cwd=source).split()[-1]
  with zipfile.ZipFile(source / name) as wheel:
    packed = {n for n in wheel.namelist() if n.startswith("lrdit/")}
  sources = [path for ending in ("py", "j2") for path in (tiny.ROOT / "lrdit").rglob(f"*.{ending}")]
  assert packed == {str(path.relative_to(tiny.ROOT)) for path in sources}

  environment = tmp_path / "environment"
  run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
  python = environment / "bin" / "python"
  where = ["-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
  site = run(python, *where, cwd=tmp_path).strip()
  pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
  run(*pip, "install", "--quiet", "--no-deps", "--no-index", source / name, cwd=tmp_path)
  # What the package needs is this environment's; a path file in there is not followed.
  with open(f"{site}/dependencies.pth", "w") as file:
    file.write(sysconfig.get_path("purelib"))

  looks = "import lrdit, sys; print(lrdit.__file__, lrdit.__version__, 'jax' in sys.modules)"
  version = name.split("-")[1]
  assert run(python, "-c", looks, cwd=user).split() == [
    f"{site}/lrdit/__init__.py",
    version,
    "False",
  ]
  flags = tiny.command(tmp_path / "run", "--config.training.num_steps=2")[1:]
  run(python, *flags, cwd=user, JAX_NUM_CPU_DEVICES="1")
  assert [line["step"] for line in tiny.read_metrics(tmp_path / "run")] == [1, 2]


FILES = {"source": SOURCES, "user": ("configs", "main.py")}


def test_the_package_is_one_directory():
  """A package without __init__.py would take modules of every checkout on the path."""
  import lrdit

  assert list(lrdit.__path__) == [str(tiny.ROOT / "lrdit")]
  assert lrdit.__spec__.origin == str(tiny.ROOT / "lrdit" / "__init__.py")


FAKE_PYTHON = """#!/bin/bash
case "$1 $2" in
  -c*) echo "{version} $0 {version}.1 (fake)"; exit {status} ;;
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; touch "$3/bin/activate" ;;
  "-m pip") echo "{version} $*" >> made ;;
esac
"""
MISSING, UNSUPPORTED = 127, 1  # as a shim of pyenv that names no installed version, and any other


def make_environment(root, found, **environment):
  """Sources launch/setup.sh where some Pythons are found; returns (process, lines of pip)."""
  path = root / "fakes"
  shutil.rmtree(path, ignore_errors=True)
  path.mkdir()
  for name in ("python3.14", "python3.13", "python3.12", "python3.11", "python3"):
    version, status = found.get(name, ("", MISSING))
    (path / name).write_text(FAKE_PYTHON.format(version=version, status=status))
    (path / name).chmod(0o755)
  (root / "made").write_text("")
  done = subprocess.run(
    ["bash", "-c", 'source launch/setup.sh && echo "$constraints"'],
    cwd=root,
    env={"PATH": f"{path}:/usr/bin:/bin", **environment},
    capture_output=True,
    text=True,
    check=False,
  )
  return done, (root / "made").read_text().splitlines()


@pytest.fixture
def checkout(tmp_path):
  root = scripts.copy_checkout(tmp_path / "checkout", "launch", "lrdit", *SOURCES[-2:])
  shutil.copy(tiny.ROOT / "launch" / "setup.sh", root / "launch")
  return root


WORKING = {f"python3.{n}": (f"3.{n}", 0) for n in (11, 12, 13)}
OLD, NEW = "launch/constraints-py311.txt", "launch/constraints.txt"


@pytest.mark.parametrize(
  ("found", "environment", "version", "constraints"),
  [
    (WORKING, {}, "3.13", NEW),
    (WORKING | {"python3.13": ("", MISSING)}, {}, "3.12", NEW),
    (WORKING | {"python3.13": ("3.13", UNSUPPORTED)}, {}, "3.12", NEW),  # without ensurepip
    ({"python3.11": ("3.11", 0), "python3": ("3.12", 0)}, {}, "3.11", OLD),
    ({"python3": ("3.12", 0)}, {}, "3.12", NEW),
    (WORKING, {"PYTHON": "python3.11"}, "3.11", OLD),
  ],
)
def test_the_newest_python_that_works_is_taken_with_its_pins(
  checkout, found, environment, version, constraints
):
  done, (made,) = make_environment(checkout, found, **environment)
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout.splitlines()[-1] == constraints
  assert made.startswith(f"{version} -m pip install")
  assert f"--constraint {constraints} " in made


@pytest.mark.parametrize(
  ("found", "environment", "words"),
  [
    ({}, {}, "no Python 3.11 to 3.13 was found"),
    ({"python3": ("3.14", UNSUPPORTED)}, {}, "no Python 3.11 to 3.13 was found"),
    (WORKING, {"PYTHON": "python3.14"}, "PYTHON=python3.14 is no Python 3.11 to 3.13"),
    (WORKING, {"PYTHON": "/nowhere"}, "PYTHON=/nowhere is no Python 3.11 to 3.13"),
  ],
)
def test_no_python_is_one_line(checkout, found, environment, words):
  done, made = make_environment(checkout, found, **environment)
  assert (done.returncode, done.stdout, made) == (1, "", [])
  (line,) = done.stderr.splitlines()
  assert line.startswith(f"error: {words}")


def test_an_environment_is_made_again_if_what_it_is_made_from_changes(checkout):
  def versions(**environment):
    done, made = make_environment(checkout, WORKING, **environment)
    assert done.returncode == 0, done.stderr
    return [line.split()[0] for line in made]

  assert [versions(), versions()] == [["3.13"], []]
  with (checkout / OLD).open("a") as file:
    file.write("# other pins, of another Python\n")
  assert versions() == []
  assert versions(PYTHON="python3.12") == ["3.12"]
  with (checkout / NEW).open("a") as file:
    file.write("# other pins\n")
  assert versions(PYTHON="python3.12") == ["3.12"]


@pytest.mark.parametrize("file", [OLD, NEW])
def test_every_requirement_is_pinned_to_a_version_it_allows(file):
  pins = dict(
    line.split("==") for line in (tiny.ROOT / file).read_text().splitlines() if "==" in line
  )
  pins = {canonicalize_name(name): version for name, version in pins.items()}
  parser = configparser.ConfigParser()
  parser.read(tiny.ROOT / "setup.cfg")
  extras = parser["options.extras_require"]
  lines = [parser["options"]["install_requires"], extras["tensorboard"], extras["test"]]
  requirements = [
    Requirement(line) for line in "\n".join(lines).splitlines() if line and not line.startswith("#")
  ]
  assert len(requirements) > 20
  for requirement in requirements:
    assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement
