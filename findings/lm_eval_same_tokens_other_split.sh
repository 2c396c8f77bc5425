#!/usr/bin/env bash
# lm_eval 0.4.13, hf backend: two loglikelihood requests whose tokens are the same (but the last), split elsewhere into
# context and continuation ("Q Answer:" + " yes", and "Q" + " Answer: yes" of another prompt variant), share one forward
# pass, and the shorter continuation is then read at the positions of the longer one's beginning. Its loglikelihood is
# wrong wherever both stand in one run. Each request alone, or logits_cache=False, is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install "lm_eval[hf]==0.4.13" transformers==5.24.0
export HF_HUB_OFFLINE=1 TQDM_DISABLE=1
"$folder/venv/bin/python" - 2> "$folder/stderr" <<'PYTHON' || { cat "$folder/stderr"; exit 1; }
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

words = ["<pad>", "<eos>", "<bos>", "<unk>", "sky", "blue?", "Answer:", "yes", "no"]
spelt = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
spelt.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=spelt, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
)
torch.manual_seed(0)
config = Gemma2Config(
    vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=16, initializer_range=0.5,
)  # fmt: skip
model = Gemma2ForCausalLM(config).eval()
short, long = ("sky blue? Answer:", " yes"), ("sky blue?", " Answer: yes")


def scores(*pairs, logits_cache=True):
    """The loglikelihood of each pair of one run."""
    backend = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", logits_cache=logits_cache)
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    return [score for score, _ in backend.loglikelihood(requests)]


alone, together = scores(short) + scores(long), scores(short, long)
print("each alone: {:.4f}, {:.4f}; in one run: {:.4f}, {:.4f}".format(*alone, *together))
uncached = scores(short, long, logits_cache=False)
assert max(abs(one - other) for one, other in zip(alone, uncached, strict=True)) < 1e-3, uncached
assert abs(together[1] - alone[1]) < 1e-3, together
assert abs(together[0] - alone[0]) > 0.1, "the behaviour changed: one run gives the scores of each alone"
PYTHON
# seen: each alone: -1.5707, -16.4754; in one run: -17.5123, -16.4754
