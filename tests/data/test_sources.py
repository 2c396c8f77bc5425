"""Files as rows with their places, and every kind of damage as one clear line."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pandas
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_ft.data.conversation import Conversation, Document
from gemma_ft.data.read.parse_rows import parse_rows
from gemma_ft.data.read.sources import Row, read_rows
from gemma_ft.errors import DataError

File = Callable[[str, str | bytes], str]


def message(source: str) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(source)
    return str(caught.value)


def test_json_lines_with_byte_order_mark_crlf_and_blank_lines(file: File) -> None:
    name = file("a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "two \\u2028"}')
    assert read_rows(name) == [Row("a.jsonl:1", {"text": "one"}), Row("a.jsonl:4", {"text": "two \u2028"})]


def test_only_a_line_feed_ends_a_json_line(file: File) -> None:
    name = file("a.jsonl", '{"text": "one\u2028two\u0085three"}\n{"text": "b"}')
    assert [row.fields["text"] for row in read_rows(name)] == ["one\u2028two\u0085three", "b"]


def test_bad_json_lines_are_all_named(file: File) -> None:
    lines = [b'{"a": 1}', b'{"a": ', b"[1]", b'"text"', b"null", b'{"a": "\xff"}', b'{"a": 1, "a": 2}', b"7"]
    assert message(file("a.jsonl", b"\n".join(lines))) == (
        "a.jsonl:2: not valid JSON: Expecting value (column 7)\n"
        "a.jsonl:3: expected an object, got a list\n"
        "a.jsonl:4: expected an object, got text\n"
        "a.jsonl:5: expected an object, got null\n"
        "a.jsonl:6: not valid UTF-8 (byte 0xff)\n"
        "... and 2 more bad rows"
    )


def test_a_key_twice_is_refused(file: File) -> None:
    expected = "a.jsonl:1: the key 'b' stands twice in one object"
    assert message(file("a.jsonl", '{"a": {"b": 1, "c": 2, "b": 3}}')) == expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_deep_nesting_is_refused(file: File, name: str) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    assert message(file(name, deep if name == "a.json" else '{"a": ' + deep + "}")) == f"{name}:1: nested too deeply"


def test_a_json_list_knows_its_lines(file: File) -> None:
    rows = [{"text": "one\ntwo"}, {"text": "three", "more": [1, 2]}, {"text": "four"}]
    name = file("a.json", "\n" + json.dumps(rows, indent=2) + "\n")
    assert read_rows(name) == [Row("a.json:3", rows[0]), Row("a.json:6", rows[1]), Row("a.json:13", rows[2])]


def test_a_json_file_of_json_lines(file: File) -> None:
    assert [row.where for row in read_rows(file("a.json", '{"text": "a"}\n{"text": "b"}\n'))] == [
        "a.json:1",
        "a.json:2",
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{\n "data": []\n}', "a.json: holds no rows"),
        ("7", "a.json: expected a list of objects, or one object per line"),
        ('[{"a": 1},\n {"a": }]', "a.json:2: not valid JSON: Expecting value (column 8)"),
        ('[{"a": 1}\n {"a": 2}]', "a.json:2: not valid JSON: expected ',' or ']' after an element"),
        ('[{"a": 1},\n', "a.json:2: not valid JSON: Expecting value (column 1)"),
        ('[{"a": 1}]\n]', "a.json:2: not valid JSON: text after the end of the list"),
        (
            '[{"a": 1},\n[2],\n3]',
            "a.json:2: expected an object, got a list\na.json:3: expected an object, got a number",
        ),
        ('[{"a": 1},\n{"b": 1, "b": 2}]', "a.json:2: the key 'b' stands twice in one object"),
        ("[]", "a.json: holds no rows"),
        ("", "a.json: holds no rows"),
        (b'[{"a":\n "\xff"}]', "a.json:2: not valid UTF-8 (byte 0xff); save it as UTF-8"),
    ],
)
def test_bad_json_files(file: File, content: str | bytes, expected: str) -> None:
    assert message(file("a.json", content)) == expected


def test_csv_with_quotes_line_breaks_and_crlf(file: File) -> None:
    name = file("a.csv", '\ufeffquestion,answer\r\n"a, ""b""","one\ntwo"\r\n\r\nc,d\r\n')
    assert read_rows(name) == [
        Row("a.csv:2", {"question": 'a, "b"', "answer": "one\ntwo"}),
        Row("a.csv:5", {"question": "c", "answer": "d"}),
    ]


