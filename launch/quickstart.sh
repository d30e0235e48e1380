#!/usr/bin/env bash
# Goes from nothing to sampled digits: environment, training, 1,000 samples and their metrics.
# Usage: bash launch/quickstart.sh [WORKDIR] (default runs/quickstart)
workdir="$(realpath --canonicalize-missing "${1:-runs/quickstart}")"
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
installed=$SECONDS
fields=(--config.training.num_steps=800 --config.optimizer.warmup_steps=50 --config.sampling.guidance_scale=1.25)
for mode in train sample evaluate; do # a training that is stopped ends this with status 75
  python main.py --config=configs/digits.py:method=adaptive --workdir="$workdir" --mode="$mode" "${fields[@]}"
done
echo "grid of samples: $workdir/samples/default/grid.png; metrics: $workdir/evaluation.json"
echo "installed in $installed s; trained, sampled and evaluated in $((SECONDS - installed)) s"
