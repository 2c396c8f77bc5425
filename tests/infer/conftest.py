"""Work on a file of prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_ft.infer.batch_file import BatchFile, BatchOptions
from gemma_ft.infer.sampling import Sampling

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
ROWS = [
    {
        "id": day[:3],
        "prompt": f"Set up a budget review on {day} with Paul" + " at 10:15 for 20 minutes." * (len(day) % 2),
    }
    for day in DAYS
]
DRAWN = BatchOptions(max_new_tokens=14, sampling=Sampling(temperature=1.0, seed=5))
GREEDY = BatchOptions(max_new_tokens=9, sampling=Sampling())
MODEL = {"model": "m1"}
Work = Callable[..., BatchFile]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    """Work on out.jsonl in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def make(how: BatchOptions = DRAWN, model: dict[str, str] = MODEL) -> BatchFile:
        return BatchFile("rows.jsonl", Path("out.jsonl"), how, model)

    return make
