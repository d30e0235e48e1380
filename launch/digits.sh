#!/usr/bin/env bash
# The three arms on the digits, three seeds each: trained, sampled, evaluated and reported.
# Run again, it goes on where it was and repeats nothing. About 45 minutes on 2 cores.
# Usage: bash launch/digits.sh [--config.GROUP.FIELD=VALUE ...]
# Environment: RUNS=DIR (default runs) for digits_ARM_SEED and digits_report;
#   SEEDS="0 1 2".
set -euo pipefail
# shellcheck source=launch/arms.sh
source "$(dirname "${BASH_SOURCE[0]}")/arms.sh"
check_arguments "$@"
for argument in "$@"; do
  case "$argument" in
    --config.seed=*) usage_error "$argument: name the seeds by SEEDS=\"0 1 2\"" ;;
    --config.evaluation.features_dir=*) usage_error "$argument: one directory serves all arms" ;;
  esac
done
enter_environment

runs="$(realpath --canonicalize-missing "${RUNS:-runs}")"
workdirs=()
for seed in ${SEEDS:-0 1 2}; do
  for method in full static adaptive; do
    workdir="$runs/digits_${method}_$seed"
    # One classifier for all, so that their figures can be compared.
    run_arm "digits, $method, seed $seed" "$workdir" \
      --config="$root/configs/digits.py:method=$method" "$@" --config.seed="$seed" \
      --config.evaluation.features_dir="$runs/digits_features"
    workdirs+=("$workdir")
  done
done
python "$root/main.py" --mode=report --output="$runs/digits_report" \
  --workdirs="$(IFS=, && echo "${workdirs[*]}")"
