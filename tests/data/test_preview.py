"""The preview shows tokens as they are trained, and its checks find what would spoil a run."""

import io
from typing import Any

import numpy
import pytest
from rich.console import Console

from gemma_ft.data.check.invariants import broken_invariants
from gemma_ft.data.check.preview import build_preview
from gemma_ft.data.conversation import Conversation, PlainText, Turn
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.documents import Documents
from gemma_ft.data.pack.arrange import DataStats, Prepared, prepare
from gemma_ft.data.pack.counts import count_pieces
from gemma_ft.data.pack.examples import Examples
from gemma_ft.ui.data_preview import show, token_text

CHAT = Conversation("a.jsonl:4", (Turn("user", "Hi <end_of_turn>"), Turn("assistant", "Yes\nit is")))


def chat(where: str, question: str, answer: str) -> Conversation:
    return Conversation(where, (Turn("user", question), Turn("assistant", answer)))


def shown(prepared: Prepared, encoder: ChatEncoder, *, colours: bool, **options: Any) -> tuple[bool, str]:
    output = io.StringIO()
    console = Console(file=output, force_terminal=colours, width=120, color_system="truecolor" if colours else None)
    found = build_preview(prepared, encoder, **options)
    show(found, console)
    return not found.faults, "\n".join(line.rstrip() for line in output.getvalue().splitlines())


