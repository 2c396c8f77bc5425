"""Thousands of small data files that were spoiled at random: each is rows or a complaint, and what is trained on is
sound.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma_ft.build.pretrained import load_tokenizer
from gemma_ft.data.conversation import texts_of
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.pack.arrange import Prepared, prepare
from gemma_ft.data.read.parse_rows import parse_rows
from gemma_ft.data.read.sources import read_rows
from gemma_ft.system.limits import IGNORE
from tests.faults.fuzz import bad_bytes, bad_json, bad_value
from tests.faults.test_fuzz import TINY, Case, Figure, fuzz

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi é"},
    {"role": "assistant", "content": "Yes."},
]
COLUMNS: tuple[dict[str, str], ...] = (
    {}, {}, {"prompt": "{question}", "completion": "{answer}"}, {"text": "{meta.n[0]}"}
)  # fmt: skip


ROWS: tuple[dict[str, Any], ...] = (
    {"messages": TURNS, "id": 7},
    {"conversations": [{"from": "human", "value": "a <b> c"}, {"from": "gpt", "value": "d\n\n\ne"}]},
    {"instruction": "Add.", "input": "2 2", "output": "4"},
    {"prompt": "What <start_of_turn> is it?", "completion": "It."},
    {"question": "q", "answer": "a", "meta": {"n": [1, 2]}},
    {"text": "A document\u2028 of <eos> words, with 漢字 in it."},
)


def spoiled_file(folder: Path, chance: random.Random) -> tuple[Path, bytes]:
    """A small data file with something wrong in it, in one of the formats."""
    kind = chance.choice((".jsonl", ".jsonl", ".json", ".csv", ".parquet", ".txt"))
    rows = [chance.choice(ROWS)] * chance.randint(1, 3)
    path = folder / f"rows{kind}"
    if kind == ".jsonl":
        bad = chance.randrange(len(rows))
        lines = [bad_json(row, chance) if i == bad else json.dumps(row).encode() for i, row in enumerate(rows)]
        data = chance.choice((b"\n", b"\r\n")).join(lines)
    elif kind == ".json":
        data = bad_json(list(rows), chance)
    elif kind == ".parquet":
        data = bad_bytes(parquet(bad_value(rows, chance) if chance.random() < 0.5 else rows), chance)
    else:
        text = io.StringIO()
        csv.writer(text).writerows([["question", "answer"], ["a,b", 'c "d"\ne'], ["f", "g"]])
        data = bad_bytes(text.getvalue().encode(), chance)
    path.write_bytes(data)
    return path, data


def parquet(rows: Any) -> bytes:
    """Rows as a parquet file; the good ones where the spoiled ones are no table."""
    import pyarrow.parquet

    sink = io.BytesIO()
    try:
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, sink)
    except (pyarrow.ArrowException, AttributeError, LookupError, TypeError, ValueError, OverflowError):  # no table
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROWS[3]] * 2), sink)
    return sink.getvalue()


def check_prepared(prepared: Prepared, encoder: ChatEncoder) -> None:
    """What holds for all data that is trained on."""
    control = encoder.control
    for example in prepared.examples:
        ids, labels = example["input_ids"], example["labels"]
        starts = [place for place, position in enumerate(example["position_ids"]) if position == 0]
        assert [place for place, token in enumerate(ids) if token == control.bos] == starts, "one BOS, first"
        assert ids.count(control.start_of_turn) == ids.count(control.end_of_turn) or len(ids) == 64, "whole turns"
        assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True)), "labels are the ids"
        assert any(label != IGNORE for label in labels), "something is trained"
        assert control.pad not in ids, "no padding inside"


def test_spoiled_rows(tmp_path: Path, figure: Figure) -> None:
    def make() -> Case:
        encoder = ChatEncoder(load_tokenizer(TINY))

        def case(chance: random.Random) -> tuple[Callable[[], Any], bytes]:
            path, data = spoiled_file(tmp_path, chance)
            columns = chance.choice(COLUMNS)

            def attempt() -> None:
                items = parse_rows(read_rows(str(path)), columns=columns)
                said = [text for item in items for text in texts_of(item)]
                assert "None" not in repr(said) or b"None" in data or b"N\\u" in data, "a null became text"
                check_prepared(prepare(items, encoder, max_seq_len=64, packing=chance.random() < 0.5), encoder)

            return attempt, data

        return case

    fuzz(make, 1, tmp_path, figure)
