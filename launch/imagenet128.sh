#!/usr/bin/env bash
# Encodes ImageNet at 128x128, then compares the four arms. See --help.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python "$root/launch/arms.py" imagenet128 "$@"
