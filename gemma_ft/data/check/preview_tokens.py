"""What a preview shows of some examples: their documents as tokens of a kind, with what was cut off around them. How
it looks, on a terminal or on a page, is for others to say.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy

from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.tokenizer_facts import BYTE_PIECE, SPACE_SIGN
from gemma_ft.data.pack.counts import trained_between
from gemma_ft.data.pack.examples import Examples
from gemma_ft.system.limits import IGNORE

KINDS = ("trained", "masked", "control", "control, trained", "truncated")
DOCUMENTS_SHOWN = 3  # of an example
CUT_SHOWN = 24  # tokens next to where a document was cut
LINE_BREAK = "↵"
DIRECTIONS = frozenset(("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"))  # UAX 9: text in other order


@dataclass(frozen=True)
class Token:
    """One token as text that can be shown; several, where it takes them to make one character."""

    kind: str  # one of KINDS
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """Tokens of a document that are in no example; `ids`: those next to what is."""

    ids: Sequence[int]
    tokens: int
    trained: int  # of them that would be trained

    def describe(self, side: str) -> str:
        """A line for a person; `side`: where they are, "before" or "past" this point."""
        of_answers = f", {self.trained:,} of them to be trained" if self.trained else ""
        which = "last" if side == "before" else "first"
        hidden = f"; the {which} {len(self.ids)} are shown" if len(self.ids) < self.tokens else ""
        return f"{self.tokens:,} tokens {side} this point are truncated{of_answers}{hidden}"


@dataclass(frozen=True)
class ShownDocument:
    """A document of an example, or the piece of one."""

    number: int  # in the example, from 1
    where: str
    ids: Sequence[int]
    labels: Sequence[int]
    piece: str  # which of a document's tokens these are, where they are not all
    before: Cut | None
    after: Cut | None
    weight: float  # in the loss
    asked: bool  # for by name
    name: str = ""  # of a preference: prompt, chosen, rejected; a good or a bad answer
    margin: float = 0.0  # of a pair

    @property
    def title(self) -> str:
        """Number, place and size."""
        cut = sum(one.tokens for one in (self.before, self.after) if one)
        facts = [self.name or f"document {self.number}", self.where, f"{len(self.ids):,} tokens", self.piece]
        facts += [f"weight {self.weight:g}" if self.weight != 1 else "", f"margin {self.margin:g}" * bool(self.margin)]
        facts += [f"{cut:,} truncated" if cut else "", "◀ asked for" if self.asked else ""]
        return " · ".join(filter(None, facts))


@dataclass(frozen=True)
class ShownExample:
    """An example and those of its documents that are shown."""

    number: int  # from 1
    of: int
    tokens: int
    trained: int
    documents: Sequence[ShownDocument]
    others: int  # documents that are not shown
    paired: bool = False  # the documents are a prompt and two ways on from it

    @property
    def title(self) -> str:
        """Number, size and trained share."""
        share = f"{self.trained} trained ({self.trained / self.tokens:.0%})"
        return f"example {self.number} of {self.of:,} · {self.tokens} tokens · {share}"


def shown_example(examples: Examples, row: int, asked: Collection[int] = ()) -> ShownExample:
    """One example with its first documents, and all that are `asked` for (by their number in the data set)."""
    pieces = examples.pieces_of(row)
    wanted = [place for place, piece in enumerate(pieces) if int(piece[0]) in asked]
    others = [place for place in range(len(pieces)) if place not in set(wanted)]
    places = sorted(wanted + others[: max(0, DOCUMENTS_SHOWN - len(wanted))])
    trained = int(trained_between(examples.documents, pieces).sum())
    documents = [_document(examples, place + 1, pieces[place], asked=place in wanted) for place in places]
    rows = examples.documents.rows
    if rows != "answers":
        sides, margins = (values[pieces[places, 0]].tolist() for values in examples.documents.preferences())
        documents = _judged(documents, sides) if rows == "labelled" else _halves(documents, margins[0])
    return ShownExample(
        number=row + 1,
        of=len(examples),
        tokens=int(examples.lengths[row]),
        trained=trained,
        documents=documents,
        others=len(pieces) - len(places),
        paired=rows == "pairs",
    )


def _judged(documents: Sequence[ShownDocument], sides: Sequence[int]) -> list[ShownDocument]:
    named = ("a bad answer", "a good answer")
    return [replace(one, name=named[side]) for one, side in zip(documents, sides, strict=True)]


def _halves(documents: Sequence[ShownDocument], margin: float) -> list[ShownDocument]:
    """(prompt, chosen, rejected) of the two documents of a pair: what they have in common is shown once."""
    chosen, rejected = documents
    untrained = [next((at for at, one in enumerate(half.labels) if one != IGNORE), 0) for half in documents]
    shared = min(untrained)
    if chosen.ids[:shared] != rejected.ids[:shared]:
        shared = next(at for at in range(shared) if chosen.ids[at] != rejected.ids[at])
    prompt = replace(
        chosen, name="prompt", ids=chosen.ids[:shared], labels=chosen.labels[:shared], after=None, margin=margin
    )
    rest = [
        replace(
            half, name=name, ids=half.ids[shared:], labels=half.labels[shared:], before=None, weight=1.0, asked=False
        )
        for name, half in (("chosen", chosen), ("rejected", rejected))
    ]
    return [prompt, *rest]


def tokens_of(ids: Sequence[int], labels: Sequence[int], encoder: ChatEncoder) -> Iterator[Token]:
    """The tokens of a document; the bytes of one character that is no piece of its own come as one text."""
    kinds = [_kind(token, label, encoder) for token, label in zip(ids, labels, strict=True)]
    return _tokens(ids, kinds, encoder)


def cut_tokens(cut: Cut, encoder: ChatEncoder) -> Iterator[Token]:
    """The tokens next to a cut, all of the kind "truncated"."""
    return _tokens(cut.ids, ["truncated"] * len(cut.ids), encoder)


def _tokens(ids: Sequence[int], kinds: Sequence[str], encoder: ChatEncoder) -> Iterator[Token]:
    names = encoder.tokenizer.convert_ids_to_tokens(list(ids))
    tokens = list(zip(kinds, names, ids, strict=True))
    for (kind, is_byte), group in groupby(tokens, key=lambda token: (token[0], bool(BYTE_PIECE.fullmatch(token[1])))):
        if is_byte:
            _, pieces, numbers = zip(*group, strict=True)
            text = bytes(int(piece[3:5], 16) for piece in pieces).decode("utf-8", errors="replace")
            yield Token(kind, visible(text), numbers)
        else:
            yield from (Token(kind, visible(name.replace(SPACE_SIGN, " ")), (number,)) for _, name, number in group)


def visible(piece: str) -> str:
    """Printable text: nothing in a data row can move the cursor, change a terminal, or turn the text around."""
    shown = "".join(chr(0x2400 + ord(sign)) if ord(sign) < 32 and sign not in "\n\t" else sign for sign in piece)
    shown = "".join(
        "\ufffd" if 0x7F <= ord(sign) < 0xA0 or unicodedata.bidirectional(sign) in DIRECTIONS else sign
        for sign in shown
    )
    return shown.replace("\n", f"{LINE_BREAK}\n").replace("\t", "→   ")


def _kind(token: int, label: int, encoder: ChatEncoder) -> str:
    if token in encoder.content.control_ids:
        return "control" if label == IGNORE else "control, trained"
    return "masked" if label == IGNORE else "trained"


def _document(examples: Examples, number: int, piece: Any, *, asked: bool) -> ShownDocument:
    document, start, end = map(int, piece)
    ids, labels = (array.tolist() for array in examples.documents.cut(document, start, end))
    total = len(examples.documents.cut(document, 0, numpy.iinfo(numpy.int64).max)[0])
    pieces = examples.pieces[examples.pieces[:, 0] == document]
    before = int(max((last for last in pieces[:, 2] if last <= start), default=0))
    after = int(min((first for first in pieces[:, 1] if first >= end), default=total))
    whole = len(numpy.unique(pieces, axis=0)) == 1  # or cut, which is told by itself
    return ShownDocument(
        number=number,
        where=examples.documents.where(document),
        ids=[examples.bos, *ids] if start else ids,
        labels=[IGNORE, *labels] if start else labels,
        piece="" if whole else f"{start + 1:,} to {start + len(ids):,} of {total:,}",
        before=_cut(examples, document, before, start, last=True),
        after=_cut(examples, document, start + len(ids), after, last=False),
        weight=examples.weight(document),
        asked=asked,
    )


def _cut(examples: Examples, document: int, start: int, end: int, *, last: bool) -> Cut | None:
    """What of a document lies between two pieces, or a piece and an end; None for nothing."""
    if start >= end:
        return None
    ids, labels = examples.documents.cut(document, start, end)
    near = ids[-CUT_SHOWN:] if last else ids[:CUT_SHOWN]
    return Cut(near.tolist(), end - start, int((labels != IGNORE).sum()))
