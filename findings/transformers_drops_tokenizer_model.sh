#!/usr/bin/env bash
# transformers 5.24.0: a GemmaTokenizer loaded from tokenizer.model says can_save_slow_tokenizer = True, and its
# save_pretrained writes tokenizer.json alone. A tuned model saved with its tokenizer has no tokenizer.model, whose
# scores and piece types converters to GGUF ask for: it has to be copied from the base by hand. save_vocabulary still
# writes it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install \
    transformers==5.24.0 sentencepiece==0.2.3 protobuf==7.36.2
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import os
import sys

from sentencepiece import SentencePieceTrainer
from transformers import GemmaTokenizer

folder = sys.argv[1]
SentencePieceTrainer.train(
    sentence_iterator=iter(["the area of a box", "a table of widths"] * 20), model_prefix=f"{folder}/tokenizer",
    model_type="bpe", vocab_size=300, pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
    bos_piece="<bos>", unk_piece="<unk>", user_defined_symbols=["<mask>"], byte_fallback=True,
    normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, minloglevel=2,
)  # fmt: skip
tokenizer = GemmaTokenizer.from_pretrained(folder)
tokenizer.save_pretrained(f"{folder}/saved")
saved = sorted(os.listdir(f"{folder}/saved"))
tokenizer.save_vocabulary(f"{folder}/saved")
then = sorted(os.listdir(f"{folder}/saved"))
able = tokenizer.can_save_slow_tokenizer
print(f"can_save_slow_tokenizer: {able}; save_pretrained: {saved}; save_vocabulary: {then}")
assert able
assert "tokenizer.json" in saved and "tokenizer.model" in then, (saved, then)
assert "tokenizer.model" not in saved, "the behaviour changed: save_pretrained writes tokenizer.model"
PYTHON
# seen: can_save_slow_tokenizer: True; save_pretrained: ['tokenizer.json', 'tokenizer_config.json']; save_vocabulary: ['tokenizer.json', 'tokenizer.model', 'tokenizer_config.json']
