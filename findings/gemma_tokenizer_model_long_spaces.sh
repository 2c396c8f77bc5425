#!/usr/bin/env bash
# transformers 5.24.0: a GemmaTokenizer made from tokenizer.model alone ranks its merges by the id of the piece they
# make, not by its score. Gemma's runs of spaces (2 to 31, all of one score, ids from short to long) then win in another
# order: 32 spaces become 16 + 16, where SentencePiece, llama.cpp and a published tokenizer.json take 31 and leave one
# for the next word. Rows with tables or deep indentation are trained on ids that the served model never sees; nothing
# warns.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install \
    transformers==5.24.0 sentencepiece==0.2.3 protobuf==7.36.2
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import GemmaTokenizer

folder = sys.argv[1]
text = ["def area(width, height):", "    return width * height", "a table of widths and heights", "a box"] * 20
SentencePieceTrainer.train(
    sentence_iterator=iter(text), model_prefix=f"{folder}/tokenizer", model_type="bpe", vocab_size=380,
    pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>",
    user_defined_symbols=["<mask>"] + ["▁" * length for length in range(2, 32)], byte_fallback=True,
    normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, minloglevel=2,
)  # fmt: skip
theirs = SentencePieceProcessor(model_file=f"{folder}/tokenizer.model")
tokenizer = GemmaTokenizer.from_pretrained(folder)


def spaces(length):
    """How many spaces each piece of "a", spaces, "b" holds: by SentencePiece, by transformers."""
    row = "a" + " " * length + "b"
    both = theirs.encode(row), tokenizer.encode(row, add_special_tokens=False)
    return [[theirs.id_to_piece(id).count("▁") for id in ids] for ids in both]


seen = {length: spaces(length) for length in (31, 32, 40)}
print(*(f"{length} spaces: SentencePiece {sp}, transformers {hf}" for length, (sp, hf) in seen.items()), sep="; ")
assert all(theirs.encode(row) == tokenizer.encode(row, add_special_tokens=False) for row in text)
assert spaces(31) == [[0, 31, 0], [0, 31, 0]], spaces(31)
assert spaces(32) == [[0, 31, 1], [0, 16, 16, 0]], f"the behaviour changed: 32 spaces are {spaces(32)}"
PYTHON
# seen: 31 spaces: SentencePiece [0, 31, 0], transformers [0, 31, 0]; 32 spaces: SentencePiece [0, 31, 1], transformers [0, 16, 16, 0]; 40 spaces: SentencePiece [0, 31, 9, 0], transformers [0, 16, 24, 0]
