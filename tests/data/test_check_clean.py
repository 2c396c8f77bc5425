"""Cleaned copies: what is left out and why, what stays byte for byte, and a source that is never touched."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from gemma_ft.data.check.clean import Copy, copy_clean
from gemma_ft.data.check.rows import RowSource, Side
from gemma_ft.data.check.survey import survey
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.encode_rows import Reading
from gemma_ft.data.read.sources import read_chunks
from gemma_ft.errors import DataError

File = Callable[[str, str | bytes], str]
Clean = Callable[..., list[Copy]]


def line(prompt: Any, completion: Any = "yes") -> bytes:
    return json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False).encode()


@pytest.fixture
def clean(file: File, tmp_path: Path, encoder: ChatEncoder) -> Clean:
    """Copies sources, each (side, file), into the folder `out`."""

    def run(*sources: tuple[Side, str], form: str = "prompt_completion") -> list[Copy]:
        (tmp_path / "out").mkdir()
        reading = Reading(form, {}, encoder)
        return copy_clean([RowSource(side, name, partial(read_chunks, name), reading, "") for side, name in sources],
                          tmp_path / "out")  # fmt: skip

    return run


def changes() -> list[tuple[str, str, str]]:
    found = [json.loads(text) for text in Path("out/changes.log").read_text().splitlines()]
    assert all(list(one) == ["where", "what", "why"] for one in found)
    return [tuple(one.values()) for one in found]


def test_what_is_left_out_and_what_stays_as_it_was(file: File, clean: Clean) -> None:
    odd = b'{ "completion":"e\xcc\x81 \\u00e9",  "prompt" : "kept",\t"other": [1.50, null] }'  # spacing, NFD, escapes
    rows = [b"\xef\xbb\xbf" + line("first"), odd, b"{broken", line(None), line("lost \ufffd"), b"", line("first"),
            line("held out"), line("last")]  # fmt: skip
    train = file("train.jsonl", b"\r\n".join(rows))
    held_out = file("eval.jsonl", b"\n".join([line("held out"), line("lost \ufffd"), line("held out")]) + b"\n")
    before = Path(train).read_bytes(), Path(held_out).read_bytes()
    copies = clean(("train", train), ("eval", held_out))
    assert (Path(train).read_bytes(), Path(held_out).read_bytes()) == before
    assert Path("out/train.jsonl").read_bytes() == b"".join(one + b"\n" for one in (line("first"), odd, line("last")))
    assert Path("out/eval.jsonl").read_bytes() == line("held out") + b"\n"
    assert [(copy.name, copy.rows, copy.kept, dict(copy.left_out)) for copy in copies] == [
        ("train.jsonl", 8, 3, {"bad row": 2, "U+FFFD": 1, "repeats another row": 1, "held out as well": 1}),
        ("eval.jsonl", 3, 1, {"U+FFFD": 1, "repeats another row": 1}),
    ]
    damaged = "holds U+FFFD, the sign for a character that was lost"
    assert sorted(changes()) == [
        ("eval.jsonl:2", "row left out", damaged),
        ("eval.jsonl:3", "row left out", "repeats eval.jsonl:1"),
        ("train.jsonl", "8 line ends CRLF made LF", "lines of JSON end in LF"),
        ("train.jsonl", "byte order mark left out", "UTF-8 needs none"),
        ("train.jsonl:3", "row left out",
         "not valid JSON: Expecting property name enclosed in double quotes (column 2)"),
        ("train.jsonl:4", "row left out", "'prompt' is null, expected text"),
        ("train.jsonl:5", "row left out", damaged),
        ("train.jsonl:7", "row left out", "repeats train.jsonl:1"),
        ("train.jsonl:8", "row left out", "it is held out for evaluation as well"),
    ]  # fmt: skip


def test_a_check_of_the_copies_finds_none_of_what_was_fixed(file: File, clean: Clean, encoder: ChatEncoder) -> None:
    lost = ["\ufffd", "", ""]
    rows = [line(f"row {number % 7} {lost[number % 3]}") for number in range(40)] + [b"[]", b"}"]
    train = file("train.jsonl", b"\xef\xbb\xbf" + b"\r\n".join(rows))
    held_out = file("eval.jsonl", line("row 1 ") + b"\n" + line("row 1 ") + b"\n")
    reading = Reading("prompt_completion", {}, encoder)

    def kinds(folder: str) -> set[str]:
        names: list[tuple[Side, str]] = [("train", folder + train), ("eval", folder + held_out)]
        sources = [RowSource(side, name, partial(read_chunks, name), reading, "") for side, name in names]
        return {one.kind.name for one in survey(sources, max_seq_len=64).findings.all()}

    fixed = {"bad_row", "overlap", "duplicate", "replacement_character"}
    assert kinds("") == fixed
    clean(("train", train), ("eval", held_out))
    assert kinds("out/") == set()
    assert not Path("out/train.jsonl").read_bytes().startswith(b"\xef\xbb\xbf")
    assert b"\r" not in Path("out/train.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "form", "line_ends"),
    [
        ("rows.json", b'[{"prompt": "a", "completion": "1"},\n{"prompt": "b", "completion": "2"}]', "", 0),
        ("rows.csv", b"prompt,completion\r\na,1\r\nb,2\r\n", "", 3),
        ("rows.txt", b"one\r\ntwo", "text", 1),
    ],
)
def test_every_kind_of_file_becomes_lines(
    name: str, content: bytes, form: str, line_ends: int, file: File, clean: Clean
) -> None:
    clean(("train", file(name, content)), form=form or "prompt_completion")
    rows = [json.loads(text) for text in Path("out/train.jsonl").read_text().splitlines()]
    pairs = [{"prompt": "a", "completion": "1"}, {"prompt": "b", "completion": "2"}]
    assert rows == ([{"text": "one\ntwo"}] if form else pairs)
    told = [(name, f"{line_ends:,} line ends CRLF made LF", "lines of JSON end in LF")] if line_ends else []
    assert changes() == told


def test_values_that_json_does_not_have_are_written_as_text(file: File, clean: Clean) -> None:
    import datetime

    file("rows.parquet", b"")
    table = pa.table({"prompt": ["a"], "completion": ["b"], "made": [datetime.date(2024, 5, 1)]})
    pyarrow.parquet.write_table(table, "rows.parquet")
    clean(("train", "rows.parquet"))
    assert json.loads(Path("out/train.jsonl").read_text()) == {"prompt": "a", "completion": "b", "made": "2024-05-01"}


def test_half_a_surrogate_pair_in_a_field_that_is_not_read(file: File, clean: Clean) -> None:
    clean(("train", file("rows.json", '[{"prompt": "a", "completion": "b", "other": "\\ud83d"}]')))
    assert json.loads(Path("out/train.jsonl").read_text())["other"] == "\ud83d"


def test_sources_of_a_side_are_numbered_and_share_what_was_seen(file: File, clean: Clean) -> None:
    one, two = file("one.jsonl", line("a") + b"\n" + line("b")), file("two.jsonl", line("b") + b"\n" + line("c"))
    copies = clean(("train", one), ("train", two))
    assert [copy.name for copy in copies] == ["train-1.jsonl", "train-2.jsonl"]
    assert Path("out/train-2.jsonl").read_bytes() == line("c") + b"\n"
    assert changes() == [("two.jsonl:1", "row left out", "repeats one.jsonl:2")]


def test_a_source_of_which_nothing_is_left_is_refused(file: File, clean: Clean) -> None:
    name = file("rows.jsonl", line("a"))
    with pytest.raises(DataError) as error:
        clean(("train", name), ("eval", name))
    assert str(error.value) == "rows.jsonl: no row of it would be left; gemma-ft data check says why"
