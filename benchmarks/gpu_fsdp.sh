#!/usr/bin/env bash
# FSDP2 on one CUDA device, as a smoke test: sharding over a single rank still wraps, gathers and saves as on many.
# Trains the tiny Gemma in each strategy, kills nothing, and compares the losses with a run without a launcher.
#   bash benchmarks/gpu_fsdp.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no CUDA device here")'
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
quick="train.max_steps=6 eval.generate_rows=4 eval.max_rows=8 eval.every_steps=3 train.global_batch_size=8
  train.micro_batch_size=2 checkpoint.every_steps=3"
for strategy in "strategy=lora" "strategy=qlora" "strategy=full train.learning_rate=0.0001"; do
  name=${strategy%% *}
  for layout in plain fsdp2; do
    launch=""
    [ "$layout" = plain ] || launch="--launch fsdp2 --nproc ${NPROC:-1}"
    # shellcheck disable=SC2086
    "$python" -m gemma_ft train sft_tiny output_dir="$out/$name-$layout" $strategy $quick $launch
  done
  "$python" - "$out/$name-plain" "$out/$name-fsdp2" <<'PYTHON'
import json, sys
one, two = ([json.loads(line)["loss"] for line in open(f"{run}/metrics.jsonl")] for run in sys.argv[1:])
worst = max(abs(a - b) / abs(a) for a, b in zip(one, two, strict=True))
print(f"{sys.argv[2]}: losses within {worst:.2g} of the run without a launcher")
sys.exit(worst > 1e-3)
PYTHON
done
