#!/usr/bin/env bash
# Makes .venv in the checkout, or reuses it, with the pinned package and its tests, from the newest
# supported Python that works or from PYTHON=... Few of its modules are ever imported, so that none
# is compiled beforehand. Sets `root`, the checkout, and `constraints`, the file of pins.
# Usage: source launch/setup.sh
set -euo pipefail
root="$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")"

# Prints "3.13 PATH FULL-VERSION" of a Python that is supported and can make an environment.
describe_python() {
  # The pinned tensorflow, which preparing datasets needs, ends at 3.13.
  "$1" -c 'import ensurepip, sys, venv
version = sys.version_info[:2]
print("%d.%d" % version, sys.executable, sys.version)
sys.exit(not (3, 11) <= version < (3, 14))' 2>/dev/null
}

python=""
for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
  if described="$(describe_python "$candidate")"; then
    python="$candidate"
    break
  fi
done
if [[ -z "$python" ]]; then
  echo "error: ${PYTHON:+PYTHON=$PYTHON: }no Python 3.11 to 3.13 with venv and ensurepip was found:" \
    "install one, or name it by PYTHON=..." >&2
  exit 1
fi
constraints="$root/launch/constraints.txt"
if [[ "$described" == "3.11 "* ]]; then
  constraints="$root/launch/constraints-py311.txt" # jax 0.11 and later need 3.12
fi

# The environment is made anew if anything it was made from changes.
made_from="$(cd "$root" && cat setup.cfg pyproject.toml lrdit/__init__.py "$constraints" | sha256sum)"
if [[ "$(cat "$root/.venv/lrdit-stamp" 2>/dev/null)" != "$described $made_from" ]]; then
  echo "Making the virtual environment .venv of Python ${described%% *} (about a minute) ..."
  rm -rf "$root/.venv"
  "$python" -m venv "$root/.venv"
  "$root/.venv/bin/python" -m pip install --no-compile --quiet --disable-pip-version-check \
    --constraint "$constraints" --editable "$root[tensorboard,test]"
  echo "$described $made_from" >"$root/.venv/lrdit-stamp"
fi
source "$root/.venv/bin/activate"
