#!/usr/bin/env bash
# Rank schedules on the digits at equal mean rank: r(t) measured on the full arm of the first seed,
# logistic_decreasing, increasing and constant, beside the full and static arms; all trained,
# sampled, evaluated and reported. What launch/digits.sh has run of it is used. Run again, it goes
# on where it was and repeats nothing. About 70 minutes on 2 cores.
# Usage: bash launch/schedules.sh [--config.GROUP.FIELD=VALUE ...]
# Environment: RUNS=DIR (default runs) for digits_ARM_SEED and digits_schedules;
#   SEEDS="0 1 2".
set -euo pipefail
# shellcheck source=launch/arms.sh
source "$(dirname "${BASH_SOURCE[0]}")/arms.sh"
check_digits_arguments "$@"
for argument in "$@"; do
  case "$argument" in
    --config.rank.schedule=* | --config.rank.analysis=* | --config.rank.measured_*)
      usage_error "$argument: every schedule is run, one after another"
      ;;
  esac
done
enter_environment

runs="$(realpath --canonicalize-missing "${RUNS:-runs}")"
read -ra seeds <<<"${SEEDS:-0 1 2}"
workdirs=()
for seed in "${seeds[@]}"; do
  run_digits full "$seed" full "$@"
  run_digits static "$seed" static "$@"
done

# One r(t) for all seeds, or they would be different arms.
measured="$runs/digits_full_${seeds[0]}"
echo "== digits, full, seed ${seeds[0]}: analyze" >&2
python "$root/main.py" --config="$root/configs/digits.py:method=full" "$@" \
  --config.seed="${seeds[0]}" --config.evaluation.features_dir="$runs/digits_features" \
  --workdir="$measured" --mode=analyze

for seed in "${seeds[@]}"; do
  run_digits measured "$seed" adaptive "$@" --config.rank.schedule=measured \
    --config.rank.analysis="$measured/analysis/truncation.json"
  run_digits adaptive "$seed" adaptive "$@" # logistic_decreasing
  for schedule in increasing constant; do
    run_digits "$schedule" "$seed" adaptive "$@" --config.rank.schedule="$schedule"
  done
done
python "$root/main.py" --mode=report --output="$runs/digits_schedules" \
  --workdirs="$(IFS=, && echo "${workdirs[*]}")"
