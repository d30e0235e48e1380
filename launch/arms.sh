#!/usr/bin/env bash
# What the other scripts share: help, main.py's errors, the three arms one after another.
# Usage: source launch/arms.sh (from another launch script; does not change directory)
#
# An arm whose run is there is skipped without starting jax: config.json holds the config
# asked for, the checkpoints reach training.num_steps, the export was drawn from the newest
# one with the settings asked for, and evaluation.json is of that export. If anything
# differs, main.py decides: training goes on from its newest checkpoint, or ends at once;
# then come sampling and evaluation, if they are what differs.
set -euo pipefail
trap 'exit 130' INT
trap 'exit 143' TERM
root="$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")"

# How main.py begins the line of an error, in whichever of several processes. It is a mistake of
# the user's, unless it only says that the others are gone: then starting all again mends it.
readonly ERROR_LINE='((a process|process [0-9]+): )?error: '
readonly OTHERS_GONE='error: (another process has ended|the other processes cannot be reached)'

# The comment at the head of the script that was called.
print_help() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

usage_error() {
  echo "error: $1" >&2
  print_help | grep '^Usage:' >&2
  exit 2
}

# Arguments: those of the script.
check_arguments() {
  local argument
  for argument in "$@"; do
    case "$argument" in
      -h | --help)
        print_help
        exit 0
        ;;
      --config.method=*) usage_error "$argument: every method is run, one after another" ;;
      --config.vae.latents_dir=*) usage_error "$argument: name the directory by LATENTS=DIR" ;;
      --config.*=*) ;;
      *) usage_error "'$argument' is not of the form --config.GROUP.FIELD=VALUE" ;;
    esac
  done
}

# As check_arguments, for scripts that name the seeds and share a classifier.
# Arguments: those of the script.
check_digits_arguments() {
  local argument
  check_arguments "$@"
  for argument in "$@"; do
    case "$argument" in
      --config.seed=*) usage_error "$argument: name the seeds by SEEDS=\"0 1 2\"" ;;
      --config.evaluation.features_dir=*) usage_error "$argument: one directory serves all arms" ;;
    esac
  done
}

# Arguments: those of the script.
require_vae() {
  local argument
  for argument in "$@"; do
    if [[ "$argument" == --config.vae.path=?* ]]; then
      return
    fi
  done
  usage_error "--config.vae.path=VAE is missing"
}

# The environment; then back to where the user is, whom relative paths are relative to.
enter_environment() {
  local caller="$PWD"
  cd "$root"
  # shellcheck source=launch/setup.sh
  source launch/setup.sh
  cd "$caller"
}

# Encodes the images unless that is finished.
# Arguments: dataset, directory of the latents, overrides.
encode_images() {
  local dataset="$1" latents="$2"
  shift 2
  if [[ -e "$latents/manifest.json" && ! -e "$latents/progress.json" ]]; then
    echo "== $dataset: the latents under $latents are there" >&2
    return
  fi
  echo "== $dataset: encode into $latents" >&2
  python "$root/main.py" --config="$root/configs/$dataset.py" --mode=encode \
    --output="$latents" "$@"
}

# Prints the modes an arm still needs, one a line.
# Arguments: workdir, flags of main.py.
remaining_modes() {
  python - "$root" "$@" <<'EOF'
import json, pathlib, sys

root, workdir, *flags = sys.argv[1:]
sys.path.insert(0, root)
import main  # jax is not imported by parsing flags
from lrdit.runtime.errors import UserError
from lrdit.runtime.workdir import PROCESS_FIELDS

workdir = pathlib.Path(workdir)


def read(path):
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError):
    return {}


def differs(wanted, stored):
  if not isinstance(wanted, dict):
    return wanted != stored
  return not isinstance(stored, dict) or wanted.keys() != stored.keys() or any(
    differs(value, stored[key]) for key, value in wanted.items()
  )


stored = read(workdir / "config.json")
try:
  wanted = main.parse_flags(["main.py", f"--workdir={workdir}", *flags]).config.to_dict()
except UserError:  # main.py tells it when it is started to train
  wanted = {}
wanted = json.loads(json.dumps(wanted))
# Filled in before they are stored: the variant's sizes, and r(t) from an analysis.
filled_in = {
  "model": ("hidden_size", "depth", "num_heads", "patch_size"),
  "rank": ("measured_shares", "measured_boundaries"),
}
for group, fields in filled_in.items():
  for field in fields:
    if not wanted.get(group, {}).get(field, True):
      wanted[group][field] = stored.get(group, {}).get(field)

# How its process computes is no part of a run, but samples and losses are of a dtype.
dtype = wanted.get("model", {}).get("dtype")
for group, field in (name.split(".") for name in PROCESS_FIELDS):
  for config in (wanted, stored):
    config.get(group, {}).pop(field, None)

