#!/usr/bin/env bash
# Runs several processes on this machine's CPU as they would run on several hosts. See --help.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python "$root/launch/multihost_local.py" "$@"
