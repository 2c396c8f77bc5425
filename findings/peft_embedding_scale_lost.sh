#!/usr/bin/env bash
# PEFT 0.21.2: where an adapter works on an embedding, PEFT computes it anew and knows a scale by the name `embed_scale`
# alone. An embedding class of one's own that multiplies by sqrt(D) in forward, as Gemma's has to, and has no attribute
# of that name loses the scale: with trainable_token_indices for every token of every text (two rows that no text
# holds are enough), with LoRA for the low-rank part, so that the merged model is another. Nothing warns.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install transformers==5.24.0 peft==0.21.2
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from torch import nn


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * self.embedding_dim**0.5


class Named(Scaled):
    @property
    def embed_scale(self):
        return self.embedding_dim**0.5


class Small(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.embed, self.mix = embedding(32, 64), nn.Linear(64, 64)

    def forward(self, ids):
        return self.mix(self.embed(ids))


def measured(embedding):
    """Norms of the embedded text: before, and with an untrained adapter on two other rows; the low-rank part's, merged
    over not merged."""
    torch.manual_seed(0)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        small = Small(embedding).eval()
        before = small.embed(ids).norm()
        rows = get_peft_model(small, LoraConfig(target_modules=["mix"], trainable_token_indices={"embed": [30, 31]}))
        with_rows = rows.base_model.model.embed(ids).norm()
        small = Small(embedding).eval()
        plain = small.embed(ids)
        lora = get_peft_model(small, LoraConfig(r=4, target_modules=["embed"], init_lora_weights=False)).eval()
        live = lora.base_model.model.embed(ids) - plain
        merged = lora.merge_and_unload().embed(ids) - plain
    return float(before), float(with_rows), float(merged.norm() / live.norm())


named, unnamed = measured(Named), measured(Scaled)
for name, (text, rows, part) in (("named", named), ("unnamed", unnamed)):
    print(f"scale {name}: text {text:.1f}, two other rows trainable {rows:.1f}; LoRA's part merged / live {part:.2f}")
assert abs(named[1] / named[0] - 1) < 1e-4 and abs(named[2] - 1) < 1e-3, named
assert abs(unnamed[1] * 8 / unnamed[0] - 1) < 1e-4, f"the behaviour changed: rows keep the scale: {unnamed}"
assert abs(unnamed[2] / 8 - 1) < 1e-3, f"the behaviour changed: LoRA keeps the scale: {unnamed}"
PYTHON
# seen: scale named: text 184.1, two other rows trainable 184.1; LoRA's part merged / live 1.00; scale unnamed: text 184.1, two other rows trainable 23.0; LoRA's part merged / live 8.00
