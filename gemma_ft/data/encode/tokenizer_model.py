"""A folder with tokenizer.model alone: the tokenizer that Gemma's published tokenizer.json is, made of its pieces.

transformers ranks merges by the id of the piece that they make; SentencePiece, and so Gemma, by its score, and the two
differ for runs of blanks: their pieces have low ids in rising length, and all the same score.
"""

from __future__ import annotations

import json
from collections import UserList
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from gemma_ft.data.encode.tokenizer_files import PIECES
from gemma_ft.errors import UserError
from gemma_ft.families.records import CHATS

CONTROL, USER_DEFINED = 3, 4  # sentencepiece_model.proto, SentencePiece.Type
BPE = 2  # the same, TrainerSpec.ModelType
TAB, TAB_BYTE = "\t", "<0x09>"


def made_of_pieces(folder: Path) -> bool:
    """Whether the tokenizer of a folder is made of tokenizer.model, for want of a tokenizer.json."""
    return (folder / PIECES).is_file() and not (folder / "tokenizer.json").is_file()


def note_of_pieces(tokenizer: Any) -> str:
    """Words for one whose tokenizer is another than before, where it was made of tokenizer.model: how to get back what
    transformers makes of it, and versions before did. Else nothing.
    """
    folder = Path(tokenizer.name_or_path)
    if not made_of_pieces(folder):
        return ""
    restore = f"GemmaTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    return (
        f" (made of {PIECES} alone, which transformers does with other ids for runs of blanks; {restore} keeps those)"
    )


def settings_from_pieces(folder: Path) -> dict[str, Any]:
    """What GemmaTokenizer.from_pretrained(folder) needs beside the folder: nothing where there is a tokenizer.json,
    else vocabulary, merges and added tokens, made of tokenizer.model as Gemma's published tokenizer.json has them.

    Tokens that the folder's other files add, or flag otherwise, are as they say.
    Raises: UserError when tokenizer.model is damaged or not of Gemma's kind.
    Source: transformers convert_slow_tokenizer.py, GemmaConverter: merges by score, the tab called by its character,
    user-defined pieces as added tokens, the turn tokens among them special.
    """
    if not made_of_pieces(folder):
        return {}
    model = _read(folder / PIECES)
    turns = {name for chat in CHATS for name in (chat.start_of_turn, chat.end_of_turn)}
    pieces = [
        Piece(
            piece.piece,
            piece.score,
            added=piece.type in (CONTROL, USER_DEFINED),
            special=piece.type == CONTROL or piece.piece in turns,
        )
        for piece in model.pieces
    ]
    settings = settings_of(pieces)
    settings["added_tokens_decoder"].update(_added_later(folder, len(pieces)))
    return {**settings, "vocab_file": ""}


@dataclass(frozen=True)
class Piece:
    """A piece of SentencePiece's and its score: of two merges the one to the higher score is made. added: found in the
    text before anything is merged, or in no text.
    """

    name: str
    score: float
    added: bool = False
    special: bool = False


def settings_of(pieces: Sequence[Piece]) -> dict[str, Any]:
    """Vocabulary, merges and added tokens of pieces, each of which has its place as its id: what GemmaTokenizer needs.

    Source: as `settings_from_pieces`.
    """
    from transformers.tokenization_utils_base import generate_merges

    names = [piece.name for piece in pieces]
    if TAB not in names and TAB_BYTE in names:
        names[names.index(TAB_BYTE)] = TAB
    vocabulary = {name: id for id, name in enumerate(names)}
    scores = {name: piece.score for name, piece in zip(names, pieces, strict=True)}
    added = {
        id: AddedToken(name, normalized=False, special=piece.special)
        for id, (name, piece) in enumerate(zip(names, pieces, strict=True))
        if piece.added
    }
    # no list: transformers would make lists of the pairs in one, which tokenizers does not take
    merges = UserList(generate_merges(vocabulary, scores))
    return {"vocab": vocabulary, "merges": merges, "added_tokens_decoder": added}


def _added_later(folder: Path, pieces: int) -> dict[int, AddedToken]:
    """Added tokens of tokenizer_config.json, or of the added_tokens.json that older versions of transformers wrote."""
    fields = _json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    if fields is not None:
        return {int(id): AddedToken(**token) for id, token in fields.items()}
    named = _json(folder / "added_tokens.json")
    return {id: AddedToken(name, normalized=False) for name, id in named.items() if id >= pieces}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged; copy the base's there") from error
    return found if isinstance(found, dict) else {}


def _read(path: Path) -> Any:
    """A SentencePiece model as protobuf."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise UserError(f"{path}: damaged; copy the base's there") from error
    if not model.pieces:
        raise UserError(f"{path}: damaged; copy the base's there")
    if model.trainer_spec.model_type != BPE:
        raise UserError(f"{path}: not a Gemma tokenizer: its pieces are not merged by score (BPE)")
    return model
