#!/usr/bin/env bash
# Several processes on this machine's CPU, as they would run on several hosts: for trying it out.
# Usage: [DEVICES=1] [RESTARTS=3] [GRACE=60] bash launch/multihost_local.sh N --config=FILE --workdir=DIR [main.py flags ...]
#
# N              number of processes; each line they write begins with [its number]
# DEVICES        virtual CPU devices of each process (jax's JAX_NUM_CPU_DEVICES)
# RESTARTS       how often all are started again after one has died
# GRACE          seconds the others have to end after SIGTERM, before they are killed
# PJRT_NPROC     XLA's threads in each process; by default an even share of the cores
#
# The processes share the cores: this shows that a run works, not how fast it would be. (One
# process drives all GPUs of a machine.)
# If one process fails, all are ended. If it died, all start again and resume; after a mistake
# of the user's (an error: line of any) they do not.
# SIGTERM and Ctrl-C are passed on as SIGTERM: a training saves and ends with status 0, exports and
# evaluations die of it (143), and the same command goes on.
# A second Ctrl-C kills them. No process outlives this script, however it ends.
set -euo pipefail
# shellcheck source=launch/arms.sh
source "$(dirname "${BASH_SOURCE[0]}")/arms.sh"

readonly POLL_SECONDS=0.2
readonly NEVER=999999999 # seconds after the start
readonly SETTLE_SECONDS=2 # for the others to say why they end, before they are told to
readonly OTHERS_GONE_STATUS=75 # by it main.py says that it ends because another process has

# Starts main.py in a session of its own, so that Ctrl-C reaches this script alone, and has the
# kernel kill it if this script (its parent) dies, even by SIGKILL.
readonly START='
import ctypes, os, signal, sys
parent, *command = sys.argv[1:]
os.setsid()
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(parent):
  sys.exit(1)
signal.signal(signal.SIGINT, signal.SIG_DFL)  # bash has its background jobs ignore it
os.execv(sys.executable, [sys.executable, *command])
'

readonly FREE_PORT='
import socket
with socket.socket() as server:
  server.bind(("localhost", 0))
  print(server.getsockname()[1])
'

# Arguments: name, value, least value.
check_number() {
  if [[ ! "$2" =~ ^(0|[1-9][0-9]*)$ ]] || (($2 < $3)); then
    usage_error "$1=$2: a whole number from $3"
  fi
}

for argument in "$@"; do
  case "$argument" in
    -h | --help)
      print_help
      exit 0
      ;;
    --coordinator* | --num_processes* | --process_id*)
      usage_error "$argument: this script sets it"
      ;;
  esac
