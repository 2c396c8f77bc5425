#!/usr/bin/env bash
# datasets 5.2.0: a file whose name holds two words for one split is read twice. `test_eval.jsonl` matches both "test"
# and "eval", `dev-val.jsonl` both "dev" and "val", `train_train.jsonl` "train" in two ways: the split has every row two
# times. load_dataset(FOLDER) says nothing; a tuning run takes twice the steps per epoch, and a test's count is wrong.
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

seen = {}
for name in ("test.jsonl", "test_eval.jsonl", "dev-val.jsonl", "train_train.jsonl"):
    rows = Path(sys.argv[1]) / name.removesuffix(".jsonl")
    rows.mkdir()
    (rows / name).write_text("".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(3)))
    (split,) = load_dataset(str(rows), cache_dir=f"{sys.argv[1]}/cache").values()
    seen[name] = split["text"]
print("; ".join(f"{name}: 3 rows in the file, {len(rows)} in the split" for name, rows in seen.items()))
assert len(seen.pop("test.jsonl")) == 3
for name, rows in seen.items():
    twice = sorted(f"row {number}" for number in [0, 1, 2] * 2)
    assert sorted(rows) == twice, f"the behaviour changed: {name}: {rows}"
PYTHON
# seen: test.jsonl: 3 rows in the file, 3 in the split; test_eval.jsonl: 3 rows in the file, 6 in the split; dev-val.jsonl: 3 rows in the file, 6 in the split; train_train.jsonl: 3 rows in the file, 6 in the split
