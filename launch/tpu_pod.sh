#!/usr/bin/env bash
# One run on all hosts of a TPU VM: installs this checkout there, runs main.py on every host,
# and starts it again after a failure or a preemption.
# Usage: TPU=NAME ZONE=ZONE [ACCELERATOR=TYPE] [PREPARE=COMMAND] bash launch/tpu_pod.sh --config=FILE --workdir=DIR [main.py flags ...]
#
# TPU, ZONE      the TPU VM; the project is gcloud's (CLOUDSDK_CORE_PROJECT)
# ACCELERATOR    v4-32, say: makes the TPU VM, as a spot one, if gcloud says that there is none, and
#                DELETES and makes it again when it was preempted; without it, it must be there
# VERSION        the image it is made of (default tpu-ubuntu2204-base)
# PREPARE        command run on every host once, after the installation: mounts disks, for example
# RESTARTS       how often main.py is started again on a TPU VM that is still there (default 3)
# RETRY_SECONDS  how long to wait before that, and before each try to make the TPU VM (default 60)
#
# The workdir must be an absolute path on a disk that outlives the TPU VM (Filestore, say, which
# PREPARE mounts); the data must be readable on every host. Hosts need access to the internet to
# install Python and the packages. main.py finds its cluster by itself.
# Run this where it can go on, in tmux say: if it is killed, main.py may run on; the same command
# stops that first. SIGTERM or Ctrl-C ends main.py (a training saves first); the same command goes
# on. While gcloud cannot tell of the TPU VM (no network, say), nothing is made or deleted: it is
# asked again. After a mistake of the user's (an error: line of any process) all is over.
set -euo pipefail
# shellcheck source=launch/arms.sh
source "$(dirname "${BASH_SOURCE[0]}")/arms.sh"

workdir="" mode=train
for argument in "$@"; do
  case "$argument" in
    -h | --help)
      print_help
      exit 0
      ;;
    --workdir=?*) workdir="${argument#*=}" ;;
    --mode=*) mode="${argument#*=}" ;;
  esac
done
if [[ -z "${TPU:-}" || -z "${ZONE:-}" ]]; then
  usage_error "TPU and ZONE are missing"
