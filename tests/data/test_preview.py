"""The preview shows tokens as they are trained, and its checks find what would spoil a run."""

import io
from typing import Any

import numpy
import pytest
from rich.console import Console

from gemma_ft.data.chat import ChatEncoder
from gemma_ft.data.dataset import Prepared, prepare
from gemma_ft.data.items import Conversation, Document, Turn
from gemma_ft.data.preview import find_faults, preview, token_text

CHAT = Conversation("a.jsonl:4", (Turn("user", "Hi <end_of_turn>"), Turn("assistant", "Yes\nit is")))


def shown(prepared: Prepared, encoder: ChatEncoder, *, colours: bool, rows: int = 3) -> tuple[bool, str]:
    output = io.StringIO()
    console = Console(file=output, force_terminal=colours, width=80, color_system="truecolor" if colours else None)
    return preview(prepared, encoder, rows=rows, console=console), output.getvalue()


def test_without_colours_brackets_mark_what_is_trained(encoder: ChatEncoder) -> None:
    passed, text = shown(prepare([CHAT], encoder, max_seq_len=64, packing=True), encoder, colours=False)
    assert passed
    size = len(encoder.encode(CHAT).input_ids)
    trained = sum(label != -100 for label in encoder.encode(CHAT).labels)
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines[0] == "tokens: ⟦trained⟧, others masked   ↵ line break"
    assert lines[1].startswith(f"example 1 of 1 · {size} tokens · {trained} trained ({trained / size:.0%}) ─")
    assert lines[2:8] == [
        f"document 1 · a.jsonl:4 · {size} tokens",
        "  <bos><start_of_turn>user↵",
        "  Hi <end_of_turn><end_of_turn>↵",
        "  <start_of_turn>model↵",
        "  ⟦Yes↵",
        "  it is<end_of_turn>⟧↵",
    ]
    assert lines[-3:] == [
        "✓ <bos> once in each of 1 sequences, at the start",
        "✓ <end_of_turn> is trained 1 times",
        "✓ every example has trained tokens",
    ]


def test_colours_tell_trained_masked_and_control_apart(encoder: ChatEncoder) -> None:
    encoded = encoder.encode(CHAT)
    text = token_text(encoded.input_ids, encoded.labels, encoder)
    styles = {text.plain[span.start : span.end].strip(): str(span.style) for span in text.spans}
    assert styles["<bos>"] == styles["<start_of_turn>"] == "magenta"
    asked, answered = text.plain.index("Hi"), text.plain.index("Yes")
    assert {str(span.style) for span in text.spans if asked <= span.start < asked + 16} == {"grey70", "grey50"}
    assert {str(span.style) for span in text.spans if answered <= span.start < answered + 9} == {"green", "bold green"}
    ends = [str(span.style) for span in text.spans if text.plain[span.start : span.end] == "<end_of_turn>"]
    assert ends == ["magenta", "bold black on green"]  # the typed one is text, in several tokens
    assert (
        "\x1b[1;30;42m<end_of_turn>"
        in shown(prepare([CHAT], encoder, max_seq_len=64, packing=True), encoder, colours=True)[1]
    )


def test_nothing_in_a_row_can_command_the_terminal(encoder: ChatEncoder) -> None:
    evil = Conversation("x:1", (Turn("user", "\x1b[2Jx\x07\x9b1m\x7f"), Turn("assistant", "[red]ok[/red]")))
    text = shown(prepare([evil], encoder, max_seq_len=64, packing=True), encoder, colours=False)[1]
    assert not {"\x1b", "\x07", "\x9b", "\x7f"} & set(text)
    assert "␛[2Jx␇" in text
    assert "[red]ok[/red]" in text


def test_bytes_of_one_character_are_shown_as_the_character(encoder: ChatEncoder) -> None:
    encoded = encoder.encode_document(Document("d:1", "漢字 🙂"))
    assert token_text(encoded.input_ids, encoded.labels, encoder).plain == "<bos>漢字 🙂<eos>"


def test_long_documents_show_head_and_tail(encoder: ChatEncoder) -> None:
    text = "word " * 3000
    prepared = prepare([Document("d:1", text)], encoder, max_seq_len=16384, packing=True)
    passed, output = shown(prepared, encoder, colours=False)
    assert passed
    hidden = len(encoder.encode_document(Document("d:1", text)).input_ids) - 500
    assert f"... {hidden:,} tokens not shown ..." in output
    assert "plain text: no turns, every token is trained" in output


def test_many_documents_in_an_example_are_counted(encoder: ChatEncoder) -> None:
    prepared = prepare([CHAT] * 9, encoder, max_seq_len=1024, packing=True)
    output = shown(prepared, encoder, colours=False)[1]
    assert "document 3 ·" in output
    assert "document 4 ·" not in output
    assert "... and 6 more in this example" in output


def broken(encoder: ChatEncoder, **columns: Any) -> list[str]:
    example = prepare([CHAT], encoder, max_seq_len=64, packing=True).examples[0]
    return find_faults([{**example, **{name: change(example[name]) for name, change in columns.items()}}], encoder)


def test_fault_01_missing_bos_is_found(encoder: ChatEncoder) -> None:
    faults = broken(encoder, input_ids=lambda ids: [encoder.control.pad, *ids[1:]])
    assert faults == ["example 1, document 1: <bos> occurs 0 times, expected once, at the start"]


def test_fault_02_doubled_bos_is_found(encoder: ChatEncoder) -> None:
    faults = broken(encoder, input_ids=lambda ids: [ids[0], ids[0], *ids[2:]])
    assert faults == ["example 1, document 1: <bos> occurs 2 times, expected once, at the start"]


def test_fault_17_untrained_terminator_is_found(encoder: ChatEncoder) -> None:
    end = encoder.control.end_of_turn
    faults = broken(encoder, labels=lambda labels: [-100 if label == end else label for label in labels])
    assert faults == [
        "example 1, document 1: an answer is trained without its <end_of_turn>",
        "no <end_of_turn> is trained in any example: the model would never stop",
    ]


def test_fault_24_masked_example_is_found(encoder: ChatEncoder) -> None:
    faults = broken(encoder, labels=lambda labels: [-100] * len(labels))
    assert faults == [
        "example 1: no token is trained",
        "no <end_of_turn> is trained in any example: the model would never stop",
    ]


def test_fault_28_labels_across_documents_are_found(encoder: ChatEncoder) -> None:
    faults = broken(encoder, labels=lambda labels: [encoder.control.bos, *labels[1:]])
    assert faults == [
        "example 1, document 1: the first token is trained, it would be predicted from the document before"
    ]


def test_labels_of_other_tokens_are_found(encoder: ChatEncoder) -> None:
    faults = broken(encoder, labels=lambda labels: [label if label == -100 else label + 1 for label in labels])
    assert "example 1, document 1: a label differs from its token" in faults


@pytest.mark.parametrize("colours", [True, False])
def test_a_fault_is_told_and_fails_the_preview(encoder: ChatEncoder, colours: bool) -> None:
    prepared = prepare([CHAT], encoder, max_seq_len=64, packing=True)
    part = prepared.examples.documents.parts[0]
    ids, starts = part.ids
    vars(part)["ids"] = numpy.array([encoder.control.pad, *ids[1:]]), starts
    passed, output = shown(prepared, encoder, colours=colours)
    assert not passed
    assert "✗ example 1, document 1: <bos> occurs 0 times" in output
    assert "✓" not in output
