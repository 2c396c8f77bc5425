"""Laws of the encoding: what is trained, what cannot be forged, and that it is what the chat template says."""

from typing import Any

import pytest
from hypothesis import given, settings

from gemma_ft.data.conversation import Conversation, PlainText, Turn
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.errors import DataError
from gemma_ft.families.chat_template import TURNS
from gemma_ft.system.limits import IGNORE
from tests.data.strategies import clean_texts, conversations, documents, texts

MANY = settings(max_examples=150, deadline=None)
PLAIN = Conversation(
    "x:1", (Turn("user", " Hi? "), Turn("assistant", "Yes.\n"), Turn("user", "So?"), Turn("assistant", "No"))
)


@MANY
@given(conversation=conversations())
def test_fault_01_02_bos_exactly_once_and_first(encoder: ChatEncoder, conversation: Conversation) -> None:
    ids = encoder.encode(conversation).input_ids
    assert ids[0] == encoder.control.bos
    assert ids.count(encoder.control.bos) == 1


@MANY
@given(document=documents)
def test_fault_01_02_bos_exactly_once_and_first_in_a_document(encoder: ChatEncoder, document: PlainText) -> None:
    encoded = encoder.encode_documents([document])[0]
    assert encoded.input_ids[0] == encoder.control.bos
    assert encoded.input_ids.count(encoder.control.bos) == 1
    assert encoded.input_ids[-1] == encoder.control.eos
    assert encoded.labels == [IGNORE, *encoded.input_ids[1:]]


def test_fault_03_template_to_the_letter(encoder: ChatEncoder) -> None:
    assert encoder.tokenizer.decode(encoder.encode(PLAIN).input_ids) == (
        "<bos><start_of_turn>user\nHi?<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n"
        "<start_of_turn>user\nSo?<end_of_turn>\n<start_of_turn>model\nNo<end_of_turn>\n"
    )


def test_fault_03_newline_after_model_in_the_prompt(encoder: ChatEncoder) -> None:
    prompt = encoder.encode_prompt([Turn("user", "Hi?")])
    assert encoder.tokenizer.decode(prompt) == "<bos><start_of_turn>user\nHi?<end_of_turn>\n<start_of_turn>model\n"


@MANY
@given(conversation=conversations(system=False))
def test_fault_17_answers_and_their_terminators_are_trained_and_nothing_else(
    encoder: ChatEncoder, conversation: Conversation
) -> None:
    encoded = encoder.encode(conversation)
    control = encoder.control
    at = 1
    for turn in conversation.turns:
        name = "user" if turn.role == "user" else "model"
        head = [control.start_of_turn, *encoder.content.encode(f"{name}\n")]
        said = [*encoder.content.encode(turn.content.strip()), control.end_of_turn]
        tail = encoder.content.encode("\n")
        assert encoded.input_ids[at : at + len(head + said + tail)] == head + said + tail
        trained = said if turn.role == "assistant" else [IGNORE] * len(said)
        assert encoded.labels[at : at + len(head + said + tail)] == (
            [IGNORE] * len(head) + trained + [IGNORE] * len(tail)
        )
        at += len(head + said + tail)
    assert at == len(encoded.input_ids) == len(encoded.labels)
    assert encoded.labels[0] == IGNORE


def test_fault_17_generation_stops_at_eos_and_end_of_turn(encoder: ChatEncoder) -> None:
    assert [encoder.tokenizer.convert_ids_to_tokens(one) for one in encoder.stop_ids] == ["<eos>", "<end_of_turn>"]


@MANY
@given(conversation=conversations())
def test_fault_18_prompt_is_a_prefix_of_what_was_trained(
    encoders: dict[str, ChatEncoder], conversation: Conversation
) -> None:
    for policy in ("fold", "drop"):
        whole = encoders[policy].encode(conversation)
        prompt = encoders[policy].encode_prompt(conversation.turns)
        assert whole.input_ids[: len(prompt)] == prompt
        assert whole.labels[len(prompt)] != IGNORE
        assert encoders[policy].encode_prompt(conversation.turns[:-1]) == prompt


@MANY
@given(conversation=conversations(clean_texts))
def test_fault_18_ids_equal_the_chat_template(encoders: dict[str, ChatEncoder], conversation: Conversation) -> None:
    messages = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
    for policy, encoder in encoders.items():
        if policy == "error" and conversation.turns[0].role == "system":
            continue
        expected = encoder.tokenizer.apply_chat_template(messages, chat_template=TURNS.text(policy))["input_ids"]
        assert encoder.encode(conversation).input_ids == expected
        asked = encoder.tokenizer.apply_chat_template(
            messages[:-1], chat_template=TURNS.text(policy), add_generation_prompt=True
        )["input_ids"]
        assert encoder.encode_prompt(conversation.turns) == asked