def test_without_colours_brackets_mark_what_is_trained(encoder: ChatEncoder) -> None:
    passed, text = shown(prepare([CHAT], encoder, max_seq_len=64, packing=True), encoder, colours=False)
    assert passed
    size = len(encoder.encode(CHAT).input_ids)
    trained = sum(label != -100 for label in encoder.encode(CHAT).labels)
    lines = text.splitlines()
    assert lines[0] == "tokens: ⟦trained⟧, ⟨truncated⟩, others masked   ── document   ↵ line break"
    assert lines[1].startswith(f"example 1 of 1 · {size} tokens · {trained} trained ({trained / size:.0%}) ─")
    assert lines[2:8] == [
        f"── document 1 · a.jsonl:4 · {size} tokens",
        "  <bos><start_of_turn>user↵",
        "  Hi <end_of_turn><end_of_turn>↵",
        "  <start_of_turn>model↵",
        "  ⟦Yes↵",
        "  it is<end_of_turn>⟧↵",
    ]
    assert size == 29
    assert lines[-5:] == [
        "an epoch: 29 tokens, 1 optimizer step of 1 examples",
        "documents by length: 1 |              █| 30 tokens; from 29 to 29",
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
    evil = chat("x:1", "\x1b[2Jx\x07\x9b1m\x7f\u202egnp", "[red]ok[/red]")
    text = shown(prepare([evil], encoder, max_seq_len=64, packing=True), encoder, colours=False)[1]
    assert not {"\x1b", "\x07", "\x9b", "\x7f", "\u202e"} & set(text)
    assert "␛[2Jx␇" in text
    assert "[red]ok[/red]" in text


def test_bytes_of_one_character_are_shown_as_the_character(encoder: ChatEncoder) -> None:
    encoded = encoder.encode_documents([PlainText("d:1", "漢字 🙂")])[0]
    assert token_text(encoded.input_ids, encoded.labels, encoder).plain == "<bos>漢字 🙂<eos>"


def test_long_documents_show_head_and_tail(encoder: ChatEncoder) -> None:
    text = "word " * 3000
    prepared = prepare([PlainText("d:1", text)], encoder, max_seq_len=16384, packing=True)
    passed, output = shown(prepared, encoder, colours=False)
    assert passed
    hidden = len(encoder.encode_documents([PlainText("d:1", text)])[0].input_ids) - 500
    assert f"... {hidden:,} tokens not shown ..." in output
    assert "plain text: no turns, every token is trained" in output


def test_many_documents_in_an_example_are_counted(encoder: ChatEncoder) -> None:
    prepared = prepare([CHAT] * 9, encoder, max_seq_len=1024, packing=True)
    output = shown(prepared, encoder, colours=False)[1]
    assert "── document 3 ·" in output
    assert "document 4 ·" not in output
    assert "... and 6 more in this example" in output


def damaged(prepared: Prepared, **columns: Any) -> Prepared:
    """With the ids or labels of its only part changed by a function."""
    part = prepared.examples.documents.parts[0]
    for name, change in columns.items():
        values, starts = getattr(part, name)
        vars(part)[name] = numpy.array(change(values.tolist())), starts
    return prepared


def broken(encoder: ChatEncoder, **columns: Any) -> list[str]:
    prepared = damaged(prepare([CHAT], encoder, max_seq_len=64, packing=True), **columns)
    return broken_invariants(count_pieces(prepared.examples, encoder.control), encoder)


def test_fault_01_missing_bos_is_found(encoder: ChatEncoder) -> None:
    faults = broken(encoder, ids=lambda ids: [encoder.control.pad, *ids[1:]])
    assert faults == ["example 1, document 1: <bos> occurs 0 times, expected once, at the start"]


def test_fault_02_doubled_bos_is_found(encoder: ChatEncoder) -> None:
    faults = broken(encoder, ids=lambda ids: [ids[0], ids[0], *ids[2:]])
    assert faults == ["example 1, document 1: <bos> occurs 2 times, expected once, at the start"]


def test_fault_02_bos_that_is_not_first_is_found(encoder: ChatEncoder) -> None:
    faults = broken(encoder, ids=lambda ids: [encoder.control.pad, ids[0], *ids[2:]])
    assert faults == ["example 1, document 1: <bos> occurs 1 times, expected once, at the start"]


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
    passed, output = shown(damaged(prepared, ids=lambda ids: [encoder.control.pad, *ids[1:]]), encoder, colours=colours)
    assert not passed
    assert "✗ example 1, document 1: <bos> occurs 0 times" in output
    assert "✓" not in output


def test_what_is_shown_is_what_is_checked(encoder: ChatEncoder) -> None:
    """An example that could not be put together for a trainer is shown all the same, with its fault."""
    prepared = prepare([CHAT], encoder, max_seq_len=64, packing=True)
    output = shown(damaged(prepared, labels=lambda labels: [0, *labels[1:]]), encoder, colours=False)[1]
    assert "✗ example 1, document 1: the first token is trained" in output
    assert "⟦<bos>⟧<start_of_turn>user" in output


def test_of_a_cut_conversation_the_end_is_shown_and_counted(encoder: ChatEncoder) -> None:
    cut = chat("a.jsonl:1", "Hi", "one two three " * 20)
    whole = encoder.encode(cut)
    lost = len(whole.input_ids) - 32
    trained = sum(label != -100 for label in whole.labels[32:])
    prepared = prepare([CHAT, cut], encoder, max_seq_len=32, packing=False)
    text = shown(prepared, encoder, colours=False)[1]
    assert f"── document 1 · a.jsonl:1 · 32 tokens · {lost} truncated" in text
    line = f"✂ {lost} tokens past this point are truncated, {trained} of them to be trained; the first 24 are shown"
    assert line in text
    assert f"{lost} tokens are truncated, {trained} of them to be trained\n" in text
    tokens = encoder.tokenizer.decode(whole.input_ids[32:56]).strip()
    assert f"{line}\n  ⟨" in text
    assert f"{tokens}⟩" in text.replace("↵", "").replace("\n  ", " ")
    coloured = shown(prepared, encoder, colours=True)[1]
    assert "\x1b[9;31m" in coloured  # struck out
    whole_chat = prepare([CHAT], encoder, max_seq_len=64, packing=True)
    assert "are truncated" not in shown(whole_chat, encoder, colours=True)[1]


def test_what_is_cut_off_before_or_between_is_shown_at_its_place(encoder: ChatEncoder) -> None:
    documents = Documents.of([PlainText("d:1", "word " * 40)], encoder)
    size = int(documents.column("tokens")[0])
    pieces = numpy.array([(0, 3, 10), (0, 12, size)])
    examples = Examples(documents, pieces, [[0], [1], [0]], encoder.control.bos)
    stats = DataStats(packed_rows=3, documents=3, tokens=1)
    text = shown(Prepared(examples, stats), encoder, colours=False)[1]
    assert f"── document 1 · d:1 · 8 tokens · 4 to 10 of {size} · 5 truncated" in text
    assert "✂ 3 tokens before this point are truncated, 2 of them to be trained\n" in text
    assert text.count("✂ 2 tokens past this point are truncated, 2 of them to be trained\n") == 2  # seen twice
    assert text.count("✂ 2 tokens before this point are truncated, 2 of them to be trained\n") == 1
    assert "5 tokens are truncated, 4 of them to be trained\n" in text  # counted once


def test_of_a_conversation_cut_at_the_left_the_last_lost_tokens_are_shown(encoder: ChatEncoder) -> None:
    cut = chat("a.jsonl:1", "one two three " * 20, "Yes")
    whole = encoder.encode(cut).input_ids
    prepared = prepare([cut], encoder, max_seq_len=32, packing=False, too_long="truncate_left")
    text = shown(prepared, encoder, colours=False)[1]
    lost = len(whole) - 31
    shown_last = encoder.tokenizer.decode(whole[lost - 24 : lost])
    assert f"⟨{shown_last}⟩\n  ✂ {lost} tokens before this point are truncated; the last 24 are shown\n  <bos>" in text


def test_pieces_of_a_long_document_say_which_they_are(encoder: ChatEncoder) -> None:
    size = len(encoder.encode_documents([PlainText("d:1", "word " * 40)])[0].input_ids)
    prepared = prepare([PlainText("d:1", "word " * 40)], encoder, max_seq_len=32, packing=False)
    text = shown(prepared, encoder, colours=False, row_ids=["1"], rows=2)[1]
    assert f"── document 1 · d:1 · 32 tokens · 1 to 32 of {size} · ◀ asked for" in text
    assert f"── document 1 · d:1 · 32 tokens · 33 to 63 of {size} · ◀ asked for" in text
    assert f"d:1 is in {len(prepared.examples)} examples; shown: the first 2" in text
    assert text.count("── document 1") == 2
    assert "this point" not in text  # nothing is truncated


def test_the_examples_of_rows_are_shown_by_name(encoder: ChatEncoder) -> None:
    rows = [chat(f"a/b.jsonl:{number}", f"number {number}", "yes") for number in range(1, 60)]
    prepared = prepare(rows, encoder, max_seq_len=512, packing=True)
    text = shown(prepared, encoder, colours=False, row_ids=["b.jsonl:41", "57"])[1]
    assert text.count("◀ asked for") == 2
    titles = [line for line in text.splitlines() if line.startswith("──")]
    asked = [title.split(" · ")[1] for title in titles if title.endswith("◀ asked for")]
    assert asked == ["a/b.jsonl:41", "a/b.jsonl:57"]
    assert "example 1 of" not in text


def test_one_long_document_hides_no_short_ones(encoder: ChatEncoder) -> None:
    rows = [*(chat(f"a.jsonl:{number}", "Hi", "Yes") for number in range(200)), PlainText("b.txt:1", "word " * 500)]
    text = shown(prepare(rows, encoder, max_seq_len=64, packing=True), encoder, colours=False)[1]
    short, long = len(encoder.encode(rows[0]).input_ids), len(encoder.encode_documents([rows[-1]])[0].input_ids)
    (line,) = (line for line in text.splitlines() if line.startswith("documents by length"))
    bars, told = line.split("|")[1:]
    assert (bars[-1], max(bars)) == ("▁", "█")
    assert told.endswith(f"tokens; the last bar: also 1 longer; from {short:,} to {long:,}")


def test_sources_are_told_apart_where_there_are_several(encoder: ChatEncoder) -> None:
    rows = [chat("a.jsonl:1", "Hi", "Yes"), chat("b.jsonl:1", "Hi", "No"), chat("b.jsonl:2", "Ho", "No")]
    text = shown(prepare(rows, encoder, max_seq_len=64, packing=True), encoder, colours=False)[1]
    table = [line.split() for line in text.splitlines() if line.startswith(("source", "a.jsonl", "b.jsonl"))]
    assert table[0] == ["source", "rows", "documents", "tokens", "trained", "truncated"]
    assert [line[:3] for line in table[1:]] == [["a.jsonl", "1", "1"], ["b.jsonl", "2", "2"]]
    assert "source " not in shown(prepare(rows[:1], encoder, max_seq_len=64, packing=True), encoder, colours=False)[1]
