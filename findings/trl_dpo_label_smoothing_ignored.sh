#!/usr/bin/env bash
# TRL 1.16.0: DPOTrainer's plain loss, loss_type="sigmoid", takes label_smoothing and computes without it: a run with
# 0.2 has the loss of a run with 0.0, to the bit, and nothing warns. The option's help does name Robust DPO and EXO
# alone. But CPOTrainer of the same release smooths its loss "sigmoid" by the option of the same name, as conservative
# DPO does for pairs of which some are labelled wrongly, and warns where it has no effect. "robust" is another loss,
# which takes the swapped pair's away where conservative DPO adds it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install \
    trl==1.16.0 transformers==5.24.0 peft==0.21.2 datasets==5.2.0
export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$folder/cache" TQDM_DISABLE=1 CUDA_VISIBLE_DEVICES=
export TRL_EXPERIMENTAL_SILENCE=1
cat > "$folder/losses.py" <<'PYTHON'
import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

words = ["<pad>", "<eos>", "<bos>", "<unk>", "sky", "is", "the", "blue", "green"]
tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
)
rows = Dataset.from_list([{"prompt": "the sky is", "chosen": " blue", "rejected": " green green"}] * 2)


def loss(trainer, config, **settings):
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                 num_attention_heads=2, num_key_value_heads=1, head_dim=16)  # fmt: skip
    off = dict(report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, beta=1.0)
    made = trainer(
        model=Gemma2ForCausalLM(Gemma2Config(**sizes, initializer_range=0.5)),
        args=config(sys.argv[1], **off, **settings),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    return made.evaluate()["eval_loss"]


found = {}
for name, trainer, config, kind in (
    ("DPO sigmoid", DPOTrainer, DPOConfig, ["sigmoid"]),
    ("DPO robust", DPOTrainer, DPOConfig, ["robust"]),
    ("CPO sigmoid", CPOTrainer, CPOConfig, "sigmoid"),
):
    found[name] = [loss(trainer, config, loss_type=kind, label_smoothing=part) for part in (0.0, 0.2)]
print("loss with label_smoothing 0.0 and 0.2: " + "; ".join(f"{n} {a:.4f} {b:.4f}" for n, (a, b) in found.items()))
assert found["DPO robust"][0] == found["DPO sigmoid"][0] and found["DPO robust"][1] != found["DPO robust"][0]
assert found["CPO sigmoid"][0] != found["CPO sigmoid"][1]
assert found["DPO sigmoid"][0] == found["DPO sigmoid"][1], "the behaviour changed: the plain loss is smoothed"
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/losses.py" "$folder/run" > "$folder/seen" 2> "$folder/log" || {
    cat "$folder/log" "$folder/seen"
    exit 1
}
tail -1 "$folder/seen"
if grep -i smoothing "$folder/log"; then echo "the behaviour changed: something is said" && exit 1; fi
# seen: loss with label_smoothing 0.0 and 0.2: DPO sigmoid 0.9181 0.9181; DPO robust 0.9181 1.0542; CPO sigmoid 30.0183 27.3688
