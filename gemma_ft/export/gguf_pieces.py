"""What a tokenizer.json tells of its tokens as SentencePiece's algorithm, llama.cpp's, needs them: kind and score of
each, so that pieces are merged in the same order. A tokenizer whose ids that algorithm would not give is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from gemma_ft.data.encode.tokenizer_facts import BYTE_PIECE, SPACE_SIGN
from gemma_ft.errors import UserError

# Kinds of tokens, with the numbers that both SentencePiece and GGUF give them.
# Source: sentencepiece_model.proto, SentencePiece.Type; ggml docs/gguf.md, tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BYTES = [f"<0x{value:02X}>" for value in range(256)]
PROBED = 3  # runs of one character are compared up to so many times the longest piece
INSTEAD = "use --to hf instead"


@dataclass(frozen=True)
class Piece:
    """One token: the text that finds it, its kind, and its score: of two merges the one to the higher score is made."""

    text: str
    kind: int
    score: float


def pieces_of(spec: Mapping[str, Any], control: Collection[int], model: Any) -> dict[int, Piece]:
    """Every token of a serialized tokenizers BPE (`spec`, and the `model` in it), by id. `control`: ids that no text
    gives.

    Tokens that are found in the text before anything is merged are USER_DEFINED, of blanks with blanks in their text:
    so llama.cpp finds them in the text as it was typed. Added tokens with U+2581 in them that are found in raw text
    alone never meet a blank there: they are what merges make of them.
    Raises: UserError, where the algorithm would make other ids than the merges do, or a control token out of text.
    """
    tokens = _Tokens.of(spec, control)
    tokens.check_bytes()
    tokens.check_found_first()
    scores = _scores(tokens.spans(), model)
    return {id: Piece(tokens.text(name), tokens.kinds[name], scores.get(name, 0.0)) for name, id in tokens.ids.items()}


@dataclass(frozen=True)
class _Tokens:
    """Names, kinds and merges. `ranks`: of two merges that are possible the one with the lower rank is made."""

    ids: dict[str, int]
    kinds: dict[str, int]
    ranks: dict[tuple[str, str], int]
    added: dict[str, Mapping[str, Any]]
    byte_of: dict[str, str]  # a character that stands for a byte -> the byte's name

    @classmethod
    def of(cls, spec: Mapping[str, Any], control: Collection[int]) -> _Tokens:
        added = {token["content"]: token for token in spec["added_tokens"]}
        ids = {**spec["model"]["vocab"], **{name: token["id"] for name, token in added.items()}}
        # transformers calls a byte by its character where merges are made of it: the tab of Gemma 1 and 2
        byte_of = {chr(value): name for value, name in enumerate(BYTES[:0x80]) if name not in ids and chr(value) in ids}
        kinds = {}
        for name, id in ids.items():
            if name == spec["model"]["unk_token"]:
                kinds[name] = UNKNOWN
            elif id in control:
                kinds[name] = CONTROL
            elif name in byte_of or BYTE_PIECE.fullmatch(name):
                kinds[name] = BYTE
            elif name in added and (added[name]["normalized"] or SPACE_SIGN not in name):
                kinds[name] = USER_DEFINED
            else:
                kinds[name] = NORMAL
        merges = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in spec["model"]["merges"])
        ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}
        return cls(ids, kinds, ranks, added, byte_of)

    def text(self, name: str) -> str:
        """What GGUF stores for a token."""
        name = self.byte_of.get(name, name)
        return name.replace(SPACE_SIGN, " ") if self.kinds.get(name) == USER_DEFINED else name

    def check_bytes(self) -> None:
        """Raises UserError when llama.cpp would find no token for a character that is in no piece."""
        missing = set(BYTES) - set(self.ids) - set(self.byte_of.values())
        if missing:
            raise UserError(f"has no token {min(missing)}, and llama.cpp needs one for every byte; {INSTEAD}")

    def check_found_first(self) -> None:
        """Raises UserError when tokens that are found in the text before it is merged are found by other rules."""
        text = [name for name, kind in self.kinds.items() if kind == USER_DEFINED]
        for name in text:
            if any(self.added[name][rule] for rule in ("lstrip", "rstrip", "single_word")):
                raise UserError(
                    f"finds {name!r} with the blanks around it or as a whole word, GGUF has none; {INSTEAD}"
                )
        if pair := overlapping(text):
            first, second = pair
            raise UserError(
                f"has tokens {first!r} and {second!r}, which overlap: llama.cpp takes the longer; {INSTEAD}"
            )

    def spans(self) -> list[tuple[int, int, str]]:
        """(lowest rank, highest rank, name) of each token that merges make of text, in that order.

        Raises: UserError when llama.cpp would make a merge that is none here: it merges whatever gives a token's text.
        """
        parts = {
            name for name, kind in self.kinds.items() if kind == NORMAL or (len(name) == 1 and kind != USER_DEFINED)
        }
        found = []
        for name, kind in self.kinds.items():
            if kind == USER_DEFINED or name in self.byte_of:
                continue
            ranks = []
            for cut in range(1, len(name)):
                left, right = name[:cut], name[cut:]
                if not (left in parts or (cut == 1 and left not in self.kinds)):
                    continue
                if not (right in parts or (cut == len(name) - 1 and right not in self.kinds)):
                    continue
                rank = self.ranks.get((left, right))
                if rank is None or kind != NORMAL:
                    raise UserError(f"does not make {name!r} of {left!r} + {right!r}, which llama.cpp would; {INSTEAD}")
                ranks.append(rank)
            if ranks:
                found.append((min(ranks), max(ranks), name))
        return sorted(found)


def overlapping(names: Collection[str]) -> tuple[str, str] | None:
    """Two names of which one may begin inside the other and end behind it; runs of one character do no harm."""
    begins: dict[str, set[str]] = {}
    for name in names:
        for end in range(1, len(name)):
            begins.setdefault(name[:end], set()).add(name)
    for name in names:
        for start in range(1, len(name)):
            for other in sorted(begins.get(name[start:], set()) - {name}):
                if len(set(name + other)) > 1:
                    return name, other
    return None


def _scores(spans: list[tuple[int, int, str]], model: Any) -> dict[str, float]:
    """A score for each token that merges make, from `_Tokens.spans`: the higher, the earlier.

    All merges to one token have one score, so their ranks may not enclose a merge to another; but those of runs of one
    character may, where all that comes of them is that the longest runs are found first.
    """
    reached, before = -1, ""
    runs: set[str] = set()
    for first, last, name in spans:
        if first < reached:
            if len(set(name)) > 1 or len(set(before)) > 1:
                raise UserError(f"merges to {before!r} and to {name!r} by turns, which no scores can say; {INSTEAD}")
            runs |= {name[0], before[0]}
        if last > reached:
            reached, before = last, name
    for character in sorted(runs):
        _check_runs(character, [name for *_, name in spans if set(name) == {character}], model)
    top = next((place for place, (*_, name) in enumerate(spans) if len(set(name)) > 1), 0)
    return {name: float(top - place) for place, (*_, name) in enumerate(spans)}  # 0, -1, ... as SentencePiece's are


def _check_runs(character: str, names: list[str], model: Any) -> None:
    """Raises UserError when runs of a character are not cut longest first, as llama.cpp does with `names`, by score."""
    lengths = [len(name) for name in names]
    longest = max(lengths)
    expected = lengths == list(range(longest, 1, -1))
    for count in range(1, PROBED * longest + 1):
        rest = [character * (count % longest)] if count % longest else []
        cut = [character * longest] * (count // longest) + rest
        expected = expected and [token.value for token in model.tokenize(character * count)] == cut
    if not expected:
        raise UserError(f"does not cut runs of {character!r} longest first, as llama.cpp would; {INSTEAD}")
