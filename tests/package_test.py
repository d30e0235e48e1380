"""The package as others get it: a wheel, and the environment that launch/setup.sh makes."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

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
    modules = {n for n in wheel.namelist() if n.endswith(".py")}
  assert modules == {f"lrdit/{path.name}" for path in (tiny.ROOT / "lrdit").glob("*.py")}

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
