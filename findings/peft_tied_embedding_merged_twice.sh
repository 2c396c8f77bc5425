#!/usr/bin/env bash
# PEFT 0.21.2: LoRA on Gemma's tied embedding, with ensure_weight_tying=True: the adapter computes right, and merging
# adds its difference twice, once through embed_tokens and once through lm_head, whose weights are one tensor. The
# merged model gives other logits than the adapter that was measured. PEFT warns that tying "can lead to complications";
# the result is saved and loaded like any other.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install transformers==5.24.0 peft==0.21.2
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM

torch.manual_seed(0)
config = Gemma2Config(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=16,
)  # fmt: skip
lora = LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens"], ensure_weight_tying=True, task_type="CAUSAL_LM")
model = get_peft_model(Gemma2ForCausalLM(config), lora)
ids = torch.randint(4, 64, (4, 16))
optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.05)
for _ in range(5):
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.eval()
with torch.no_grad():
    embedding = model.get_base_model().get_input_embeddings()
    base, difference = embedding.base_layer.weight.clone(), embedding.get_delta_weight("default").clone()
    adapted = model(ids).logits
    with model.disable_adapter():
        moved = (adapted - model(ids).logits).abs().max()
    merged = model.merge_and_unload()
    away = (merged(ids).logits - adapted).abs().max()
    added = merged.get_input_embeddings().weight - base
times = float((added * difference).sum() / (difference * difference).sum())
print(
    f"training moved the logits by {moved:.2f}; merged they are {away:.2f} away; difference was added {times:.4f} times"
)
assert merged.lm_head.weight is merged.get_input_embeddings().weight
assert moved > 0.01, moved
assert abs(times - 2) < 1e-3 and away > 0.1 * moved, f"the behaviour changed: the difference is added {times} times"
PYTHON
# seen: training moved the logits by 0.30; merged they are 0.26 away; difference was added 2.0000 times
