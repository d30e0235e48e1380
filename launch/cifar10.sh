#!/usr/bin/env bash
# CIFAR-10: trains, samples and evaluates the arms full, static and adaptive, one after another.
# Usage: [RUNS=DIR] bash launch/cifar10.sh [--config.GROUP.FIELD=VALUE ...]
#
# RUNS           where the workdirs cifar10_full, _static and _adaptive go (default runs)
# --config.*     overrides for every arm; configs/common.py lists the fields
#
# The images must be there: see configs/cifar10.py.
# Relative directories are relative to where you are.
# Ctrl-C, or SIGTERM to the process group, stops it; the same command goes on, and leaves
# alone what is finished. A higher training.num_steps prolongs finished arms.
set -euo pipefail
# shellcheck source=launch/arms.sh
source "$(dirname "${BASH_SOURCE[0]}")/arms.sh"

check_arguments "$@"
enter_environment
run_arms cifar10 "" "$@"
