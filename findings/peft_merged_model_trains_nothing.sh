#!/usr/bin/env bash
# PEFT 0.21.2 with TRL 1.16.0: get_peft_model freezes the weights of the base, and merge_and_unload gives the model
# back with all of them still frozen. Full fine-tuning that goes on from it with SFTTrainer runs to its end and
# changes nothing: activation checkpointing, which SFTConfig turns on by itself, makes the embeddings' output require
# a gradient, so that backward has something to do, and an optimizer whose weights get no gradient takes empty steps.
# Losses are logged, those of the model as it was, and a gradient norm of 0. Without checkpointing the first backward
# raises an error instead. requires_grad_(True) on the merged model ends it, as does saving and loading it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install \
    trl==1.16.0 transformers==5.24.0 peft==0.21.2 datasets==5.2.0
export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$folder/cache" TQDM_DISABLE=1 CUDA_VISIBLE_DEVICES=
cat > "$folder/trained.py" <<'PYTHON'
import sys

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

words = ["<pad>", "<eos>", "<bos>", "<unk>", "sky", "is", "the", "blue"]
tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
)
rows = Dataset.from_list([{"prompt": "the sky is", "completion": " blue"}] * 2)
sizes = dict(vocab_size=len(words), hidden_size=64, intermediate_size=64, num_hidden_layers=1,
             num_attention_heads=2, num_key_value_heads=1, head_dim=32)  # fmt: skip


def trained(merged, thawed=False, **settings):
    """(how many of the weights changed in four steps, whether the loss did), or the error in its own words."""
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**sizes))
    if merged:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).merge_and_unload()
    if thawed:
        model.requires_grad_(True)
    off = dict(report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no")
    args = SFTConfig(f"{sys.argv[1]}/run", max_steps=4, learning_rate=0.01, logging_steps=1, **off, **settings)
    trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    try:
        trainer.train()
    except RuntimeError as error:
        return str(error).split(" and ")[0]
    losses = {entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    changed = [name for name, weight in trainer.model.named_parameters() if bool((weight != before[name]).any())]
    return len(changed), len(losses) > 1


found = {
    "never wrapped": trained(False),
    "merged": trained(True),
    "merged, requires_grad_(True)": trained(True, thawed=True),
    "merged, no checkpointing": trained(True, gradient_checkpointing=False),
}
told = "; ".join(f"{name}: {what}" for name, what in found.items())
print(f"(weights of 13 that changed, whether the loss did): {told}")
assert found == {
    "never wrapped": (13, True),
    "merged": (0, False),
    "merged, requires_grad_(True)": (13, True),
    "merged, no checkpointing": "element 0 of tensors does not require grad",
}, found
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/trained.py" "$folder" > "$folder/seen" 2> "$folder/log" || {
    cat "$folder/log" "$folder/seen"
    exit 1
}
tail -1 "$folder/seen"
# seen: (weights of 13 that changed, whether the loss did): never wrapped: (13, True); merged: (0, False); merged, requires_grad_(True): (13, True); merged, no checkpointing: element 0 of tensors does not require grad
