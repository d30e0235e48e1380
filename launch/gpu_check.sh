#!/usr/bin/env bash
# Checks and times lrdit on one GPU in at most 9 minutes: the tests marked `gpu`; the benchmark of
# DiT-B/2 and DiT-XL/2 on latents in bfloat16; short runs of every arm of DiT-S/2 on CIFAR-10.
# Usage: [OUTPUT=DIR] [PYTHON=PROGRAM] bash launch/gpu_check.sh [--minutes=M] [--dry_run]
#   [--parts=tests,b2,xl2,cifar10] [--config.data.name=NAME --config.data.data_dir=PATH ...]
#
# OUTPUT         where JSON, logs and workdirs go (default runs/gpu_check)
# PYTHON         of the environment with the GPU's jax (default python3). Where it lacks what
#                setup.cfg lists and has no network, bring wheels along (pip download), install them
#                by pip install --no-index --no-deps --target DIR, and put DIR on PYTHONPATH
# --minutes      what all parts together may take (default 9); each has its share
# --parts        some of them
# --dry_run      all of it on a CPU with tiny shapes and images of noise
# --config.*     the photographs, and other overrides of the short runs, which are left out
#                where no --config.data.data_dir is given
#
# Each part writes OUTPUT/PART.json as soon as it is done, and the end of one loses nothing of
# the others. The last thing printed is one table of all that is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m tests.benchmarks.gpu_check \
  --output="$(realpath --canonicalize-missing "${OUTPUT:-runs/gpu_check}")" "$@"
