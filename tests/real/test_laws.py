"""What holds of any text in the published vocabularies: nothing that is typed becomes a control token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_ft.data.conversation import Conversation, Turn
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.tokenizer import load_tokenizer
from gemma_ft.system.limits import IGNORE
from tests.real.corpus import lines, spells_control

LOOK_ALIKES = (
    *("<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "<unused0>", "<unused98>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>", "[multimodal]", "<unused6241>"),
    *("[@BOS@]", "<2mass>", "<0x0A>", "<0x00>", "<start_of_turn>model\n", "<start", "_of_turn>", "</s>", "<s>"),
)
# Pieces that are put together: any text, look-alikes, runs of blanks, tags.
PIECES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(LOOK_ALIKES),
    st.builds(str.__mul__, st.sampled_from([" ", "\n", "\t", "\r\n", "\u2581", "\u00a0"]), st.integers(1, 40)),
    st.sampled_from(["<table>", "</h3>", "<br>", "{{ bos_token }}", "漢字", "🙂", "ﬁ", "0.1e-9"]),
)
TEXTS = st.lists(PIECES, max_size=8).map("".join)
MANY = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", params=["gemma1", "gemma2", "gemma3"])
def encoder(request: pytest.FixtureRequest) -> ChatEncoder:
    folder: Path = request.getfixturevalue(f"{request.param}_tokenizer")
    return ChatEncoder(load_tokenizer(str(folder)))


@MANY
@given(text=TEXTS)
def test_no_text_forges_a_control_token_and_all_of_it_comes_back(encoder: ChatEncoder, text: str) -> None:
    ids = encoder.content.encode(text)
    assert encoder.content.control_ids.isdisjoint(ids)
    assert max(ids, default=0) < min(len(encoder.tokenizer), 262_144)  # no row for Gemma 3's <image_soft_token>
    back = encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert back == text.replace("\u2581", " ")


@MANY
@given(question=TEXTS, answer=TEXTS)
def test_a_chat_has_one_bos_and_trains_its_terminator(encoder: ChatEncoder, question: str, answer: str) -> None:
    sequence = encoder.encode(Conversation("x:1", (Turn("user", question), Turn("assistant", answer))))
    ids, labels, control = sequence.input_ids, sequence.labels, encoder.control
    assert (ids.count(control.bos), ids[0]) == (1, control.bos)
    assert [ids.count(control.start_of_turn), ids.count(control.end_of_turn), ids.count(control.eos)] == [2, 2, 0]
    assert labels.count(control.end_of_turn) == 1
    trained = [one for one in labels if one != IGNORE]
    assert trained == [*encoder.content.encode(answer.strip()), control.end_of_turn] or not answer.strip()
    prompt = encoder.encode_prompt([Turn("user", question)])
    assert ids[: len(prompt)] == prompt


def test_text_parts_are_one_text_as_the_template_has_it(encoder: ChatEncoder) -> None:
    """Gemma 1's and 2's templates know no parts: rows and requests join them by line breaks."""
    parts = [" Two parts,\n", " one <b>text</b> ", "?"]
    joined = encoder.chat.joined(parts)
    if not encoder.chat.marks:
        assert joined == "\n".join(parts)
        return
    content = [{"type": "text", "text": part} for part in parts]
    messages: list[Any] = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    messages.append({"role": "user", "content": "So?"})
    turns = [Turn("user", joined), Turn("assistant", joined), Turn("user", "So?")]
    for template in (encoder.tokenizer.chat_template, encoder.format.template):
        found = encoder.tokenizer.apply_chat_template(messages, chat_template=template, add_generation_prompt=True)
        assert found["input_ids"] == encoder.encode_prompt(turns)


def test_an_image_that_is_typed_is_text(encoder: ChatEncoder) -> None:
    ids = encoder.encode_prompt([Turn("user", "<start_of_image><image_soft_token><end_of_image>")])
    names = encoder.tokenizer.convert_ids_to_tokens(ids)
    assert not {"<start_of_image>", "<image_soft_token>", "<end_of_image>"} & set(names)


def test_the_template_gives_the_trained_ids_of_the_whole_corpus(encoder: ChatEncoder) -> None:
    for text in lines()[::7]:
        if spells_control(text) or not text.strip():
            continue
        found = encoder.tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        assert found["input_ids"] == encoder.encode_prompt([Turn("user", text)])
