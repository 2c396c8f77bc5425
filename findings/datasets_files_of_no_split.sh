#!/usr/bin/env bash
# datasets 5.2.0: as soon as one file in a folder has a split's word in its name, files without such a word are left
# out. Beside train.jsonl, chats.jsonl is not read; beside my_test_cases.jsonl (a "test") all other files vanish and
# there is no train split. load_dataset(FOLDER, split="train") says nothing: who adds a second file to a folder of
# training rows tunes on the first alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install datasets==5.2.0
HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import sys
from pathlib import Path

from datasets import load_dataset


def read(*names):
    """Which files' rows load_dataset gives for a folder of these files, by split."""
    rows = Path(sys.argv[1]) / "-".join(name.removesuffix(".jsonl") for name in names)
    rows.mkdir()
    for name in names:
        (rows / name).write_text(json.dumps({"file": name}) + "\n")
    splits = load_dataset(str(rows), cache_dir=f"{sys.argv[1]}/cache")
    return {name: sorted(split["file"]) for name, split in splits.items()}


two, trained = read("chats.jsonl", "sums.jsonl"), read("train.jsonl", "chats.jsonl")
tested = read("chats.jsonl", "my_test_cases.jsonl")
print(f"chats + sums: {two}; train + chats: {trained}; chats + my_test_cases: {tested}")
assert two == {"train": ["chats.jsonl", "sums.jsonl"]}, two
assert trained == {"train": ["train.jsonl"]}, f"the behaviour changed: {trained}"
assert tested == {"test": ["my_test_cases.jsonl"]}, f"the behaviour changed: {tested}"
PYTHON
# seen: chats + sums: {'train': ['chats.jsonl', 'sums.jsonl']}; train + chats: {'train': ['train.jsonl']}; chats + my_test_cases: {'test': ['my_test_cases.jsonl']}
