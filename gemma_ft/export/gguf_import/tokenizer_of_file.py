"""The tokenizer in a GGUF file as transformers' GemmaTokenizer: what export/gguf_pieces.py does, the other way.

GGUF has scores where tokenizer.json has merges. Pieces that are found in the text before anything is merged rank before
all others, as in SentencePiece, whatever score a converter gave them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_ft.data.encode.template import policy_of
from gemma_ft.data.encode.tokenizer import add_tokens
from gemma_ft.data.encode.tokenizer_facts import SPACE_SIGN, is_text_token
from gemma_ft.data.encode.tokenizer_model import Piece, settings_of
from gemma_ft.errors import UserError
from gemma_ft.export.gguf_pieces import BYTE, BYTES, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from gemma_ft.export.gguf_reader import GgufFile
from gemma_ft.families.family import Family

KEY = "tokenizer.ggml."
SENTENCEPIECE = "llama"  # tokenizer.ggml.model of SentencePiece's BPE
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers' name -> GGUF's
STOPS = ("eos", "eot", "eom")


@dataclass(frozen=True)
class FileTokenizer:
    """A transformers tokenizer of a file's pieces; the ids at which the file ends an answer; whether the file says how
    its chats are written.
    """

    tokenizer: Any
    stop_ids: list[int]
    has_template: bool


def tokenizer_of_file(file: GgufFile, family: Family, rows: int) -> FileTokenizer:
    """The tokenizer of a file, for an embedding of `rows` rows.

    Raises: UserError for one that is not SentencePiece's, or not of Gemma's kind, or damaged.
    """
    from transformers import GemmaTokenizer

    names, scores, kinds = _lists(file, rows)
    _check(file, family, names, kinds)
    roles = {role: names[_id(file, f"{key}_token_id", len(names))] for role, key in ROLES.items()}
    pieces = _pieces(family, names, scores, kinds, set(roles.values()))
    added = _added_by_user(pieces, kinds)
    settings = settings_of(pieces[: len(pieces) - len(added)])
    tokenizer = GemmaTokenizer(
        **settings, **{f"{role}_token": name for role, name in roles.items()}, add_bos_token=True
    )
    add_tokens(tokenizer, added)
    tokenizer.padding_side = "right"
    template = file.fields.get("tokenizer.chat_template")
    if template is not None:
        known = policy_of(template)
        tokenizer.chat_template = known[0].text(known[1]) if known is not None else template
    stops = [_id(file, f"{key}_token_id", len(names)) for key in STOPS if f"{KEY}{key}_token_id" in file.fields]
    if template is not None:
        stops.append(names.index(family.chat.end_of_turn))
    return FileTokenizer(tokenizer, list(dict.fromkeys(stops)), template is not None)


def _lists(file: GgufFile, rows: int) -> tuple[list[str], list[float], list[int]]:
    """Texts, scores and kinds of a file's tokens, without those that fill up the embedding."""
    model = file.fields.get(f"{KEY}model")
    if model != SENTENCEPIECE:
        raise UserError(
            f"{file.path}: its tokenizer is {model!r}, and no Gemma's; SentencePiece's ('llama') is imported"
        )
    if file.fields.get(f"{KEY}add_space_prefix") is True:
        raise UserError(f"{file.path}: its tokenizer puts a space before a text, which no Gemma's does")
    found: list[Any] = [file.fields.get(KEY + key) for key in ("tokens", "scores", "token_type")]
    texts, *numbers = found
    whole = isinstance(texts, list) and all(isinstance(one, np.ndarray) and len(one) == len(texts) for one in numbers)
    if not whole:
        raise UserError(
            f"{file.path}: its tokenizer has no text, score and kind for each token; convert the model again"
        )
    names, scores, kinds = list(texts), *(one.tolist() for one in numbers)
    if len(names) > rows:
        raise UserError(f"{file.path}: has {len(names):,} tokens, but the embedding {rows:,} rows; fetch it again")
    while kinds and kinds[-1] == UNUSED:
        for one in (names, scores, kinds):
            one.pop()
    return names, scores, kinds


def _check(file: GgufFile, family: Family, names: Sequence[str], kinds: Sequence[int]) -> None:
    """Raises: UserError where pieces are no Gemma's, or twice there."""
    known = set(names)
    missing = [name for name in family.chat.control_tokens if name not in known]
    if missing:
        raise UserError(f"{file.path}: not a Gemma tokenizer: it has no token {', '.join(missing)}")
    lost = sorted(set(BYTES) - known)
    if lost:
        raise UserError(f"{file.path}: not a Gemma tokenizer: it has no token {lost[0]}")
    if len(known) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise UserError(f"{file.path}: damaged: two tokens are {twice!r}; fetch it again")
    other = set(kinds) - {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}
    if other:
        raise UserError(f"{file.path}: damaged: a token is of kind {min(other)}; fetch it again")


def _pieces(
    family: Family, names: Sequence[str], scores: Sequence[float], kinds: Sequence[int], roles: set[str]
) -> list[Piece]:
    """Pieces as tokenizer.json has them. Of ours, a learned piece with a score above 0 is one that is found first, in
    raw text alone.
    """
    special = {*roles, family.chat.start_of_turn, family.chat.end_of_turn}
    found = []
    for name, score, kind in zip(names, scores, kinds, strict=True):
        first = kind == USER_DEFINED or (kind == NORMAL and score > 0)
        found.append(
            Piece(
                name.replace(" ", SPACE_SIGN),
                0.0 if first or kind in (CONTROL, UNKNOWN) else score,
                added=first or kind in (CONTROL, UNKNOWN) or name in special,
                special=name in special,
            )
        )
    return found


def _added_by_user(pieces: Sequence[Piece], kinds: Sequence[int]) -> list[str]:
    """Tokens of text at the end of the vocabulary that are no text to Gemma: a user added them."""
    found = []
    for piece, kind in zip(reversed(pieces), reversed(kinds), strict=True):
        if kind != USER_DEFINED or is_text_token(piece.name):
            break
        found.append(piece.name)
    return found[::-1]


def _id(file: GgufFile, key: str, count: int) -> int:
    found = file.fields.get(KEY + key)
    if type(found) is not int or not 0 <= found < count:
        what = f"has no {KEY}{key}" if found is None else f"{KEY}{key} is {found}, which is no token"
        raise UserError(f"{file.path}: {what}; convert the model again")
    return found