fi
if [[ "$workdir" != /* ]]; then
  usage_error "--workdir=DIR is missing or not an absolute path"
fi

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

tpu_vm() {
  gcloud compute tpus tpu-vm "$@" --zone="$ZONE" --quiet
}

# Arguments: worker (a number, or all), command.
on_hosts() {
  tpu_vm ssh "$TPU" --worker="$1" --command="bash -euo pipefail -c $(printf '%q' "$2")"
}

# Ends what runs, or what an earlier start left: asks it to, then kills it.
# shellcheck disable=SC2016  # the hosts expand it
readonly STOP='
pid="$(cat lrdit/main.pid 2>/dev/null || true)"
is_running() { [[ "$pid" ]] && grep -qsa main.py "/proc/$pid/cmdline"; }
if is_running; then kill -TERM "$pid"; fi
for ((i = 0; i < 60; i++)); do
  if ! is_running; then exit 0; fi
  sleep 1
done
kill -KILL "$pid"
'

# setup.sh needs a newer Python than the image's.
# shellcheck disable=SC2016
readonly INSTALL='
mkdir -p lrdit
tar -xzf lrdit.tar.gz -C lrdit
python3 -m pip install --quiet --user uv
uv="$(python3 -m site --user-base)/bin/uv"
"$uv" python install --quiet 3.12
export PYTHON="$("$uv" python find 3.12)"
cd lrdit
source launch/setup.sh
pip install --quiet --constraint launch/constraints.txt "jax[tpu]"
'

install() {
  echo "== $TPU: install" >&2
  tar -czf "$scratch/lrdit.tar.gz" --exclude=__pycache__ -C "$root" \
    LICENSE README.md configs launch lrdit main.py pyproject.toml setup.cfg &&
    tpu_vm scp "$scratch/lrdit.tar.gz" "$TPU:lrdit.tar.gz" --worker=all &&
    on_hosts all "$STOP" &&
    on_hosts all "$INSTALL" &&
    on_hosts all "${PREPARE:-true}"
}

# Arguments: flags of main.py.
run_processes() {
  rm -f "$scratch/errors"
  on_hosts all "cd lrdit
source .venv/bin/activate
echo \$\$ > main.pid
exec python main.py $(printf '%q ' "$@")" 2>&1 |
    (
      trap '' HUP INT TERM
      exec sed -u -E -e "/$OTHERS_GONE/b" -e "/^$ERROR_LINE/w $scratch/errors"
    )
}

is_trained() {
  on_hosts 0 "cd lrdit
source .venv/bin/activate
source launch/arms.sh
require_trained $(printf '%q' "$workdir")"
}

stop_signal=""
trap 'stop_signal="${stop_signal:-130}"' INT
trap 'stop_signal="${stop_signal:-143}"' TERM HUP

# Runs main.py on all hosts; a signal to this script ends it there.
# Arguments: flags of main.py.
supervise() {
  local running result told=""
  # Waiting again for what has been waited for gives 127.
  run_processes "$@" &
  running=$!
  while true; do
    result=0
    wait "$running" || result=$?
    if ((result != 127)); then
      status=$result
    fi
    if [[ "$stop_signal" && -z "$told" ]]; then
      told=yes
      echo "== $TPU: main.py is asked to end" >&2
      on_hosts all "$STOP" || true
    elif ! kill -0 "$running" 2>/dev/null; then
      break
    fi
  done
}

# Sets `state`, "not there" if gcloud says so: fails if it cannot tell.
describe() {
  if state="$(tpu_vm describe "$TPU" --format='value(state)' 2>"$scratch/describe")"; then
    seen=yes
  elif grep -q "NOT_FOUND: .*/nodes/$TPU\b" "$scratch/describe"; then
    state="not there"
  else
    cat "$scratch/describe" >&2
    return 1
  fi
}

# Makes the TPU VM, unless it is there: fails until then.
make_tpu() {
  local state
  if ! describe; then
    if [[ "$seen" || "$stop_signal" ]]; then
      echo "== $TPU cannot be looked up: it is left as it is" >&2
      return 1
    fi
    echo "error: $TPU cannot be looked up: see gcloud's message above; check TPU, ZONE, the" \
      "project and the login, then run the same command again" >&2
    exit 1
  fi
  case "$state" in
    READY) return 0 ;;
    "not there" | PREEMPTED | TERMINATED) ;;
    STOPPED)
      echo "error: $TPU is stopped: start it, then run the same command again" >&2
      exit 1
      ;;
    *) return 1 ;; # on its way to another state
  esac
  if [[ -z "${ACCELERATOR:-}" ]]; then
    echo "error: $TPU is $state: make it, or have it made by ACCELERATOR=TYPE;" \
      "then run the same command again" >&2
    exit 1
  fi
  echo "== $TPU is $state: it is made" >&2
  started="" installed="" seen=yes
  if [[ "$state" != "not there" ]]; then
    tpu_vm delete "$TPU" || return 1
  fi
  tpu_vm create "$TPU" --accelerator-type="$ACCELERATOR" \
    --version="${VERSION:-tpu-ubuntu2204-base}" --spot
}

pause() {
  sleep "${RETRY_SECONDS:-60}" &
  wait "$!" || true # a signal ends it
}

# `seen`: gcloud has told of the TPU VM, so that a failure to is none of the command's.
restart=0 status=0 started="" installed="" seen=""
while true; do
  until make_tpu || [[ "$stop_signal" ]]; do
    pause
  done
  if [[ "$stop_signal" ]]; then
    exit "$stop_signal"
  fi
  if [[ "$started" ]]; then # and not finished, though the TPU VM is still there
    if ((restart == ${RESTARTS:-3})); then
      echo "== given up after $restart restarts" >&2
      exit "$((status ? status : 1))"
    fi
    restart=$((restart + 1))
    echo "== all start again (restart $restart of ${RESTARTS:-3})" >&2
    on_hosts all "$STOP" || true
  fi
  started=yes status=0
  if [[ -z "$installed" ]]; then
    install || status=$?
  fi
  if ((status == 0)); then
    installed=yes
    supervise "$@"
  fi
  if [[ "$stop_signal" ]]; then
    exit "$status"
  fi
  if ((status == 0)) && { [[ "$mode" != train ]] || is_trained; }; then
    exit 0
  fi
  if [[ -s "$scratch/errors" ]]; then
    exit "$((status ? status : 1))"
  fi
  echo "== $TPU: main.py ended with status $status and is not finished" >&2
  pause
done
