#!/usr/bin/env bash
# TRL 1.16.0: DPOTrainer(model) without a ref_model promises the model as it is before training for a reference. For a
# full fine-tune of a model in memory it reads the reference anew from where that model was loaded. If an adapter was
# merged into it since (tuned by LoRA, merge_and_unload, then DPO), the reference is the untuned base: the loss does not
# begin at log 2, and beta holds the policy to the model before its tuning. Nothing warns. Passing
# ref_model=copy.deepcopy(model), or saving the merged model and loading that, is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install \
    trl==1.16.0 transformers==5.24.0 peft==0.21.2 datasets==5.2.0
export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$folder/cache" TQDM_DISABLE=1 CUDA_VISIBLE_DEVICES=
cat > "$folder/first.py" <<'PYTHON'
import copy
import sys

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

words = ["<pad>", "<eos>", "<bos>", "<unk>", "sky", "is", "the", "blue", "green"]
tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
)
rows = Dataset.from_list([{"prompt": "the sky is", "chosen": " blue", "rejected": " green green"}] * 2)
base, saved = f"{sys.argv[1]}/base", f"{sys.argv[1]}/saved"
torch.manual_seed(0)
sizes = dict(vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
             num_attention_heads=2, num_key_value_heads=1, head_dim=16)  # fmt: skip
Gemma2ForCausalLM(Gemma2Config(**sizes, initializer_range=0.5)).save_pretrained(base)
tuned = get_peft_model(
    AutoModelForCausalLM.from_pretrained(base),
    LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
)
merged = tuned.merge_and_unload().requires_grad_(True)
merged.save_pretrained(saved)


def first(model, reference=None):
    """The loss before the first step; log 2 where policy and reference are one."""
    off = dict(report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, beta=1.0)
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=DPOConfig(f"{sys.argv[1]}/run", **off),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )
    return trainer.evaluate()["eval_loss"]


right = [first(copy.deepcopy(merged), copy.deepcopy(merged)), first(AutoModelForCausalLM.from_pretrained(saved))]
with_base = first(copy.deepcopy(merged), AutoModelForCausalLM.from_pretrained(base))
found = first(merged)
print(
    f"first loss of a merged model: {found:.4f}; with the base for reference {with_base:.4f}, "
    f"with itself {right[0]:.4f}, saved and loaded {right[1]:.4f}"
)
assert max(abs(loss - 0.6931) for loss in right) < 1e-3
assert abs(found - 0.6931) > 0.01, "the behaviour changed: the reference is the model that was passed"
assert abs(found - with_base) < 1e-5, "the behaviour changed: the reference is another one"
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/first.py" "$folder" > "$folder/seen" 2> "$folder/log" || {
    cat "$folder/log" "$folder/seen"
    exit 1
}
tail -1 "$folder/seen"
# seen: first loss of a merged model: 0.2216; with the base for reference 0.2216, with itself 0.6931, saved and loaded 0.6931
