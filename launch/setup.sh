#!/usr/bin/env bash
# Makes .venv in the checkout, or reuses it, with the pinned package and its tests.
# Usage: source launch/setup.sh (from another launch script, in the checkout's root)
set -euo pipefail

python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  for candidate in python3.11 python3.12 python3.13 python3; do
    # The pinned tensorflow, which preparing datasets needs, ends at 3.13.
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
      2>/dev/null; then
      python="$candidate"
      break
    fi
  done
fi
if [[ -z "$python" ]]; then
  echo "error: no Python 3.11 to 3.13 was found: install one, or name it by PYTHON=..." >&2
  exit 1
fi

# Whatever the environment was made from; if any of it changes, it is made anew.
stamp="$("$python" --version) $(cat setup.cfg pyproject.toml launch/constraints.txt | sha256sum)"
if [[ "$(cat .venv/lrdit-stamp 2>/dev/null)" != "$stamp" ]]; then
  echo "Making the virtual environment .venv (about a minute) ..."
  rm -rf .venv
  "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint launch/constraints.txt --editable '.[tensorboard,test]'
  echo "$stamp" > .venv/lrdit-stamp
fi
source .venv/bin/activate