done
if (($# == 0)); then
  usage_error "N, the number of processes, is missing"
fi
num_processes="$1"
shift
check_number N "$num_processes" 1
check_number DEVICES "${DEVICES:=${JAX_NUM_CPU_DEVICES:-1}}" 1
check_number RESTARTS "${RESTARTS:=3}" 0
check_number GRACE "${GRACE:=60}" 0
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="$DEVICES"
# With as many threads as cores in each process they would take the cores from each other.
cores="$(getconf _NPROCESSORS_ONLN)"
check_number PJRT_NPROC "${PJRT_NPROC:=$((cores > num_processes ? cores / num_processes : 1))}" 1
export PJRT_NPROC
enter_environment

scratch="$(mktemp -d)"
pids=() readers=()
stop_signal="" # the first signal that asked this script to stop
kill_now=""

on_signal() {
  if [[ "$stop_signal" && "$1" == INT ]]; then
    kill_now=yes
  fi
  stop_signal="${stop_signal:-$1}"
}

# Whatever is left of each process' group.
kill_groups() {
  local pid
  for pid in "${pids[@]}"; do
    kill -KILL -- "-$pid" 2>/dev/null || kill -KILL "$pid" 2>/dev/null || true
  done
}

clean_up() {
  kill_groups
  rm -rf "$scratch"
}
trap clean_up EXIT
trap 'on_signal INT' INT
trap 'on_signal TERM' TERM HUP

# Writes a process' stream with its number before each line, and its errors to a file as well.
# Ignores what may be sent to the whole group of this script: main.py must be able to write
# until it has ended.
# Arguments: number, file to read.
relabel() {
  trap '' HUP INT TERM
  exec sed -u -E -e "/^$ERROR_LINE/w $scratch/$1.errors" -e "s/^/[$1] /" <"$2"
}

# Arguments: flags of main.py.
start_all() {
  local port i
  port="$(python -c "$FREE_PORT")"
  pids=() readers=()
  for ((i = 0; i < num_processes; i++)); do
    rm -f "$scratch/$i."*
    mkfifo "$scratch/$i.out" "$scratch/$i.err"
    (relabel "$i" "$scratch/$i.out") &
    readers+=("$!")
    (relabel "$i" "$scratch/$i.err" >&2) &
    readers+=("$!")
    python -c "$START" "$$" "$root/main.py" "$@" --coordinator="localhost:$port" \
      --num_processes="$num_processes" --process_id="$i" \
      </dev/null >"$scratch/$i.out" 2>"$scratch/$i.err" &
    pids+=("$!")
  done
}

# Sets `statuses` of those that have ended, and `running`, the number of the others.
collect() {
  local i
  running=0
  for i in "${!pids[@]}"; do
    if [[ "${statuses[i]:-}" ]]; then
      continue
    fi
    if kill -0 "${pids[i]}" 2>/dev/null; then
      running=$((running + 1))
      continue
    fi
    statuses[i]=0
    wait "${pids[i]}" || statuses[i]=$?
  done
}

# Sets `culprits`: those that have failed by themselves; process 0 alone if it is one of them, as
# the others may crash at its end.
find_culprits() {
  local i followers=()
  culprits=()
  for i in "${!statuses[@]}"; do
    if ((statuses[i] == OTHERS_GONE_STATUS)); then
      followers+=("$i")
    elif ((statuses[i])); then
      culprits+=("$i")
      if ((i == 0)); then
        return
      fi
    fi
  done
  if ((${#culprits[@]} == 0)); then
    culprits=("${followers[@]}")
  fi
}

terminate() {
  local pid
  for pid in "${pids[@]}"; do
    kill -TERM "$pid" 2>/dev/null || true
  done
}

# Waits until all have ended; sets `statuses` and `culprits`.
supervise() {
  local running terminate_at="$NEVER" kill_at="$NEVER"
  statuses=() culprits=()
  while
    collect
    ((running))
  do
    if ((terminate_at == NEVER)) && [[ "${statuses[*]}" =~ [1-9] ]]; then
      # Seen in the midst of looking: who else had failed by then?
      sleep "$POLL_SECONDS" || true
      collect
      find_culprits
      terminate_at=$((SECONDS + SETTLE_SECONDS))
    fi
    if [[ "$stop_signal" ]]; then
      terminate_at=0
    fi
    if ((kill_at == NEVER && SECONDS >= terminate_at)); then
      terminate
      kill_at=$((SECONDS + GRACE))
    fi
    if [[ "$kill_now" ]] || ((SECONDS >= kill_at)); then
      kill_groups
    fi
    sleep "$POLL_SECONDS" || true
  done
  if ((${#culprits[@]} == 0)); then
    find_culprits
  fi
  kill_groups
  pids=()
  wait "${readers[@]}" || true # the errors are in their files
}

# Whether every culprit ended with an error the user can mend.
is_users_mistake() {
  local i
  for i in "${culprits[@]}"; do
    if ((statuses[i] > 2)) || [[ ! -s "$scratch/$i.errors" ]]; then
      return 1
    fi
  done
}

for ((restart = 0; ; restart++)); do
  start_all "$@"
  supervise 2>/dev/null # bash would announce each process that was killed
  if ((${#culprits[@]} == 0)); then
    exit 0
  fi
  first="${culprits[0]}"
  echo "== process $first ended with status ${statuses[first]}" >&2
  if [[ "$stop_signal" ]] || is_users_mistake; then
    exit "${statuses[first]}"
  fi
  if ((restart == RESTARTS)); then
    echo "== given up after $RESTARTS restarts" >&2
    exit "${statuses[first]}"
  fi
  echo "== all start again (restart $((restart + 1)) of $RESTARTS)" >&2
done