steps = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
step = max(steps, default=0)
if not stored or differs(wanted, stored) or step < stored["training"]["num_steps"]:
  print("train\nsample\nevaluate")
  sys.exit()

sampling = stored["sampling"]
export = workdir / "samples" / sampling["name"]
metadata = read(export / "metadata.json")
drawn_as = {
  field: sampling[field]
  for field in ("num_samples", "solver", "num_steps", "eta", "guidance_scale", "clip_x_0", "seed")
} | {
  "checkpoint_step": step,
  "dtype": dtype,
  "weights": "ema" if sampling["use_ema"] else "raw",
  "labels": sampling["labels"] if stored["data"]["num_classes"] else None,
}
exported = (
  (export / "samples.npz").exists()
  and all(field in metadata and metadata[field] == drawn_as[field] for field in drawn_as)
  and (export / "png").exists() >= sampling["png_files"]
)
if not exported:
  print("sample\nevaluate")
  sys.exit()
# The figures of an export hold its metadata, down to the seconds it took.
evaluation = read(workdir / "evaluation.json")
figures = evaluation.get("samples", {}).get(sampling["name"], {})
if (
  evaluation.get("checkpoint_step") != step
  or evaluation.get("held_out", {}).get("dtype") != dtype
  or evaluation.get("settings") != stored["evaluation"]
  or not set(stored["evaluation"]["extractors"]) <= set(figures.get("extractors", {}))
  or (figures and figures["metadata"] != metadata)
):
  print("evaluate")
EOF
}

# Fails if training was stopped, which main.py counts as success.
# Arguments: workdir.
require_trained() {
  python - "$1" <<'EOF'
import json, pathlib, sys

workdir = pathlib.Path(sys.argv[1])
num_steps = json.loads((workdir / "config.json").read_text())["training"]["num_steps"]
steps = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
if max(steps, default=0) < num_steps:
  sys.exit(
    f"error: training was stopped before its end ({workdir}): run the same command again to go on"
  )
EOF
}

# Trains, samples and evaluates one arm, as far as that is not done.
# Arguments: name, workdir, flags of main.py.
run_arm() {
  local name="$1" workdir="$2" modes mode
  shift 2
  modes="$(remaining_modes "$workdir" "$@")"
  if [[ -z "$modes" ]]; then
    echo "== $name: finished, under $workdir" >&2
    return
  fi
  for mode in train sample evaluate; do
    if [[ "$modes" != *"$mode"* ]]; then
      continue
    fi
    echo "== $name: $mode" >&2
    python "$root/main.py" "$@" --workdir="$workdir" --mode="$mode"
    if [[ "$mode" == train ]]; then
      require_trained "$workdir"
      modes="$(remaining_modes "$workdir" "$@")" # training stored the config asked for
    fi
  done
}

# One arm on the digits, under $runs; adds its workdir to the array workdirs.
# Arguments: name, seed, method, overrides.
run_digits() {
  local name="$1" seed="$2" method="$3" workdir="$runs/digits_$1_$2"
  shift 3
  # One classifier for all, so that their figures can be compared.
  run_arm "digits, $name, seed $seed" "$workdir" \
    --config="$root/configs/digits.py:method=$method" "$@" --config.seed="$seed" \
    --config.evaluation.features_dir="$runs/digits_features"
  workdirs+=("$workdir")
}

# Arguments: workdirs.
print_losses() {
  python - "$@" <<'EOF'
import json, pathlib, sys

workdirs = [pathlib.Path(workdir) for workdir in sys.argv[1:]]
print(f"\n{'arm':<10}{'step':>9}{'held-out loss':>15}  samples")
for workdir in workdirs:
  evaluation = json.loads((workdir / "evaluation.json").read_text())
  sampling = json.loads((workdir / "config.json").read_text())["sampling"]
  arm = workdir.name.rpartition("_")[2]
  print(
    f"{arm:<10}{evaluation['checkpoint_step']:>9}{evaluation['held_out']['ema']['loss']:>15.5f}  "
    f"{workdir / 'samples' / sampling['name']}"
  )
EOF
}

# All arms, and their losses.
# Arguments: dataset, further arguments of its config (",key=value" or ""), overrides.
run_arms() {
  local dataset="$1" config_arguments="$2" runs method workdirs=()
  shift 2
  runs="$(realpath --canonicalize-missing "${RUNS:-runs}")"
  for method in full static adaptive; do
    workdirs+=("$runs/${dataset}_$method")
    run_arm "$dataset, $method" "$runs/${dataset}_$method" \
      --config="$root/configs/$dataset.py:method=$method$config_arguments" "$@"
  done
  print_losses "${workdirs[@]}"
}
