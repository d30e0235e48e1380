#!/usr/bin/env bash
# Makes .venv in the checkout, or reuses it, with the pinned package and its tests, by the newest
# supported Python that works, or by PYTHON=... Sets `constraints`, the file of its pins.
# Usage: source launch/setup.sh (from another launch script, in the checkout's root)
set -euo pipefail

# Prints "3.13 PATH FULL-VERSION" of a Python that is supported and can make an environment.
describe_python() {
  # The pinned tensorflow, which preparing datasets needs, ends at 3.13.
  "$1" -c 'import ensurepip, sys, venv
version = sys.version_info[:2]
print("%d.%d" % version, sys.executable, sys.version)
sys.exit(not (3, 11) <= version < (3, 14))' 2>/dev/null
}

python="${PYTHON:-}"
if [[ "$python" ]]; then
  if ! described="$(describe_python "$python")"; then
    echo "error: PYTHON=$python is no Python 3.11 to 3.13 that can make an environment" \
      "(with venv and ensurepip): name another, or leave PYTHON unset" >&2
    exit 1
  fi
else
  for candidate in python3.13 python3.12 python3.11 python3; do
    if described="$(describe_python "$candidate")"; then
      python="$candidate"
      break
    fi
  done
fi
if [[ -z "$python" ]]; then
  echo "error: no Python 3.11 to 3.13 was found: install one, or name it by PYTHON=..." >&2
  exit 1
fi
constraints=launch/constraints.txt
if [[ "$described" == "3.11 "* ]]; then
  constraints=launch/constraints-py311.txt # jax 0.11 and later need 3.12
fi

# Whatever the environment was made from; if any of it changes, it is made anew.
stamp="$described $(cat setup.cfg pyproject.toml lrdit/__init__.py "$constraints" | sha256sum)"
if [[ "$(cat .venv/lrdit-stamp 2>/dev/null)" != "$stamp" ]]; then
  echo "Making the virtual environment .venv of Python ${described%% *} (about a minute) ..."
  rm -rf .venv
  "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint "$constraints" --editable '.[tensorboard,test]'
  echo "$stamp" > .venv/lrdit-stamp
fi
source .venv/bin/activate
