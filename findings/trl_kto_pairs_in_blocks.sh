#!/usr/bin/env bash
# TRL 1.16.0: KTOTrainer takes a data set of pairs and unpairs it, a thousand rows at a time: all their chosen answers,
# then all their rejected ones. It also has to walk the rows in order (any other order is refused, since the mismatched
# answers of its KL term are laid out before). So up to a thousand pairs are learnt as one half epoch of nothing but
# desirable answers and one of nothing but undesirable ones; no batch holds both, in no epoch. Nothing is said.
# Unpairing by unpair_preference_dataset and shuffling before the trainer gets the rows mixes them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install \
    trl==1.16.0 transformers==5.24.0 peft==0.21.2 datasets==5.2.0
export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$folder/cache" TQDM_DISABLE=1 CUDA_VISIBLE_DEVICES=
"$folder/venv/bin/python" -W ignore - "$folder/run" 2> "$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import sys
from itertools import groupby

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast
from trl import KTOConfig, KTOTrainer
from trl.data_utils import unpair_preference_dataset

words = ["<pad>", "<eos>", "<bos>", "<unk>", "sky", "is", "the", "blue", "green"]
tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
)
sizes = dict(vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
             num_attention_heads=2, num_key_value_heads=1, head_dim=16)  # fmt: skip


def batches(rows):
    """The labels of each batch of an epoch, as the trainer has them."""
    off = dict(report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, per_device_train_batch_size=8)
    trainer = KTOTrainer(
        model=Gemma2ForCausalLM(Gemma2Config(**sizes)),
        args=KTOConfig(sys.argv[1], **off),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    return [batch["label"].tolist() for batch in trainer.get_train_dataloader()]


def mixed(labels):
    return sum(len(set(batch)) == 2 for batch in labels)


pairs = Dataset.from_list([{"prompt": "the sky is", "chosen": " blue", "rejected": " green"}] * 1200)
given, shuffled = batches(pairs), batches(unpair_preference_dataset(pairs).shuffle(seed=0))
runs = [(label, len(list(run))) for label, run in groupby(label for batch in given for label in batch)]
told = ", ".join(f"{count} {'desirable' if label else 'undesirable'}" for label, count in runs)
print(f"1200 pairs: {told}; of {len(given)} batches {mixed(given)} hold both, {mixed(shuffled)} if shuffled before")
assert mixed(shuffled) > 0.9 * len(shuffled)
blocks = [(True, 1000), (False, 1000), (True, 200), (False, 200)]
assert runs == blocks, f"the behaviour changed: {runs[:10]}"
PYTHON
# seen: 1200 pairs: 1000 desirable, 1000 undesirable, 200 desirable, 200 undesirable; of 300 batches 0 hold both, 298 if shuffled before