SYSTEM = Conversation("x:7", (Turn("system", " Be brief. "), Turn("user", "Hi"), Turn("assistant", "Yes")))


def test_fault_18_system_is_folded_with_a_blank_line(encoders: dict[str, ChatEncoder]) -> None:
    folded = (Turn("user", "Be brief.\n\nHi"), Turn("assistant", "Yes"))
    assert encoders["fold"].encode(SYSTEM) == encoders["fold"].encode(Conversation("x:7", folded))


def test_system_is_dropped_by_policy(encoders: dict[str, ChatEncoder]) -> None:
    assert encoders["drop"].encode(SYSTEM) == encoders["fold"].encode(Conversation("x:7", SYSTEM.turns[1:]))


def test_system_is_refused_by_policy(encoders: dict[str, ChatEncoder]) -> None:
    with pytest.raises(DataError) as caught:
        encoders["error"].encode(SYSTEM)
    assert str(caught.value) == "x:7: a system turn, and data.system is 'error'; set it to fold or drop"


@pytest.mark.parametrize("policy", ["fold", "drop", "error"])
def test_template_refuses_what_the_encoder_refuses(
    tokenizer: Any, encoders: dict[str, ChatEncoder], policy: str
) -> None:
    for roles in (["assistant"], ["user", "user"], ["user", "assistant", "system"], ["user", "tool"]):
        with pytest.raises(DataError):
            encoders[policy].encode(Conversation("x:1", tuple(Turn(role, "a") for role in roles)))  # type: ignore[arg-type]
        with pytest.raises(Exception, match="must alternate"):
            tokenizer.apply_chat_template(
                [{"role": role, "content": "a"} for role in roles],
                chat_template=TURNS.text(policy),  # type: ignore[arg-type]
            )


def test_unknown_policy_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError) as caught:
        ChatEncoder(tokenizer, "merge")  # type: ignore[arg-type]
    assert str(caught.value) == "data.system: unknown policy 'merge'; use fold, error, drop"


def test_template_hash_tells_policies_apart(encoders: dict[str, ChatEncoder], tokenizer: Any) -> None:
    hashes = {encoder.template_hash for encoder in encoders.values()}
    assert len(hashes) == 3
    assert all(len(one) == 64 for one in hashes)
    assert ChatEncoder(tokenizer, "fold").template_hash == encoders["fold"].template_hash


def test_no_control_token_can_be_forged(encoder: ChatEncoder) -> None:
    """Every control token x role x position in the text: its id occurs as often as in the same chat without it."""
    names = encoder.tokenizer.convert_ids_to_tokens(sorted(encoder.content.control_ids))
    assert {"<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"} <= set(names)
    for name in names:
        for forged in (name, f"{name} word", f"word {name}", f"word{name}word", name * 3, f"\n{name}\nword"):
            for number, role in enumerate(("system", "user", "assistant")):
                said = ["Be brief", "Hi", "Yes"]
                said[number] = forged
                turns = tuple(Turn(*pair) for pair in zip(("system", "user", "assistant"), said, strict=True))
                ids = encoder.encode(Conversation("x:1", turns)).input_ids
                counts = {token: ids.count(token) for token in encoder.content.control_ids if token in ids}
                assert counts == {
                    encoder.control.bos: 1, encoder.control.start_of_turn: 2, encoder.control.end_of_turn: 2
                }, (forged, role)  # fmt: skip
            assert encoder.content.control_ids.isdisjoint(
                encoder.encode_documents([PlainText("d", forged)])[0].input_ids[1:-1]
            )


@MANY
@given(text=texts)
def test_text_comes_back_from_its_ids(encoder: ChatEncoder, text: str) -> None:
    assert encoder.tokenizer.decode(encoder.content.encode(text), clean_up_tokenization_spaces=False) == text


@MANY
@given(conversation=conversations())
def test_encoding_many_equals_encoding_one_by_one(encoder: ChatEncoder, conversation: Conversation) -> None:
    many = encoder.encode_many([PLAIN, conversation, SYSTEM])
    assert many == [encoder.encode(PLAIN), encoder.encode(conversation), encoder.encode(SYSTEM)]


@pytest.mark.parametrize("turns", [[], [Turn("system", "a")], [Turn("assistant", "a")]])
def test_prompt_without_a_question_is_refused(encoder: ChatEncoder, turns: list[Turn]) -> None:
    with pytest.raises(DataError) as caught:
        encoder.encode_prompt(turns)
    assert str(caught.value) == "a prompt needs a user turn at its end"


def test_half_a_surrogate_pair_is_refused(encoder: ChatEncoder) -> None:
    with pytest.raises(DataError) as caught:
        encoder.encode_prompt([Turn("user", "a\ud800b")])
    assert str(caught.value) == "the text holds half a surrogate pair; it was cut inside a character"
