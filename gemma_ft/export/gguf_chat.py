"""How a GGUF file says that a chat is asked: template, BOS, and the ids at which an answer ends."""

from __future__ import annotations

from typing import Any, NamedTuple

from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.template import unmarked


class StopKeys(NamedTuple):
    """The stop ids by the keys that GGUF has for them; `left` have none."""

    eos: int
    eot: int
    eom: int | None
    left: list[int]

    @classmethod
    def of(cls, encoder: ChatEncoder) -> StopKeys:
        """EOS, the end of a turn, and of the others the first."""
        eos, eot = encoder.control.eos, encoder.control.end_of_turn
        others = [id for id in encoder.stop_ids if id not in (eos, eot)]
        return cls(eos, eot, others[0] if others else None, others[1:])


def add_chat(writer: Any, encoder: ChatEncoder) -> None:
    """Give a GGUFWriter the chat template of an encoder, without tags that only transformers knows, one BOS or none,
    and its stop ids.

    Source: ggml docs/gguf.md (tokenizer.ggml.*_token_id); llama.cpp src/llama-vocab.cpp ends an answer at all three.
    """
    keys = StopKeys.of(encoder)
    writer.add_eos_token_id(keys.eos)
    writer.add_eot_token_id(keys.eot)
    if keys.eom is not None:
        writer.add_eom_token_id(keys.eom)
    writer.add_add_bos_token(encoder.format.bos)
    writer.add_add_eos_token(False)
    writer.add_chat_template(unmarked(encoder.format.template))


def chat_notes(encoder: ChatEncoder) -> list[str]:
    """What a GGUF file and its Modelfile cannot say of how an encoder's chats are asked, in lines for the user."""
    left, text = StopKeys.of(encoder).left, [id for id in encoder.stop_ids if id not in encoder.content.control_ids]
    notes = []
    if left:
        notes.append(f"GGUF has keys for three stop ids (eos, eot, eom); there is none for {_named(encoder, left)}")
    if text:
        notes.append(f"the Modelfile has no stop line for {_named(encoder, text)}, which is ordinary text")
    if not encoder.format.bos:
        notes.append("its chat template begins without BOS, so the file asks for none, in chats and in plain text")
    return notes


def _named(encoder: ChatEncoder, ids: list[int]) -> str:
    names = encoder.tokenizer.convert_ids_to_tokens(ids)
    return ", ".join(f"{id} ({name!r})" for id, name in zip(ids, names, strict=True))
