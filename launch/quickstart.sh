#!/usr/bin/env bash
# From nothing to sampled digits: environment, training, sampling, figures.
# Usage: bash launch/quickstart.sh [WORKDIR] (default runs/quickstart)
set -euo pipefail
trap 'exit 130' INT
trap 'exit 143' TERM
workdir="$(realpath --canonicalize-missing "${1:-runs/quickstart}")"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
start=$SECONDS
source launch/setup.sh
installed=$SECONDS

lrdit() {
  python main.py --config=configs/digits.py:method=adaptive --workdir="$workdir" --mode="$1"
}
lrdit train
trained=$SECONDS
python - "$workdir" <<'EOF'
import json, pathlib, sys

workdir = pathlib.Path(sys.argv[1])
num_steps = json.loads((workdir / "config.json").read_text())["training"]["num_steps"]
if not (workdir / "checkpoints" / str(num_steps)).exists():
  sys.exit("error: training was stopped before its end: run the same command again to go on")
EOF
lrdit sample
lrdit evaluate

python - "$workdir" <<'EOF'
import json, pathlib, sys

workdir = pathlib.Path(sys.argv[1])
evaluation = json.loads((workdir / "evaluation.json").read_text())
samples = evaluation["samples"]["default"]
figures, metadata = samples["figures"], samples["metadata"]
export = workdir / "samples" / "default"
print(f"""
grid of samples   {export / "grid.png"}
samples           {export / "samples.npz"}
checkpoint        {workdir / "checkpoints" / str(evaluation["checkpoint_step"])}

held-out loss: {evaluation["held_out"]["ema"]["loss"]:.5f}
samples recognised as their label by a classifier of the real digits: \
{figures["classifier_recognition_accuracy"]:.1%} (real held-out digits: \
{figures["classifier_recognition_accuracy_of_held_out_images"]:.1%})
Frechet distance over the classifier's features: {figures["classifier_frechet_distance"]:.3f}, \
precision {figures["classifier_precision"]:.3f}, recall {figures["classifier_recall"]:.3f}
{metadata["num_samples"]} samples drawn in {metadata["wall_clock_seconds"]:.1f} s""")
EOF
echo "install $((installed - start)) s, training $((trained - installed)) s," \
  "all $((SECONDS - start)) s"
