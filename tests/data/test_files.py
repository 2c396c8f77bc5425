"""Rows in folders, behind patterns and URLs, compressed: the rows of the files, each with its own place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

from gemma_ft.data.read.sources import Row, read_rows
from gemma_ft.errors import DataError


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def compressed(data: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def message(source: str) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(source)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows" / "more").mkdir(parents=True)
    (tmp_path / "rows" / "b.jsonl").write_bytes(lines("b1", "b2"))
    (tmp_path / "rows" / "a.csv").write_text("text\na1\n")
    (tmp_path / "rows" / "more" / "c.json.gz").write_bytes(compressed(b'[{"text": "c1"}]', ".gz"))
    (tmp_path / "rows" / "notes.md").write_text("not rows")
    return tmp_path / "rows"


def test_a_folder_is_all_files_of_rows_in_it_by_name(folder: Path) -> None:
    a, b, c = (Row(where, {"text": text}) for where, text in (("rows/a.csv:2", "a1"), ("rows/b.jsonl:1", "b1"),
                                                             ("rows/b.jsonl:2", "b2")))  # fmt: skip
    assert read_rows("rows") == [a, b, c, Row("rows/more/c.json.gz:1", {"text": "c1"})]
    assert read_rows("rows/*.jsonl") == [b, c]
    assert read_rows("rows/**/*.json.gz") == [Row("rows/more/c.json.gz:1", {"text": "c1"})]
    assert read_rows("rows/[ab].*") == [a, b, c]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".txt", ".parquet"])
def test_compressed_files_are_read_as_what_they_hold(tmp_path: Path, kind: str, suffix: str) -> None:
    plain = tmp_path / f"rows{kind}"
    if kind == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.table({"text": ["one", "two"]}), plain)
    else:
        plain.write_bytes({".csv": b"text\none\ntwo\n", ".txt": b"one\r\ntwo"}.get(kind, lines("one", "two")))
    packed = tmp_path / f"rows{kind}{suffix}"
    packed.write_bytes(compressed(plain.read_bytes(), suffix))
    assert [row.fields for row in read_rows(str(packed))] == [row.fields for row in read_rows(str(plain))]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_torn_or_false_archive_is_one_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(compressed(lines(*map(str, range(2000))), suffix)[:-40])
    assert message(str(path)).startswith(f"{path}: ")
    path.write_bytes(lines("not compressed"))
    assert message(str(path)).startswith(f"{path}: cannot be read: ")
    assert "\n" not in message(str(path))


def test_hidden_files_are_not_meant_and_a_closed_folder_is_told(folder: Path) -> None:
    (folder / "._b.jsonl").write_bytes(b"not rows")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "b-checkpoint.jsonl").write_bytes(lines("b1"))
    assert len(read_rows("rows")) == 4
    assert message(f"{'y' * 300}.jsonl").startswith("y")


def test_urls_go_through_fsspec() -> None:
    system = fsspec.filesystem("memory")
    system.pipe("/bucket/a.jsonl", lines("a1"))
    system.pipe("/bucket/b.jsonl.gz", compressed(lines("b1"), ".gz"))
    system.pipe("/bucket/notes.md", b"x")
    a, b = Row("memory://bucket/a.jsonl:1", {"text": "a1"}), {"text": "b1"}
    assert read_rows("memory://bucket/a.jsonl") == [a]
    assert [row.fields for row in read_rows("memory://bucket")] == [a.fields, b]
    assert [row.fields for row in read_rows("memory://bucket/*.gz")] == [b]
    assert message("memory://bucket/none.jsonl") == "memory://bucket/none.jsonl: no such file"
    assert message("nosuch://bucket/a.jsonl").startswith("nosuch://bucket/a.jsonl: cannot be read: ")


def test_a_scheme_whose_package_is_missing_says_so() -> None:
    found = message("s3://bucket/a.jsonl")
    assert found.startswith("s3://bucket/a.jsonl: s3:// needs a package that is not installed: ")
