#!/usr/bin/env bash
# Compares the four arms on CIFAR-10. See --help.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python "$root/launch/arms.py" cifar10 "$@"
