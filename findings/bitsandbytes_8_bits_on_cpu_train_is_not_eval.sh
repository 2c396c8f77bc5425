#!/usr/bin/env bash
# bitsandbytes 0.50.2, on a CPU: a model in 8 bits without any dropout gives other log-probabilities in train() than in
# eval(). In training Linear8bitLt multiplies by the weights made floats again; in evaluation the activations are
# rounded to 8 bits as well. So a loss in training and one in evaluation are those of two models. TRL's DPOTrainer meets
# it: precompute_ref_log_probs=True takes the reference before training, in the eval() mode of a loaded model, and the
# policy that equals it, an adapter that is 0, starts away from log 2. Each mode by itself repeats to the bit.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install \
    trl==1.16.0 transformers==5.24.0 peft==0.21.2 datasets==5.2.0 bitsandbytes==0.50.2
export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$folder/cache" TQDM_DISABLE=1 CUDA_VISIBLE_DEVICES=
cat > "$folder/modes.py" <<'PYTHON'
import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM, BitsAndBytesConfig, Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast,
)  # fmt: skip
from trl import DPOConfig, DPOTrainer

words = ["<pad>", "<eos>", "<bos>", "<unk>", "sky", "is", "the", "blue", "green"]
tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
)
rows = Dataset.from_list([{"prompt": "the sky is", "chosen": " blue" * 8, "rejected": " green" * 12}] * 2)
base = f"{sys.argv[1]}/base"
torch.manual_seed(0)
sizes = dict(vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=4,
             num_attention_heads=2, num_key_value_heads=1, head_dim=32)  # fmt: skip
Gemma2ForCausalLM(Gemma2Config(**sizes, initializer_range=0.5)).save_pretrained(base)


def loaded(bits):
    settings = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)} if bits == 8 else {}
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **settings)


def logprob(model):
    ids = torch.tensor([[2, 6, 4, 5] + [7] * 8])
    with torch.no_grad():
        return float(model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).sum())


def first(bits, precomputed):
    """The loss of the first step, of a policy that is its reference."""
    off = dict(report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, beta=1.0)
    trainer = DPOTrainer(
        model=loaded(bits),
        args=DPOConfig(f"{sys.argv[1]}/run", precompute_ref_log_probs=precomputed, max_steps=1, logging_steps=1,
                       save_strategy="no", **off),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    return trainer.state.log_history[0]["loss"]


gaps, losses = {}, {}
for bits in (32, 8):
    model = loaded(bits)
    evaluated, trained = [logprob(model.eval()) for _ in range(2)], [logprob(model.train()) for _ in range(2)]
    assert evaluated[0] == evaluated[1] and trained[0] == trained[1]
    gaps[bits] = abs(trained[0] - evaluated[0])
    losses[bits] = [first(bits, precomputed) for precomputed in (False, True)]
told = "; ".join(
    f"{bits} bits: {gaps[bits]:.4f}, first DPO loss {losses[bits][0]:.4f}, reference precomputed {losses[bits][1]:.4f}"
    for bits in gaps
)
print(f"train() against eval() in a log-probability: {told}")
assert gaps[32] < 1e-4 and max(abs(loss - 0.6931) for loss in [*losses[32], losses[8][0]]) < 1e-3
assert gaps[8] > 1e-3, "the behaviour changed: both modes compute the same"
assert abs(losses[8][1] - 0.6931) > 2e-3, f"the behaviour changed: {losses[8]}"
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/modes.py" "$folder" > "$folder/seen" 2> "$folder/log" || {
    cat "$folder/log" "$folder/seen"
    exit 1
}
tail -1 "$folder/seen"
# seen: train() against eval() in a log-probability: 32 bits: 0.0000, first DPO loss 0.6931, reference precomputed 0.6931; 8 bits: 0.0502, first DPO loss 0.6931, reference precomputed 0.6791
