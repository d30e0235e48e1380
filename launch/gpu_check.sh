#!/usr/bin/env bash
# Checks and times lrdit on one GPU in at most 9 minutes; --help explains the parts and options.
# Usage: [OUTPUT=runs/gpu_check] [PYTHON=python3] bash launch/gpu_check.sh [--minutes=M]
#   [--parts=tests,b2,xl2,cifar10] [--dry_run] [--config.data.data_dir=PATH ...]
# PYTHON is that of an environment with the GPU's jax and what setup.cfg lists.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m tests.benchmarks.gpu_check \
  --output="$(realpath --canonicalize-missing "${OUTPUT:-runs/gpu_check}")" "$@"
