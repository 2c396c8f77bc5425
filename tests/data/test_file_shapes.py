"""Further shapes of a file: lists over lines, other marks between cells, Arrow; and bytes that were damaged at
random.
"""

import gzip
import json

import pandas
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_ft.data.conversation import Conversation, PlainText
from gemma_ft.data.read.parse_rows import parse_rows
from gemma_ft.data.read.sources import Row, read_rows
from gemma_ft.errors import DataError
from tests.data.test_sources import File, message


@pytest.mark.parametrize(
    ("content", "first_line"),
    [
        ('{\n  "text": "one",\n  "more": [{"text": "no row"}]\n}\n', [1]),
        ('{\n  "text": "one"\n}\n\n{\n  "text": "two"\n}\n', [1, 5]),
        ('{"data": [{"text": "one"}, {"text": "two"}]}', [1, 1]),
        ('{\n "version": 1,\n "rows": [\n  {"text": "one"},\n  {"text": "two"}\n ],\n "total": 2\n}', [4, 5]),
        ('\n{"license": "cc0", "examples": [\n{"text": "one"}]\n}', [3]),
    ],
)
def test_objects_over_several_lines_and_lists_inside_one(file: File, content: str, first_line: list[int]) -> None:
    """What json.dump(..., indent=2), jq and pandas' to_json(orient="table") write."""
    for name in ("a.json", "b.json.gz"):
        file(name, content if name == "a.json" else gzip.compress(content.encode()))
        assert [row.where for row in read_rows(name)] == [f"{name}:{line}" for line in first_line]
    assert [row.fields["text"] for row in read_rows("a.json")] == ["one", "two"][: len(first_line)]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}]},
        {"instruction": "Add.", "instances": [{"input": "1 and 1", "output": "2"}]},
        {"prompt": "a", "completion": "b", "items": [{"id": 1}]},
        {"data": "text", "rows": [{"a": 1}, 2]},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_row_that_holds_a_list_stays_a_row(file: File, row: dict[str, object], indent: int | None) -> None:
    assert read_rows(file("a.json", json.dumps(row, indent=indent))) == [Row("a.json:1", row)]


def test_lines_that_are_no_lines_are_read_as_what_they_are(file: File) -> None:
    rows = [{"text": "one"}, {"text": "two"}]
    name = file("a.jsonl", json.dumps(rows, indent=1))
    assert read_rows(name) == [Row("a.jsonl:2", rows[0]), Row("a.jsonl:5", rows[1])]
    assert message(file("e.jsonl", '{\n{"text": "one"}\n')).startswith("e.jsonl:1: not valid JSON: "), "a torn line"
    assert read_rows(file("b.ndjson", json.dumps(rows[0], indent=1))) == [Row("b.ndjson:1", rows[0])]
    assert (
        message(file("c.jsonl", '[{"text": "one"}]\n{"text": "two"}\n')) == "c.jsonl:1: expected an object, got a list"
    )
    assert (
        message(file("d.jsonl", '{\n "text": "one"\n'))
        == "d.jsonl:3: not valid JSON: Expecting ',' delimiter (column 1)"
    )


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.tsv", 'question\tanswer\na, b\t"c\td"\n', {"question": "a, b", "answer": "c\td"}),
        ("a.csv", "question;answer\na, b;c\n", {"question": "a, b", "answer": "c"}),
        ("a.csv", "question\tanswer\na, b\tc\n", {"question": "a, b", "answer": "c"}),
        ("a.csv", "question,answer;\na,b;c\n", {"question": "a", "answer;": "b;c"}),
        ("a.csv", '"a;b"\nc;d\n', {"a;b": "c;d"}),
        ("a.csv", '"question";"answer"\n"a, b";"c;d"\n', {"question": "a, b", "answer": "c;d"}),  # all cells quoted
        ("a.csv", '"q;1"\t"answer"\n"a"\t"b"\n', {"q;1": "a", "answer": "b"}),
        ("a.csv", "question|answer\na, b|c\n", {"question": "a, b", "answer": "c"}),
        ("a.csv", "text\na;b|c\n", {"text": "a;b|c"}),
        ("a.ndjson", '{"question": "a"}\n', {"question": "a"}),
    ],
)
def test_other_marks_between_cells(file: File, name: str, content: str, expected: dict[str, str]) -> None:
    """ ";" is what spreadsheets write where a comma stands in numbers."""
    assert read_rows(file(name, content)) == [Row(f"{name}:{1 if name == 'a.ndjson' else 2}", expected)]


@pytest.mark.parametrize(("start", "mark"), [("sep=;\r\n", ";"), ('\ufeff"sep=|"\n', "|"), ("sep=,\n", ",")])
def test_a_line_of_excel_names_the_mark(file: File, start: str, mark: str) -> None:
    """a3dff15 took the line for the header."""
    rows = f"question{mark}answer\n'a{mark}b\n"
    assert read_rows(file("a.csv", start + rows)) == [Row("a.csv:3", {"question": "'a", "answer": "b"})]
    assert read_rows(file("b.csv", "sep,b\nsep=;,c\n")) == [Row("b.csv:2", {"sep": "sep=;", "b": "c"})]


