"""What a preview shows of pairs and labelled answers: the common head once, both halves, what is trained of them."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from gemma_ft.data.check.preview import Preview, build_preview
from gemma_ft.data.conversation import Conversation, Pair, Turn
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.pack.arrange import prepare
from gemma_ft.ui.data_preview import show
from gemma_ft.ui.pages.preview import sections_of

PROMPT = (Turn("user", "Hi"), Turn("assistant", "Hello!", train=False), Turn("user", "Two and two?"))
PAIR = Pair("a.jsonl:4", PROMPT, (Turn("assistant", "Four."),), (Turn("assistant", "Four, or five."),), 0.5, 2.0)
HEAD = [
    "  <bos><start_of_turn>user↵",
    "  Hi<end_of_turn>↵",
    "  <start_of_turn>model↵",
    "  Hello!<end_of_turn>↵",
    "  <start_of_turn>user↵",
    "  Two and two?<end_of_turn>↵",
    "  <start_of_turn>model↵",
]


def previewed(items: list[Any], encoder: ChatEncoder, **options: Any) -> Preview:
    return build_preview(prepare(items, encoder, max_seq_len=64, packing=True), encoder, **options)


def lines_of(preview: Preview, width: int) -> list[str]:
    output = io.StringIO()
    show(preview, Console(file=output, width=width, color_system=None))
    return [line.rstrip() for line in output.getvalue().splitlines()]


def test_a_pair_has_its_prompt_once_and_both_halves(encoder: ChatEncoder) -> None:
    preview = previewed([PAIR], encoder)
    whole = [encoder.encode(half) for half in PAIR.halves]
    (example,) = preview.shown
    prompt, *halves = example.documents
    for half, one in zip(halves, whole, strict=True):
        assert [*prompt.ids, *half.ids] == one.input_ids
        assert [*prompt.labels, *half.labels] == one.labels
    assert list(prompt.ids) == encoder.encode_prompt(PROMPT)
    sizes = [len(one.ids) for one in example.documents]
    assert [one.title for one in example.documents] == [
        f"prompt · a.jsonl:4 · {sizes[0]} tokens · weight 2 · margin 0.5",
        f"chosen · a.jsonl:4 · {sizes[1]} tokens",
        f"rejected · a.jsonl:4 · {sizes[2]} tokens",
    ]


def test_halves_stand_one_under_the_other_or_side_by_side(encoder: ChatEncoder) -> None:
    preview = previewed([PAIR], encoder)
    prompt, chosen, rejected = (f"── {one.title}" for one in preview.shown[0].documents)
    narrow, wide = (lines_of(preview, width) for width in (80, 120))
    assert narrow[2:17] == [
        prompt, *HEAD, "", chosen, "  ⟦Four.<end_of_turn>⟧↵", "", rejected, "  ⟦Four, or five.<end_of_turn>⟧↵", "",
    ]  # fmt: skip
    assert wide[2:11] == [prompt, *HEAD, ""]
    assert [line.split("  ")[0] for line in wide[11:12]] == [chosen]
    assert wide[11].endswith(rejected)
    assert wide[12].split() == ["⟦Four.<end_of_turn>⟧↵", "⟦Four,", "or", "five.<end_of_turn>⟧↵"]


def test_a_page_has_the_same(encoder: ChatEncoder) -> None:
    preview = previewed([PAIR], encoder)
    (section,) = [one for one in sections_of(preview) if one.title == "Examples, token by token"]
    shown: Any = section.blocks[-1]
    titles = [text for kind, text, _ in shown.tokens if kind == "boundary"]
    assert titles == [one.title for one in preview.shown[0].documents]


def test_a_head_that_is_cut_is_told_once(encoder: ChatEncoder) -> None:
    long = Pair("a.jsonl:1", (Turn("user", "Why? " * 40),), PAIR.chosen, PAIR.rejected)
    prepared = prepare([long], encoder, max_seq_len=48, packing=True, too_long="truncate_left")
    (example,) = build_preview(prepared, encoder).shown
    before = [one.before is not None for one in example.documents]
    assert before == [True, False, False]
    assert max(len(example.documents[0].ids) + len(one.ids) for one in example.documents[1:]) == 48


@pytest.mark.parametrize(("label", "name"), [(True, "a good answer"), (False, "a bad answer")])
def test_a_labelled_answer_has_its_label(encoder: ChatEncoder, label: bool, name: str) -> None:
    item = Conversation("a.jsonl:4", (*PROMPT, Turn("assistant", "Four.")), label=label)
    (document,) = previewed([item], encoder).shown[0].documents
    assert document.title == f"{name} · a.jsonl:4 · {len(encoder.encode(item).input_ids)} tokens"
    assert list(document.labels) == encoder.encode(item).labels


def test_answers_of_one_label_are_a_fault_and_of_both_are_none(encoder: ChatEncoder) -> None:
    good, bad = (Conversation("a.jsonl:4", (*PROMPT, Turn("assistant", "Four.")), label=one) for one in (True, False))
    assert previewed([good, bad], encoder).faults == []
    assert previewed([bad, bad], encoder).faults == [
        "all 2 answers are called bad; objective kto learns from both: add rows with the other label, or set "
        "objective.kind: sft for good answers alone"
    ]


def test_a_pair_is_found_by_its_row(encoder: ChatEncoder) -> None:
    pairs = [PAIR, Pair("a.jsonl:5", (Turn("user", "q"),), PAIR.chosen, PAIR.rejected)]
    preview = previewed(pairs, encoder, row_ids=["a.jsonl:5"])
    assert [example.documents[0].title for example in preview.shown] == [
        f"prompt · a.jsonl:5 · {len(preview.shown[0].documents[0].ids)} tokens · ◀ asked for"
    ]
