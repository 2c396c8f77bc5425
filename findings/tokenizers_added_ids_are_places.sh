#!/usr/bin/env bash
# tokenizers 0.23.3: the "id" of an added token in tokenizer.json is a wish. Tokens behind the vocabulary are numbered by
# their place in the list, so taking one of them out (an image token that a text model does not need, say) gives every
# token behind it another id than the file says: text is then encoded to another token's row. Nothing raises; loading
# prints nothing in Python. A tokenizer edited that way has to keep the place filled, or have the name in model.vocab.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PYTHON'
import json

from tokenizers import AddedToken, Tokenizer, models

tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
tokenizer.add_tokens([AddedToken("<image>", normalized=False), AddedToken("<mine>", normalized=False)])
before = tokenizer.encode("a<mine>").ids

spec = json.loads(tokenizer.to_str())
spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<image>"]
written = spec["added_tokens"][0]["id"]
after = Tokenizer.from_str(json.dumps(spec)).encode("a<mine>").ids
print(f"with <image> before it: {before}; the file says <mine> is {written}; without <image>: {after}")
assert before == [0, 3], before
assert written == 3, written
assert after == [0, 2], "the behaviour changed: ids are now taken from the file"
PYTHON
# seen: with <image> before it: [0, 3]; the file says <mine> is 3; without <image>: [0, 2]
