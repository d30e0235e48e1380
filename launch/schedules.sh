#!/usr/bin/env bash
# Compares rank schedules on the digits: about 70 minutes on 2 cores. See --help.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python "$root/launch/arms.py" schedules "$@"
