"""A Gemma tokenizer as GGUF stores it: every piece with its score and its kind, so that llama.cpp gives the same
ids.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from gemma_ft.data.encode.tokenizer import ContentEncoder, ControlIds
from gemma_ft.errors import UserError
from gemma_ft.export.gguf_pieces import CONTROL, UNKNOWN, UNUSED, Piece, pieces_of

PAD_SCORE = -10000.0  # of ids that no text gives
# Texts of tokens that end an answer in llama.cpp, whatever their kind in the file says. Source: llama.cpp
# src/llama-vocab.cpp, llama_vocab::impl::load, special_eog_ids.
ENDS_BY_TEXT = frozenset({
    "</s>", "<eos>", "<end_of_turn>", "<turn|>", "<|tool_response>", "<end_of_utterance>", "<|eot_id|>", "<|eom_id|>",
    "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|endoftext|>", "<|end_of_text|>",
    "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "[e~[", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|fim_pad|>", "<fim-pad>",
    "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>",
    "<|file_sep|>",
})  # fmt: skip


@dataclass(frozen=True)
class GgufVocabulary:
    """One token per embedding row: text, score and kind, and the ids of those that a server must know."""

    tokens: list[str]
    scores: list[float]
    kinds: list[int]
    control: ControlIds
    unknown: int

    def ends_by_text(self) -> list[str]:
        """Tokens that are text, in training as in the file, but that llama.cpp ends an answer at."""
        named = zip(self.tokens, self.kinds, strict=True)
        return [text for text, kind in named if text in ENDS_BY_TEXT and kind not in (CONTROL, UNKNOWN)]


def token_count(tokenizer: Any) -> int:
    """One more than a tokenizer's last id."""
    return max(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def read_vocabulary(tokenizer: Any, *, rows: int, soft: Collection[str] = ()) -> GgufVocabulary:
    """The vocabulary of a transformers tokenizer for an embedding of `rows` rows. Rows beyond the last token become
    unused tokens. soft: control tokens that are left out where the embedding has no row for them.

    It is made of tokenizer.json alone, which decides the ids of training. What counts as a control token there does
    here: no text may become one.
    Raises: UserError: more tokens than rows, or a tokenizer whose ids llama.cpp would not give.
    """
    where = tokenizer.name_or_path
    control = ContentEncoder(tokenizer).control_ids
    backend = tokenizer.backend_tokenizer
    try:
        pieces = pieces_of(json.loads(backend.to_str()), control, backend.model)
    except UserError as error:
        raise UserError(f"{where}: its tokenizer {error}") from error
    beyond = {id for id, piece in pieces.items() if id >= rows and not (piece.kind == CONTROL and piece.text in soft)}
    if beyond:
        raise UserError(
            f"{where}: the tokenizer has {max(pieces) + 1:,} tokens, the embedding {rows:,} rows; "
            "restore the tokenizer files that were saved with the weights"
        )
    filled = [pieces.get(id) or Piece(f"[PAD{id}]", UNUSED, PAD_SCORE) for id in range(rows)]
    kinds = [piece.kind for piece in filled]
    return GgufVocabulary(
        tokens=[piece.text for piece in filled],
        scores=[piece.score for piece in filled],
        kinds=kinds,
        control=ControlIds.from_tokenizer(tokenizer),
        unknown=kinds.index(UNKNOWN),
    )


def add_vocabulary(writer: Any, vocabulary: GgufVocabulary) -> None:
    """Give a GGUFWriter the vocabulary, for llama.cpp's SentencePiece tokenizer ("llama"); Gemma's has no space put
    before a text. What ends an answer and the chat template are gguf_chat's.
    """
    control = vocabulary.control
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.kinds)
    writer.add_bos_token_id(control.bos)
    writer.add_unk_token_id(vocabulary.unknown)
    writer.add_pad_token_id(control.pad)
    writer.add_add_space_prefix(False)
