#!/usr/bin/env bash
# ImageNet at 128x128: encodes the images, then trains, samples and evaluates the arms full,
# static and adaptive, one after another.
# Usage: [RUNS=DIR] [LATENTS=DIR] [CLASSES=N] bash launch/imagenet128.sh --config.vae.path=VAE [--config.GROUP.FIELD=VALUE ...]
#
# VAE            stabilityai/sd-vae-ft-mse or another diffusers AutoencoderKL: a directory or file
# RUNS           where the workdirs imagenet128_full, _static and _adaptive go (default runs)
# LATENTS        where the latents go, or are (default data/imagenet128_latents)
# CLASSES        train on the first N classes (default 1000), in other RUNS for each N; the
#                latents are of all classes and serve every N
# --config.*     overrides for the encoding and every arm; configs/common.py lists the fields
#
# The images must be there: see configs/imagenet128.py.
# Relative directories are relative to where you are.
# Ctrl-C, or SIGTERM to the process group, stops it; the same command goes on, and leaves
# alone what is finished. A higher training.num_steps prolongs finished arms.
set -euo pipefail
# shellcheck source=launch/arms.sh
source "$(dirname "${BASH_SOURCE[0]}")/arms.sh"

check_arguments "$@"
require_vae "$@"
if [[ ! "${CLASSES:-1000}" =~ ^[1-9][0-9]*$ ]] || ((${CLASSES:-1000} > 1000)); then
  usage_error "CLASSES=$CLASSES: a number from 1 to 1000"
fi
latents="$(realpath --canonicalize-missing "${LATENTS:-data/imagenet128_latents}")"
enter_environment
encode_images imagenet128 "$latents" "$@"
run_arms imagenet128 ",classes=${CLASSES:-1000}" --config.vae.latents_dir="$latents" "$@"
