"""Files as rows with their places, and every kind of damage as one clear line."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

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
