#!/usr/bin/env bash
# Compares the four arms on the digits: about 45 minutes on 2 cores. See --help.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python "$root/launch/arms.py" digits "$@"
