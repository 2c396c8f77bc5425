#!/usr/bin/env bash
# transformers 5.24.0: generate passes the key/value cache as `cache`; up to 5.23 it was `past_key_values`. A model of
# one's own (or remote code) written as before, `forward(..., past_key_values=None, **kwargs)`, swallows the new name,
# begins an empty cache at each step and sees nothing but the last token: other text, no error. The one line that is
# logged says that `past_key_values` is deprecated. With 5.23.0 the same model gives the same tokens with and without a
# cache.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install transformers==5.24.0
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install \
    --no-deps --target "$folder/before" transformers==5.23.0
cat > "$folder/decode.py" <<'PYTHON'
import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class SmallConfig(PreTrainedConfig):
    model_type = "small"
    vocab_size: int = 64
    hidden_size: int = 32
    num_hidden_layers: int = 1
    num_attention_heads: int = 1


class Small(PreTrainedModel, GenerationMixin):
    config_class = SmallConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed, self.qkv, self.head = nn.Embedding(64, 32), nn.Linear(32, 96), nn.Linear(32, 64)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None, **kwargs):
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        before = past_key_values.get_seq_length() if past_key_values is not None else 0
        query, key, value = self.qkv(self.embed(input_ids)).unsqueeze(1).chunk(3, dim=-1)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, 0)
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril(before)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return CausalLMOutputWithPast(logits=self.head(mixed.squeeze(1)), past_key_values=past_key_values)


torch.manual_seed(0)
model = Small(SmallConfig()).eval()
with torch.no_grad():
    for weight in model.parameters():
        weight.normal_()
ids = torch.arange(5, 20)[None]
same = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
texts = [model.generate(ids, use_cache=use_cache, **same)[0, 15:].tolist() for use_cache in (True, False)]
print(*texts, sep=", without: ")
PYTHON
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=warning
before=$(PYTHONPATH="$folder/before" "$folder/venv/bin/python" "$folder/decode.py")
now=$("$folder/venv/bin/python" "$folder/decode.py")
printf '5.23.0, with a cache: %s\n5.24.0, with a cache: %s\n' "$before" "$now"
fail() { echo "the behaviour changed: $1" && exit 1; }
[ "${before%%, without*}" = "${before##*without: }" ] || fail "5.23.0 gives other tokens with a cache"
[ "${now##*without: }" = "${before##*without: }" ] || fail "5.24.0 gives other tokens without a cache"
[ "${now%%, without*}" != "${now##*without: }" ] || fail "5.24.0 passes past_key_values"
# seen: 5.23.0, with a cache: [51, 54, 20, 7, 43, 37, 29, 55], without: [51, 54, 20, 7, 43, 37, 29, 55]; 5.24.0, with a cache: [51, 19, 30, 14, 31, 16, 37, 55], without: [51, 54, 20, 7, 43, 37, 29, 55]