def test_columns_without_a_name_have_that_of_pandas(file: File) -> None:
    """As pandas 3.0 reads back what DataFrame.to_csv wrote with its index: Unnamed: and the number of the column."""
    frame = pandas.DataFrame({"prompt": ["a", "b"], "completion": ["c", "d"]})
    frame.to_csv("x.csv")
    wanted = [{key: str(value) for key, value in row.items()} for row in pandas.read_csv("x.csv").to_dict("records")]
    assert [row.fields for row in read_rows("x.csv")] == wanted
    assert all(isinstance(item, Conversation) for item in parse_rows(read_rows("x.csv")))
    assert read_rows(file("y.csv", "a,b,\n1,2,\n"))[0].fields == {"a": "1", "b": "2", "Unnamed: 2": ""}
    assert message(file("z.csv", ",Unnamed: 0\n1,2\n")).startswith("z.csv:1: the header needs one distinct name")


@pytest.mark.parametrize("kind", ["stream", "file"])
@pytest.mark.parametrize("packed", [False, True])
def test_arrow(file: File, kind: str, packed: bool) -> None:
    """Streams are what datasets 5.2.0 saves, files what Feather is."""
    table = pyarrow.Table.from_pylist([{"text": "one", "more": {"a": [1]}}, {"text": "two", "more": None}])
    sink = pyarrow.BufferOutputStream()
    with (pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    data = bytes(sink.getvalue())
    name = file("a.arrow.gz", gzip.compress(data)) if packed else file("a.arrow", data)
    assert read_rows(name) == [Row(f"{name}:row {at}", row) for at, row in enumerate(table.to_pylist(), start=1)]
    assert message(file("b.arrow", data[: -len(data) // 2])).startswith("b.arrow: cannot be read as Arrow: ")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.xlsx", "a.xlsx: is a spreadsheet; save its sheet as CSV (UTF-8)"),
        ("a.ODS", "a.ODS: is a spreadsheet; save its sheet as CSV (UTF-8)"),
        ("a.tar.gz", "a.tar.gz: is an archive; unpack it, and name the folder"),
        (
            "a.jsonl.xz",
            "a.jsonl.xz: is compressed in a way that is not read; unpack it, or compress it with gzip or zstd",
        ),
        ("a.pkl", "a.pkl: is a pickle, which runs code when it is opened; write its rows as .jsonl or .parquet"),
    ],
)
def test_files_that_are_not_read_name_their_cure(file: File, name: str, expected: str) -> None:
    assert message(file(name, b"PK")) == expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv"])
def test_a_pointer_of_git_lfs_is_no_file_of_rows(file: File, name: str) -> None:
    """What a clone without Git LFS holds (git-lfs 3, docs/spec.md)."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n"
    assert message(file(name, pointer)) == f"{name}: is a pointer of Git LFS, not the file; fetch it (git lfs pull)"


SEEDS = {
    ".jsonl": b'{"prompt": "a", "completion": "b"}\n{"text": null}\n{"messages": [{"role": "user", "content": "a"}]}',
    ".json": b'[{"instruction": "a", "output": ["b"]}, {"conversations": [{"from": "gpt", "value": "x"}]}]',
    ".csv": b'question,answer\r\n"a, ""b""","one\ntwo"\r\nc,d\r\n',
    ".txt": b"\xef\xbb\xbfone\r\ntwo \xc3\xa9\n",
    ".parquet": b"PAR1\x15\x04\x15\x10PAR1",
    ".tsv": b"question\tanswer\na\tb\n",
    ".arrow": b"ARROW1\x00\x00\xff\xff\xff\xff\x10",
}
SPLICES = st.sampled_from(
    [b"", b"\x00", b"\xff", b'"', b"{", b"]", b"\\ud800", b"\n", b"\r", b",", b"null", b"1e999", b"[" * 3000]
)


@settings(max_examples=400, deadline=None)
@given(suffix=st.sampled_from(sorted(SEEDS)), edits=st.lists(st.tuples(st.integers(0, 120), SPLICES), max_size=4))
def test_damaged_bytes_are_rows_or_a_plain_complaint(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, edits: list[tuple[int, bytes]]
) -> None:
    data = SEEDS[suffix]
    for at, splice in edits:
        data = data[:at] + splice + data[at + 1 :]
    path = tmp_path_factory.getbasetemp() / f"damaged{suffix}"
    path.write_bytes(data)
    items, complaint = [], ""
    try:
        items = parse_rows(read_rows(str(path)))
    except DataError as error:  # and nothing else
        complaint = str(error)
    assert complaint.startswith(str(path)) != bool(items)
    assert all(isinstance(item, Conversation | PlainText) for item in items)
