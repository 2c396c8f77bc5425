#!/usr/bin/env bash
# TRL 1.16.0: where bitsandbytes quantized the base, SFTTrainer and DPOTrainer turn the adapter, which PEFT makes in
# float32, into bfloat16 weights, whatever bf16 and dtype say. AdamW's step is about the learning rate, and a bfloat16
# weight w stays as it is if that is less than w / 512: at SFTTrainer's own learning rate, and the more so at
# DPOTrainer's (20 times less), most of LoRA's A never moves, all run long. Nothing warns; B, which begins at 0, does
# move, so that the loss falls. Turning the adapter's weights back to float32 between making the trainer and train()
# ends it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install \
    trl==1.16.0 transformers==5.24.0 peft==0.21.2 datasets==5.2.0 bitsandbytes==0.50.2
export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$folder/cache" TQDM_DISABLE=1 CUDA_VISIBLE_DEVICES=
cat > "$folder/moved.py" <<'PYTHON'
import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM, BitsAndBytesConfig, Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast,
)  # fmt: skip
from trl import SFTConfig, SFTTrainer

words = ["<pad>", "<eos>", "<bos>", "<unk>", "sky", "is", "the", "blue", "green"]
tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
)
rows = Dataset.from_list([{"prompt": "the sky is", "completion": " blue"}] * 2)
base = f"{sys.argv[1]}/base"
torch.manual_seed(0)
sizes = dict(vocab_size=len(words), hidden_size=640, intermediate_size=640, num_hidden_layers=1,
             num_attention_heads=2, num_key_value_heads=1, head_dim=64)  # fmt: skip
Gemma2ForCausalLM(Gemma2Config(**sizes)).save_pretrained(base)


def moved(restored=False, **quantized):
    """(dtype of the adapter, share of LoRA's A and of its B that moved) in four steps."""
    torch.manual_seed(0)
    off = dict(report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **quantized),
        args=SFTConfig(f"{sys.argv[1]}/run", max_steps=4, lr_scheduler_type="constant", save_strategy="no", **off),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    adapter = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    if restored:
        for weight in adapter.values():
            weight.data = weight.data.float()
    before = {name: weight.detach().clone() for name, weight in adapter.items()}
    trainer.train()
    shares = []
    for part in ("lora_A", "lora_B"):
        changed = torch.cat([(weight != before[name]).flatten() for name, weight in adapter.items() if part in name])
        shares.append(float(changed.float().mean()))
    (dtype,) = {str(weight.dtype).removeprefix("torch.") for weight in adapter.values()}
    return dtype, *shares


four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
found = {
    "plain base": moved(),
    "4 bits": moved(quantization_config=four_bits),
    "4 bits, turned back": moved(restored=True, quantization_config=four_bits),
}
rate = SFTConfig(f"{sys.argv[1]}/run", use_cpu=True, bf16=False).learning_rate
told = "; ".join(f"{name} {dtype}: A {a:.0%}, B {b:.0%}" for name, (dtype, a, b) in found.items())
print(f"weights moved at learning rate {rate:g}: {told}")
assert all(found[name][0] == "float32" and found[name][1] > 0.9 for name in ("plain base", "4 bits, turned back"))
assert found["4 bits"][2] > 0.9
assert found["4 bits"][0] == "bfloat16", "the behaviour changed: the adapter keeps its dtype"
assert found["4 bits"][1] < 0.5, f"the behaviour changed: A moves: {found['4 bits']}"
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/moved.py" "$folder" > "$folder/seen" 2> "$folder/log" || {
    cat "$folder/log" "$folder/seen"
    exit 1
}
tail -1 "$folder/seen"
# seen: weights moved at learning rate 2e-05: plain base float32: A 100%, B 100%; 4 bits bfloat16: A 20%, B 100%; 4 bits, turned back float32: A 100%, B 100%
