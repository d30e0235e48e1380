#!/usr/bin/env bash
# Encodes CelebA, then compares the four arms. See --help.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python "$root/launch/arms.py" celeba "$@"
