"""A Gemma tokenizer as GGUF stores it: every piece with its score and its kind, so that llama.cpp gives the same
ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_ft.data.tokenizer import ContentEncoder, ControlIds
from gemma_ft.data.tokenizer_files import PIECES
from gemma_ft.errors import UserError

# Kinds of tokens, with the numbers that both SentencePiece and GGUF give them.
# Source: sentencepiece_model.proto, SentencePiece.Type; ggml docs/gguf.md, tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
PAD_SCORE = -10000.0  # of ids that no text gives
SPACE_SIGN = "\u2581"


@dataclass(frozen=True)
class GgufVocabulary:
    """One token per embedding row: text, score and kind, and the ids of those that a server must know."""

    tokens: list[str]
    scores: list[float]
    kinds: list[int]
    control: ControlIds
    unknown: int


def read_vocabulary(folder: Path, tokenizer: Any, *, rows: int) -> GgufVocabulary:
    """The vocabulary of `folder` for an embedding of `rows` rows. Rows beyond the last token become unused tokens.

    Scores and kinds are SentencePiece's, from tokenizer.model; tokens that were added later come from the transformers
    tokenizer. What counts as a control token there does here: no text may become one. Runs of blanks are stored with
    spaces, for llama.cpp looks for user-defined tokens in the text as it was typed.
    Raises: UserError: no tokenizer.model, one of another tokenizer, or more tokens than rows.
    """
    pieces = _pieces(folder)
    names = {id: name for name, id in tokenizer.get_vocab().items()}
    if max(names) >= rows:
        raise UserError(
            f"{folder}: the tokenizer has {max(names) + 1:,} tokens, the embedding {rows:,} rows; "
            "restore the tokenizer files that were saved with the weights"
        )
    control = ContentEncoder(tokenizer).control_ids
    added = {int(id) for id in tokenizer.added_tokens_decoder}
    tokens, scores, kinds = [], [], []
    for id in range(rows):
        name = names.get(id)
        piece, score, kind = pieces[id] if id < len(pieces) else (name, PAD_SCORE, USER_DEFINED)
        if piece != name and name is not None:
            raise UserError(
                f"{folder}/{PIECES}: token {id} is {piece!r}, but tokenizer.json has {name!r}; "
                "restore the tokenizer files that were saved with the weights"
            )
        if name is None or piece is None:  # a row that pads the embedding
            piece, score, kind = f"[PAD{id}]", PAD_SCORE, UNUSED
        elif kind != UNKNOWN and id in control:
            kind = CONTROL
        elif id in added and kind == NORMAL:
            kind = USER_DEFINED
        tokens.append(piece.replace(SPACE_SIGN, " ") if kind == USER_DEFINED else piece)
        scores.append(score)
        kinds.append(kind)
    unknown = kinds.index(UNKNOWN)
    return GgufVocabulary(tokens, scores, kinds, ControlIds.from_tokenizer(tokenizer), unknown)


def add_vocabulary(writer: Any, vocabulary: GgufVocabulary, template: str) -> None:
    """Give a GGUFWriter the vocabulary and the chat template, for llama.cpp's SentencePiece tokenizer ("llama").

    Gemma's has no space put before a text, and one BOS at the start of every sequence.
    """
    control = vocabulary.control
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.kinds)
    writer.add_bos_token_id(control.bos)
    writer.add_eos_token_id(control.eos)
    writer.add_eot_token_id(control.end_of_turn)
    writer.add_unk_token_id(vocabulary.unknown)
    writer.add_pad_token_id(control.pad)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(template)


def _pieces(folder: Path) -> list[tuple[str, float, int]]:
    """(text, score, kind) of every piece of tokenizer.model. Raises: UserError when it is missing or damaged."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2

    path = folder / PIECES
    if not path.is_file():
        raise UserError(f"{folder}: there is no {PIECES} in it, which GGUF needs for its scores; copy the base's there")
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise UserError(f"{path}: damaged; copy the base's there") from error
    if not model.pieces:
        raise UserError(f"{path}: damaged; copy the base's there")
    return [(piece.piece, piece.score, piece.type) for piece in model.pieces]
