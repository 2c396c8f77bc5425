"""The page of a preview: tokens, figures and pictures in one file, nothing that comes alive, whole or not there."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import pytest

from gemma_ft.data.check.preview import Preview, build_preview
from gemma_ft.data.conversation import Conversation, Item, PlainText, Turn
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.tokenizer import load_tokenizer
from gemma_ft.data.pack.arrange import prepare
from gemma_ft.errors import DiskError, UserError
from gemma_ft.ui.pages import preview as page
from gemma_ft.ui.pages.preview import check_page, write_preview
from tests.ui.test_report import HOSTILE, TAGS, Seen

TINY = Path(__file__).resolve().parents[2] / "data" / "gemma-tiny"
RECIPE = Path("recipes/mine.yaml")
ITEMS: list[Item] = [
    Conversation("a.jsonl:1", (Turn("user", "Hi"), Turn("assistant", "Yes, it is."))),
    Conversation("a.jsonl:2", (Turn("user", "Count"), Turn("assistant", "one two three " * 40))),
    PlainText("b.txt:1", "once upon a time " * 3),
]


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(load_tokenizer(str(TINY)))


def looked(encoder: ChatEncoder, items: list[Item] = ITEMS, **options: Any) -> Preview:
    return build_preview(prepare(items, encoder, max_seq_len=64, packing=True), encoder, global_batch_size=2, **options)


def seen(preview: Preview, tmp_path: Path) -> Seen:
    return Seen(write_preview(preview, tmp_path / "out.html", recipe=RECIPE).read_text(encoding="utf-8"))


def test_what_is_not_read_is_told_beside_the_checks(encoder: ChatEncoder, tmp_path: Path) -> None:
    found = looked(encoder, [PlainText("a.jsonl:1", "<|im_start|>user\nHi<|im_end|>", unread=("system",))])
    text = seen(found, tmp_path).text
    assert "✓ every example has trained tokens" in text
    assert "! not read: system in 1 row" in text
    assert "! 1 of 1 rows spell a chat template as text (ChatML's <|im_start|>)" in text


def test_tokens_figures_and_pictures_are_there(encoder: ChatEncoder, tmp_path: Path) -> None:
    found = looked(encoder)
    read = seen(found, tmp_path)
    stats = found.stats
    for expected in (
        "Preview of mine.yaml recipes/mine.yaml",
        f"tokens in an epoch {stats.tokens} 3 documents",
        f"trained {stats.trained_tokens / stats.tokens:.1%} {stats.trained_tokens} tokens",
        f"packing efficiency {stats.tokens / 128:.1%} 1.5 documents in an example",
        "optimizer steps in an epoch 1 2 examples, 2 in a step",
        f"truncated 1 {found.overview.cut_tokens} tokens cut off",
        "✓ <bos> once in each of 3 sequences, at the start",
        "trained masked control control, trained truncated document boundary ↵ line break",
        "document 1 · a.jsonl:1", "document 2 · b.txt:1", "document 1 · a.jsonl:2 · 64 tokens",
        f"✂ {found.overview.cut_tokens} tokens past this point are truncated",
        "source rows documents tokens trained trained share truncated a.jsonl 2 2",
    ):  # fmt: skip
        assert expected in read.text, expected
    assert [attributes["alt"] for tag, attributes in read.tags if tag == "img"] == [
        "How many documents have how many tokens",
        "How many documents have how large a share of trained tokens",
        "How many examples have how many tokens",
    ]
    classes = [attributes["class"] for tag, attributes in read.tags if tag == "span" and "title" in attributes]
    assert classes.count("control trained") == 2  # an <end_of_turn> and an <eos>; of the cut answer there is no end
    assert classes.count("control") == 3 + 2 * 3  # each <bos>, and what begins and ends a question
    assert classes.count("truncated") == 24


def test_each_token_has_its_kind_and_id(encoder: ChatEncoder, tmp_path: Path) -> None:
    html = write_preview(looked(encoder, ITEMS[:1]), tmp_path / "out.html", recipe=RECIPE).read_text(encoding="utf-8")
    whole = encoder.encode(ITEMS[0])  # type: ignore[arg-type]
    spans = re.findall(r'<span class="(trained|masked|control|control trained)" title="([\d ]+)">', html)
    assert [int(number) for _, numbers in spans for number in numbers.split()] == whole.input_ids
    trained = [kind.endswith("trained") for kind, numbers in spans for _ in numbers.split()]
    assert trained == [label != -100 for label in whole.labels]


def test_it_needs_nothing_but_itself(encoder: ChatEncoder, tmp_path: Path) -> None:
    read = seen(looked(encoder), tmp_path)
    assert {tag for tag, _ in read.tags} <= TAGS | {"span"}
    names = {name for _, attributes in read.tags for name in attributes}
    assert names <= {"lang", "charset", "name", "content", "http-equiv", "class", "src", "alt", "title"}
    for picture in read.pictures:
        assert not re.search(r'(?:href|src)="(?!#)', picture)


def test_text_of_rows_only_shows(encoder: ChatEncoder, tmp_path: Path) -> None:
    hostile = Conversation(f"{HOSTILE}:1", (Turn("user", HOSTILE), Turn("assistant", HOSTILE)))
    read = seen(looked(encoder, [hostile, *ITEMS]), tmp_path)
    assert {tag for tag, _ in read.tags} <= TAGS | {"span"}
    assert not any(name.startswith("on") for _, attributes in read.tags for name in attributes)
    html = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert not {"\x1b", "\u202e"} & set(html)
    assert "{{" in read.text  # a template in a row is text


def test_faults_are_told(encoder: ChatEncoder, tmp_path: Path) -> None:
    prepared = prepare(ITEMS, encoder, max_seq_len=64, packing=True)
    part = prepared.examples.documents.parts[0]
    ids, starts = part.ids
    vars(part)["ids"] = ids.copy(), starts
    part.ids[0][starts[:-1]] = encoder.control.pad
    read = seen(build_preview(prepared, encoder), tmp_path)
    assert "✗ example 1, document 1: <bos> occurs 0 times, expected once, at the start" in read.text
    assert "✓" not in read.text
    assert ("p", {"class": "warning"}) in read.tags


def test_of_a_long_document_the_middle_is_left_out(encoder: ChatEncoder, tmp_path: Path) -> None:
    items: list[Item] = [PlainText("d.txt:1", "word " * 3000)]
    size = len(encoder.encode_documents([items[0]])[0].input_ids)  # type: ignore[arg-type]
    found = build_preview(prepare(items, encoder, max_seq_len=16384, packing=True), encoder)
    assert f"... {size - 1500:,} tokens not shown ..." in seen(found, tmp_path).text


def test_the_same_data_gives_the_same_bytes_over_an_older_page(encoder: ChatEncoder, tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    out.write_text("<html>older</html>")
    first = write_preview(looked(encoder), out, recipe=RECIPE).read_bytes()
    assert b"older" not in first
    assert write_preview(looked(encoder), out, recipe=RECIPE).read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["out.html"]


def test_a_picture_says_what_its_last_bar_holds(
    encoder: ChatEncoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    labels: list[str] = []

    def drawn(*_: object, x_label: str, **__: object) -> str:
        labels.append(x_label)
        return ""

    monkeypatch.setattr(page, "histogram_picture", drawn)
    items = [*ITEMS[:1] * 200, PlainText("b.txt:1", "word " * 500)]
    size = len(encoder.encode_documents([items[-1]])[0].input_ids)  # type: ignore[arg-type]
    write_preview(looked(encoder, items), tmp_path / "out.html", recipe=RECIPE)
    assert labels[0] == f"tokens of a document, before any cut (the last bar: also 1 longer, up to {size:,})"
    assert "last bar" not in labels[2]


def refusal(out: Path) -> str:
    with pytest.raises(UserError) as caught:
        check_page(out)
    return str(caught.value)


def test_where_no_page_can_be(encoder: ChatEncoder, tmp_path: Path) -> None:
    away = tmp_path / "nowhere" / "out.html"
    assert refusal(away) == f"{away}: there is no folder {away.parent}; make it, or name another file with --html"
    assert refusal(tmp_path) == f"{tmp_path}: is a folder; name a file in it with --html"
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    assert refusal(rows) == f"{rows}: is there and is no page; name a file that ends in .html with --html"
    assert not away.parent.exists()
    with pytest.raises(UserError):
        write_preview(looked(encoder), rows, recipe=RECIPE)
    assert rows.read_text() == "{}"
    check_page(tmp_path / "page.txt")  # nothing is there
    check_page(tmp_path / "out.html")


def test_the_old_page_stays_where_the_new_one_cannot_be_written(
    encoder: ChatEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.html"
    out.write_text("old")

    def fails_with(code: int, words: str) -> None:
        def fail(*_: object) -> None:
            raise OSError(code, words)

        monkeypatch.setattr("os.replace", fail)

    fails_with(errno.ENOSPC, "No space left on device")
    with pytest.raises(DiskError) as full:
        write_preview(looked(encoder), out, recipe=RECIPE)
    assert str(full.value) == f"{out}: no space left for it; free some and run again"
    fails_with(errno.EACCES, "Permission denied")
    with pytest.raises(UserError) as refused:
        write_preview(looked(encoder), out, recipe=RECIPE)
    assert str(refused.value) == f"{out}: cannot be written: Permission denied; name another file with --html"
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.html"]


def test_faults_past_the_first_are_counted(encoder: ChatEncoder, tmp_path: Path) -> None:
    found = looked(encoder)
    many = Preview(**{**vars(found), "faults": [f"fault {number}" for number in range(page.FAULTS_SHOWN + 7)]})
    assert "✗ ... and 7 more" in seen(many, tmp_path).text
