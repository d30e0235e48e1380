#!/usr/bin/env bash
# CelebA: encodes the images, then trains, samples and evaluates the arms full, static and
# adaptive, one after another.
# Usage: [RUNS=DIR] [LATENTS=DIR] bash launch/celeba.sh --config.vae.path=VAE [--config.GROUP.FIELD=VALUE ...]
#
# VAE            stabilityai/sd-vae-ft-mse or another diffusers AutoencoderKL: a directory or file
# RUNS           where the workdirs celeba_full, _static and _adaptive go (default runs)
# LATENTS        where the latents go, or are (default data/celeba_latents)
# --config.*     overrides for the encoding and every arm; configs/common.py lists the fields
#
# The images must be there: see configs/celeba.py.
# Relative directories are relative to where you are.
# Ctrl-C, or SIGTERM to the process group, stops it; the same command goes on, and leaves
# alone what is finished. A higher training.num_steps prolongs finished arms.
set -euo pipefail
# shellcheck source=launch/arms.sh
source "$(dirname "${BASH_SOURCE[0]}")/arms.sh"

check_arguments "$@"
require_vae "$@"
latents="$(realpath --canonicalize-missing "${LATENTS:-data/celeba_latents}")"
enter_environment
encode_images celeba "$latents" "$@"
run_arms celeba "" --config.vae.latents_dir="$latents" "$@"
