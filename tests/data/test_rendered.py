"""Rows that went through a chat template before: recognised by how they begin, told, and encoded as before."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from gemma_ft.data.check.preview import build_preview
from gemma_ft.data.check.rows import RowSource
from gemma_ft.data.check.survey import Report, survey
from gemma_ft.data.conversation import Conversation, PlainText, Turn
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.encode_rows import Reading
from gemma_ft.data.pack.arrange import prepare
from gemma_ft.data.read.parse_rows import parse_rows
from gemma_ft.data.read.rendered import rendered_as
from gemma_ft.data.read.sources import Row, read_chunks

File = Callable[[str, str | bytes], str]
GEMMA = (
    "<bos><start_of_turn>user\nWhat is the capital of Peru?<end_of_turn>\n<start_of_turn>model\nLima.<end_of_turn>\n"
)


@pytest.mark.parametrize(
    ("text", "template"),
    [
        (GEMMA, "Gemma's <start_of_turn>"),
        (GEMMA.removeprefix("<bos>").replace("\n", "\r\n"), "Gemma's <start_of_turn>"),
        ("\n<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n", "ChatML's <|im_start|>"),
        (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
            "Llama 3's <|start_header_id|>",
        ),
        ("<|begin_of_text|><|header_start|>user<|header_end|>\n\nHi<|eot|>", "Llama 4's <|header_start|>"),
        ("<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello </s>", "Llama 2's or Mistral's [INST]"),
        ("[INST]Hi[/INST]", "Llama 2's or Mistral's [INST]"),
        ("<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>", "Phi's, Zephyr's or GLM's <|user|>"),
        ("<|user|>Hi<|end|><|assistant|>Hello<|end|>", "Phi's, Zephyr's or GLM's <|user|>"),
        ("<|start|>assistant<|channel|>final<|message|>Hello<|return|>", "gpt-oss' <|start|>"),
        ("<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜>Hello", "DeepSeek's <｜User｜>"),
        ("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi", "Command R's <|START_OF_TURN_TOKEN|>"),
        ("\n\nHuman: Hi\n\nAssistant: Hello.", "Anthropic's Human:"),
        ("Human: Hi\n\nAssistant:", "Anthropic's Human:"),
        ("### Human: Hi### Assistant: Hello.### Human: Why?", "Guanaco's ### Human:"),
        (
            "Below is an instruction.\n\n### Instruction:\nAdd.\n\n### Input:\n1\n\n### Response:",
            "Alpaca's ### Instruction:",
        ),
        ("### Instruction:\nAdd.\n\n### Response:\n2", "Alpaca's ### Instruction:"),
        ("A chat between a user and an assistant. USER: Hi ASSISTANT: Hello.</s>", "Vicuna's USER:"),
        ('[{"role": "user", "content": "Hi"}]', 'a list of turns in JSON [{"role"'),
    ],
)
def test_rendered_text_is_recognised(text: str, template: str) -> None:
    """The turns of each template by hand; below, as the templates themselves write them."""
    assert rendered_as(PlainText("a.jsonl:1", text)) == template
    assert rendered_as(Conversation("a.jsonl:1", (Turn("user", text), Turn("assistant", "b")))) == template
    assert rendered_as(Conversation("a.jsonl:1", (Turn("user", "a"), Turn("assistant", text)))) == template


@pytest.mark.parametrize(
    ("name", "marker"),
    [
        ("gemma", "<start_of_turn>"), ("gemma3", "<start_of_turn>"), ("gemma4", "<|turn>"), ("qwen3", "<|im_start|>"),
        ("llama3", "<|start_header_id|>"), ("phi3", "<|user|>"), ("deepseekv3", "<｜User｜>"), ("gptoss", "<|start|>"),
        ("cohere", "<|START_OF_TURN_TOKEN|>"), ("glm4moe", "<|user|>"),
    ],
)  # fmt: skip
def test_what_published_templates_render_is_recognised(name: str, marker: str) -> None:
    """The templates in TRL 1.16.0, rendered by transformers 5.24.0."""
    package = find_spec("trl")
    assert package is not None
    assert package.origin is not None
    template = (Path(package.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    system = [] if name == "gemma" else [{"role": "system", "content": "Be brief."}]  # it refuses them
    for turns in (chat, system + chat):
        (text,), _ = render_jinja_template([turns], chat_template=template, bos_token="<s>", eos_token="</s>")
        template_name = rendered_as(PlainText("a.jsonl:1", text))
        assert template_name is not None
        assert template_name.endswith(f" {marker}")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Gemma begins a turn with <start_of_turn>.",
        "<start_of_turn> is how Gemma begins a turn, and <end_of_turn> how it ends one.",
        "<start_of_turn>user names who speaks.",
        "<|im_start|> is ChatML's.",
        "<bos> stands first.",
        "[INST] was Llama 2's marker.",
        "<|user|> is a marker of Phi.",
        "[1] A footnote",
        "Human: a word of many meanings.\n\nAn assistant: another.",
        "### Human: what the heading of a text may say\n\nAs here.",
        "### Instruction: how to plant a tree\n\nDig.",
        "A chat between two friends. USER: is no name.",
        "Below is an instruction that nobody reads.",
        '[{"role": "admin", "name": "Ann"}]',
        "<html><s>gone</s></html>",
    ],
)
def test_text_that_names_a_marker_is_text(text: str) -> None:
    assert rendered_as(PlainText("a.jsonl:1", text)) is None


def told(encoder: ChatEncoder, *rows: dict[str, Any]) -> list[str]:
    items = parse_rows([Row(f"a.jsonl:{n}", row) for n, row in enumerate(rows, start=1)])
    preview = build_preview(prepare(items, encoder, max_seq_len=256, packing=True), encoder)
    assert preview.faults == []
    assert preview.stats.describe().splitlines()[2:] == preview.warnings()  # which the start of a run shows
    return preview.warnings()


def test_counts_are_told_before_a_run(encoder: ChatEncoder) -> None:
    """a3dff15 showed three green ticks for such rows."""
    cure = "whose markers are learned as words: take them out, and give turns as messages"
    assert told(encoder, {"text": GEMMA}, {"text": GEMMA}, {"text": "Gemma's turns begin with <start_of_turn>."}) == [
        f"2 of 3 rows spell a chat template as text (Gemma's <start_of_turn>), {cure}"
    ]
    prompt, completion = GEMMA[: GEMMA.index("Lima")], GEMMA[GEMMA.index("Lima") :]
    assert told(encoder, {"prompt": prompt, "completion": completion}) == [
        f"1 of 1 rows spell a chat template as text (Gemma's <start_of_turn>), {cure}"
    ]


def test_answers_that_end_in_a_tokens_name_are_told_where_most_do(encoder: ChatEncoder) -> None:
    rows = [{"prompt": f"{n}?", "completion": f"{n}.<eos>"} for n in range(4)]
    other = {"prompt": "x", "completion": "y"}
    assert told(encoder, *rows, other) == [
        "4 of 5 rows end in <eos> as text, which is learned as a word: take it off, an end is trained without it"
    ]
    assert told(encoder, rows[0], rows[1]) == []
    assert told(encoder, *rows[:3], *[other] * 4) == []


def test_the_ids_stay(encoder: ChatEncoder) -> None:
    document = PlainText("a.jsonl:1", GEMMA)
    prepared = prepare([document], encoder, max_seq_len=256, packing=False)
    assert prepared.examples[0]["input_ids"] == encoder.encode_documents([document])[0].input_ids


@pytest.fixture
def check(file: File, encoder: ChatEncoder) -> Callable[..., Report]:
    def run(*texts: str) -> Report:
        source = file("a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
        reading = Reading("text", {}, encoder)
        return survey([RowSource("train", source, partial(read_chunks, source), reading, "named")], max_seq_len=512)

    return run


def test_data_check_tells_the_rows(check: Callable[..., Report]) -> None:
    report = check(GEMMA, "A line that says nothing of it.", "<|im_start|>user\nHi<|im_end|>", "Ends in </s>")
    assert {one.kind.name: [str(place) for place in one.places] for one in report.findings.all()} == {
        "rendered": ["a.jsonl:1: Gemma's <start_of_turn>", "a.jsonl:3: ChatML's <|im_start|>"],
        "strike_through": ["a.jsonl:4"],
    }
    assert (report.findings["rendered"].severity, report.findings["strike_through"].severity) == ("warning", "note")


def test_data_check_tells_ends_where_most_rows_have_them(check: Callable[..., Report]) -> None:
    report = check("One.<|im_end|>", "Two.<|im_end|>\n", "Three.<|im_end|>", "Four.")
    assert [str(place) for place in report.findings["ends"].places] == [
        f"a.jsonl:{n}: <|im_end|>" for n in (1, 2, 3)
    ]  # fmt: skip
    assert check("Gemma ends a turn with <end_of_turn>", "And this says nothing of it.").findings.all() == []
