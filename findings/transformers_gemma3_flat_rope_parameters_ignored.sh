#!/usr/bin/env bash
# transformers 5.24.0: rope_parameters={"rope_type": ..., "rope_theta": ...}, the form that config.json of Gemma 1 and 2
# has, is taken by Gemma3TextConfig without a word, kept, and has no effect: both types of layers have their defaults, a
# base of 1,000,000 and no factor. The same numbers by their old names, rope_theta and rope_scaling, are read. Who writes
# a longer context into a Gemma 3's config.json in the newer spelling tunes and serves the model without it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install transformers==5.24.0
cat > "$folder/flat.py" <<'PYTHON'
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

sizes = dict(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=2,
             num_key_value_heads=1, head_dim=16, sliding_window=8, max_position_embeddings=256)
ids = torch.arange(4, 100)[None]
logits = {}
for name, rope in {
    "none": {},
    "flat": {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 20_000.0}},
    "old names": {"rope_theta": 20_000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
}.items():
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **rope)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.5)
        logits[name] = model(ids).logits
for name in ("flat", "old names"):
    print(name, round((logits[name] - logits["none"]).abs().max().item(), 1), end="; " if name == "flat" else "\n")
PYTHON
export HF_HUB_OFFLINE=1
seen=$("$folder/venv/bin/python" "$folder/flat.py" 2> "$folder/log") || { cat "$folder/log"; exit 1; }
echo "change of a logit by the settings: $seen"
[ ! -s "$folder/log" ] || { echo "the behaviour changed: $(cat "$folder/log")" && exit 1; }
case "$seen" in "flat 0.0; old names 0.0") echo "the behaviour changed" && exit 1 ;; "flat 0.0; "*) ;; *) echo "the behaviour changed" && exit 1 ;; esac
# seen: change of a logit by the settings: flat 0.0; old names 1.2
