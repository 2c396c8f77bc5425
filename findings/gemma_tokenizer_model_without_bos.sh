#!/usr/bin/env bash
# transformers 5.24.0: GemmaTokenizer's docstring says add_bos_token "defaults to True"; it is False. A folder with
# tokenizer.model and no tokenizer_config.json (as the original checkpoints come) gives texts without <bos>, and Gemma
# is trained or asked without the token that every text of its training began with. A tokenizer.json hides it: its own
# post-processor puts <bos> before the text, while tokenizer.add_bos_token still says False.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install \
    transformers==5.24.0 sentencepiece==0.2.3 protobuf==7.36.2
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - "$folder" <<'PYTHON'
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


def first(**options):
    """The first token of a text."""
    tokenizer = GemmaTokenizer.from_pretrained(folder, **options)
    return tokenizer.convert_ids_to_tokens(tokenizer("a box").input_ids)[0]


documented = "add_bos_token (`bool`, optional, defaults to True)" in GemmaTokenizer.__doc__
print(f"documented default True: {documented}; first token: {first()}; asked for: {first(add_bos_token=True)}")
assert documented, "the behaviour changed: the docstring names another default"
assert first(add_bos_token=True) == "<bos>"
assert first() == "a", "the behaviour changed: <bos> comes first by default"
PYTHON
# seen: documented default True: True; first token: a; asked for: <bos>
