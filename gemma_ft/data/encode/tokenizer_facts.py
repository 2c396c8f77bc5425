"""What decides the ids of a text in a tokenizer, found once and kept in the user's cache by the tokenizer's content:
looking through the 600,000 merges of a Gemma takes seconds, in every command.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gemma_ft.families.records import CHATS
from gemma_ft.system.files import write_cached

LAYOUT = 1  # of what is kept: another number finds none of the older facts. Raise it with any change of what is found
SPACE_SIGN = "\u2581"  # SentencePiece's sign for a space in a piece
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
# Added tokens that are text: runs of blanks and line breaks, and HTML tags. The tags are named, because "<eos>" looks
# like one.
BLANK_RUN = re.compile(rf"[\n\t\r {SPACE_SIGN}]+")
HTML_TAGS = (
    *("table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td", "h1", "h2", "h3", "h4", "h5", "h6"),
    *("blockquote", "strong", "em", "b", "i", "u", "s", "sub", "sup", "code", "pre", "p", "a", "ul", "ol", "li"),
    *("div", "span", "br", "hr"),
)
HTML_TAG = re.compile(rf"</?(?:{'|'.join(HTML_TAGS)})/?>", re.IGNORECASE)


@dataclass(frozen=True)
class TokenizerFacts:
    """`sha256`: of all that makes ids of a text (vocabulary, merges, added tokens). `control`: names of the control
    tokens and their ids. `spelled`: whether merges lead from plain text to one of them, or to a byte piece.
    """

    sha256: str
    control: dict[str, int]
    spelled: bool


def is_text_token(name: str) -> bool:
    """Whether an added token stands for text as it is (blank runs, HTML tags), and so is no control token."""
    return bool(BLANK_RUN.fullmatch(name) or HTML_TAG.fullmatch(name))


def tokenizer_facts(serialized: str, added_by_user: Iterable[str], folder: Path) -> TokenizerFacts:
    """The facts of a backend tokenizer (its JSON text), from `folder` where they were found before.

    `added_by_user`: added tokens that are text to their user. A folder that cannot be read or written costs time only.
    """
    text = sorted(added_by_user)
    digest = hashlib.sha256(serialized.encode())
    digest.update(json.dumps([LAYOUT, text]).encode())
    path = folder / f"{digest.hexdigest()}.json"
    with contextlib.suppress(OSError, ValidationError):
        return TypeAdapter(TokenizerFacts).validate_json(path.read_bytes(), strict=True)
    facts = _found(json.loads(serialized), set(text))
    with contextlib.suppress(OSError):
        write_cached(path, json.dumps(asdict(facts)).encode())
    return facts


def _found(spec: dict[str, Any], text: set[str]) -> TokenizerFacts:
    ids = {**spec["model"]["vocab"], **{token["content"]: token["id"] for token in spec["added_tokens"]}}
    added = {token["content"] for token in spec["added_tokens"]} - text
    turns = {name for chat in CHATS for name in chat.control_tokens if name in ids}
    control = {name for name in added if not is_text_token(name)} | turns
    decides = [sorted(spec["model"]["vocab"].items()), spec["model"].get("merges"), spec["added_tokens"]]
    return TokenizerFacts(
        sha256=hashlib.sha256(json.dumps(decides).encode()).hexdigest(),
        control={name: ids[name] for name in sorted(control)},
        spelled=any(spells_control(merge, control) for merge in spec["model"].get("merges", [])),
    )


def spells_control(merge: str | Sequence[str], control: set[str]) -> bool:
    """Whether a merge makes a control token or a byte piece ("<0x0A>") out of parts of plain text."""
    piece = merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge)
    return piece in control or BYTE_PIECE.fullmatch(piece) is not None
