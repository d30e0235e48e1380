#!/usr/bin/env bash
# Runs lint and the test suite in the checkout's own environment.
# Usage: bash launch/test.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
ruff check .
ruff format --check .
python -m pytest --numprocesses auto --dist worksteal "$@"
