#!/usr/bin/env bash
# Lint and the whole test suite, in the checkout's own environment.
# Usage: bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

ruff check .
ruff format --check .
python -m pytest --numprocesses auto --dist worksteal "$@"
