#!/usr/bin/env bash
# Installs this checkout on all hosts of a TPU VM and runs main.py there, which finds its cluster.
# Usage: TPU=NAME ZONE=ZONE [RESTARTS=3] bash launch/tpu_pod.sh --config=FILE --workdir=DIR [flags ...]
# The workdir must be on a disk that all hosts see and that outlives the TPU VM (Filestore, say).
# Make the TPU VM first, and again after a preemption:
#   gcloud compute tpus tpu-vm create NAME --zone=ZONE --accelerator-type=v4-32 \
#     --version=tpu-ubuntu2204-base --spot
# To mount disks before the start, or to stop main.py (a training saves, and the same command resumes):
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command='pkill -TERM -f main.py'
set -euo pipefail
: "${TPU:?is not set: name the TPU VM}" "${ZONE:?is not set: name its zone}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

on_hosts() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="bash -ec $(printf '%q' "$1")"
}

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
tar -czf "$scratch/lrdit.tar.gz" --exclude=__pycache__ \
  LICENSE README.md configs launch lrdit main.py pyproject.toml setup.cfg
gcloud compute tpus tpu-vm scp "$scratch/lrdit.tar.gz" "$TPU:" --zone="$ZONE" --worker=all
# setup.sh needs a newer Python than the image's.
on_hosts 'mkdir -p lrdit && tar -xzf lrdit.tar.gz -C lrdit
python3 -m pip install --quiet --user uv && export PATH="$HOME/.local/bin:$PATH"
uv python install --quiet 3.12 && export PYTHON="$(uv python find 3.12)"
source lrdit/launch/setup.sh && pip install --quiet --constraint "$constraints" "jax[tpu]"'

for ((restart = 0; restart <= ${RESTARTS:-3}; restart++)); do
  status=0
  on_hosts "cd lrdit && source .venv/bin/activate && exec python main.py $(printf '%q ' "$@")" || status=$?
  if ((status <= 2)); then # finished, or a mistake
    break
  fi
  echo "== main.py ended with status $status" >&2
done
exit "$status"