def test_blank_lines_before_the_header_are_skipped(file: File) -> None:
    assert read_rows(file("a.csv", "\n \nquestion,answer\na,b\n")) == [Row("a.csv:4", {"question": "a", "answer": "b"})]


def test_csv_takes_fields_longer_than_the_modules_default(file: File) -> None:
    assert len(read_rows(file("a.csv", f"text\n{'x' * 200_000}\n"))[0].fields["text"]) == 200_000


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a,b\n1,2\n1,2,3\n1\n", "a.csv:3: has 3 cells, the header has 2\na.csv:4: has 1 cells, the header has 2"),
        ("a,a\n1,2\n", "a.csv:1: the header needs one distinct name for each column, got a, a"),
        ('a,b\n1,"2\n3,4\n', "a.csv:3: not valid CSV: unexpected end of data"),
        ("\n \na,a\n1,2\n", "a.csv:3: the header needs one distinct name for each column, got a, a"),
        (",\na,b\n1,2\n", "a.csv:1: the header needs one distinct name for each column, got , "),
        ("a,b\n", "a.csv: holds no rows"),
        ("", "a.csv: holds no rows"),
    ],
)
def test_bad_csv(file: File, content: str, expected: str) -> None:
    assert message(file("a.csv", content)) == expected


def test_parquet(file: File) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}]}, {"messages": []}]
    file("a.parquet", b"")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "a.parquet")
    assert read_rows("a.parquet") == [Row("a.parquet:row 1", rows[0]), Row("a.parquet:row 2", rows[1])]


def test_damaged_parquet(file: File) -> None:
    text = message(file("a.parquet", b"PAR1 this is none"))
    assert text.startswith("a.parquet: cannot be read as parquet: ")
    assert "\n" not in text


def test_text_is_one_row_with_plain_line_ends(file: File) -> None:
    assert read_rows(file("a.txt", b"\xef\xbb\xbfone\r\n\r\ntwo\rthree\n")) == [
        Row("a.txt:1", {"text": "one\n\ntwo\nthree\n"})
    ]


def test_damaged_text(file: File) -> None:
    assert message(file("a.txt", b"one\ntwo \xe9\n")) == "a.txt:2: not valid UTF-8 (byte 0xe9); save it as UTF-8"
    assert message(file("b.txt", "text".encode("utf-16"))) == "b.txt: is UTF-16; save it as UTF-8"
    assert message(file("c.txt", " \n")) == "c.txt: holds no rows"


def test_missing_files(file: File) -> None:
    file("my_chats.jsonl", "{}")
    assert message("my_chat.jsonl") == "my_chat.jsonl: no such file; did you mean 'my_chats.jsonl'?"
    assert message("my_chats") == "my_chats: no such file; did you mean 'my_chats.jsonl'?"
    assert message("other.csv") == "other.csv: no such file"
    assert message("nowhere/a.csv") == "nowhere/a.csv: no such file; there is no folder 'nowhere'"


def test_folders_and_unknown_types(file: File) -> None:
    Path(file("a.docx", "x")).with_name("chats").mkdir()
    kinds = ".jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow or .txt, also with .gz or .zst behind it"
    assert message("chats") == f"chats: the folder holds no file of rows ({kinds})"
    assert message("chats/*.x") == f"chats/*.x: the pattern holds no file of rows ({kinds})"
    assert message("a.docx") == f"a.docx: cannot tell the file type from '.docx'; use {kinds}"


def test_a_carriage_return_inside_a_row_does_not_end_it(file: File) -> None:
    assert read_rows(file("a.jsonl", b'{"text":\r"a"}\r\n')) == [Row("a.jsonl:1", {"text": "a"})]


def test_the_csv_modules_own_limit_is_given_back(file: File) -> None:
    before = csv.field_size_limit(123_456)
    try:
        read_rows(file("a.csv", "text\na\n"))
        message(file("b.csv", 'text\n"a\n'))
        assert csv.field_size_limit() == 123_456
    finally:
        csv.field_size_limit(before)


# Further shapes of a file


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
    assert all(isinstance(item, Conversation | Document) for item in items)
