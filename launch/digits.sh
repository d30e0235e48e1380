#!/usr/bin/env bash
# The three arms on the digits, three seeds each: trained, sampled, evaluated and reported.
# Run again, it goes on where it was and repeats nothing. About 45 minutes on 2 cores.
# Usage: bash launch/digits.sh [--config.GROUP.FIELD=VALUE ...]
# Environment: RUNS=DIR (default runs) for digits_ARM_SEED and digits_report;
#   SEEDS="0 1 2".
set -euo pipefail
# shellcheck source=launch/arms.sh
source "$(dirname "${BASH_SOURCE[0]}")/arms.sh"
check_digits_arguments "$@"
enter_environment

runs="$(realpath --canonicalize-missing "${RUNS:-runs}")"
workdirs=()
for seed in ${SEEDS:-0 1 2}; do
  for method in full static adaptive; do
    run_digits "$method" "$seed" "$method" "$@"
  done
done
python "$root/main.py" --mode=report --output="$runs/digits_report" \
  --workdirs="$(IFS=, && echo "${workdirs[*]}")"
