"""What a look at pairs and labelled answers finds: how long the better answers are beside the worse ones, how alike the
two halves of a pair are, prompts that come back, verdicts that contradict each other.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from gemma_ft.data.check.findings import Findings
from gemma_ft.data.check.near_duplicates import ALIKE, WORD, likeness
from gemma_ft.data.check.rows import CheckedRow, Places, RowSource
from gemma_ft.data.conversation import Conversation, Pair, Turn

OPENING = 3  # words: halves that have the first ones in common begin alike


@dataclass(frozen=True)
class PreferenceFacts:
    """The figures of training rows. Lengths are of the answers alone: tokens with the one that ends them."""

    kind: str  # pairs, or labelled
    chosen: int  # answers that are preferred, or called good
    rejected: int
    chosen_tokens: float  # medians
    rejected_tokens: float
    chosen_characters: float
    rejected_characters: float
    longer: float | None  # share of the pairs whose chosen half has more tokens; None where rows are no pairs
    shorter: float | None
    equal_openings: float | None  # share of the pairs whose halves have the first OPENING words in common
    margins: int  # pairs that say by how much

    def describe(self) -> list[str]:
        """Lines for a person."""
        names = ("chosen", "rejected") if self.kind == "pairs" else ("good", "bad")
        counts = f"{self.chosen:,} pairs" if self.kind == "pairs" else f"{self.chosen:,} good, {self.rejected:,} bad"
        better, worse = (
            f"{name} {tokens:,.0f} tokens ({characters:,.0f} characters)"
            for name, tokens, characters in (
                (names[0], self.chosen_tokens, self.chosen_characters),
                (names[1], self.rejected_tokens, self.rejected_characters),
            )
        )
        lines = [f"{counts}; answers, medians: {better}, {worse}"]
        if self.longer is not None:
            lines.append(
                f"the chosen answer is the longer one in {self.longer:.0%} of the pairs, the shorter one in "
                f"{self.shorter:.0%}; {self.equal_openings:.0%} begin with the same words"
                + (f"; {self.margins:,} say by how much" if self.margins else "")
            )
        return lines


class PreferenceLook:
    """Takes rows that hold preferences, training rows first; `facts` are of those."""

    def __init__(self, findings: Findings, places: Places) -> None:
        self.findings, self.places = findings, places
        self.kind, self._first = "", ""  # the place of the first training row
        self._tokens: dict[int, array[int]] = {1: array("q"), 0: array("q")}  # of answers by side
        self._characters: dict[int, array[int]] = {1: array("q"), 0: array("q")}
        self._openings = self._margins = 0
        self._prompts: dict[str, dict[bytes, int]] = {"train": {}, "eval": {}}
        self._verdicts: dict[bytes, tuple[Any, int]] = {}

    def count(self, source: RowSource, row: CheckedRow) -> None:
        """The figures of one more row, except its tokens."""
        self.kind = source.reading.rows
        if source.side == "train":
            for item in row.items:
                self._count(item)

    def row(self, source: RowSource, row: CheckedRow, number: int, where: str) -> bool:
        """One more row, which repeats none; whether its prompts are new."""
        self._first = self._first or (where if source.side == "train" else "")
        pairs = [item for item in row.items if isinstance(item, Pair)]
        alike = max((likeness(_said(one.chosen), _said(one.rejected)) for one in pairs), default=0.0)
        if alike >= ALIKE:
            self.findings.add("near_halves", where, f"{alike:.0%}")
        self._contradicted(source, row, number, where)
        return self._is_new(source, row, number, where)

    def measured(self, sides: Any, trained: Any) -> None:
        """The trained tokens of answers of training rows, and which side each is on."""
        for side, held in self._tokens.items():
            held.extend(trained[sides == side].tolist())

    def facts(self) -> PreferenceFacts | None:
        """None where there are no such training rows."""
        good, bad = (numpy.array(self._tokens[side], numpy.int64) for side in (1, 0))
        if not len(good) + len(bad):
            return None
        if self.kind == "labelled" and not (len(good) and len(bad)):
            label = "good" if len(good) else "bad"
            self.findings.add("one_label", self._first, f"all {len(good) + len(bad):,} are called {label}")
        medians = {
            f"{name}_{unit}": float(numpy.median(held[side])) if held[side] else 0.0
            for unit, held in (("tokens", self._tokens), ("characters", self._characters))
            for side, name in ((1, "chosen"), (0, "rejected"))
        }
        shares: dict[str, Any] = {"longer": None, "shorter": None, "equal_openings": None}
        if self.kind == "pairs":
            shares = {"longer": float((good > bad).mean()), "shorter": float((good < bad).mean()),
                      "equal_openings": self._openings / len(good)}  # fmt: skip
        return PreferenceFacts(self.kind, len(good), len(bad), **medians, **shares, margins=self._margins)

    def _count(self, item: Any) -> None:
        halves = item.halves if isinstance(item, Pair) else (item,)
        for side, half in zip((1, 0) if isinstance(item, Pair) else (int(bool(item.label)),), halves, strict=True):
            self._characters[side].append(len(_said(_answer(item, half))))
        if isinstance(item, Pair):
            first, second = (WORD.findall(_said(half))[:OPENING] for half in (item.chosen, item.rejected))
            self._openings += first == second
            self._margins += item.margin is not None

    def _is_new(self, source: RowSource, row: CheckedRow, number: int, where: str) -> bool:
        """Whether no row before has its prompt; told where one has."""
        prompts, seen = row.prompts(source.reading.encoder), self._prompts[source.side]
        known = [seen[prompt] for prompt in prompts if prompt in seen]
        trained = [self._prompts["train"][one] for one in prompts if one in self._prompts["train"]]
        if source.side == "eval" and trained:
            self.findings.add("prompt_overlap", where, twin=self.places.where(trained[0]))
        elif known:
            self.findings.add("equal_prompt", where, twin=self.places.where(known[0]))
        for prompt in prompts:
            seen.setdefault(prompt, number)
        return not known and not (source.side == "eval" and trained)

    def _contradicted(self, source: RowSource, row: CheckedRow, number: int, where: str) -> None:
        """Tells of a row in which an answer is the better one, or a good one, that is the other in an earlier row."""
        told = False
        for key, good in row.verdicts(source.reading.encoder):
            before, first = self._verdicts.setdefault(key, (good, number))
            if before != good and not told:
                told = True
                twin = self.places.where(first) if first != number else ""
                self.findings.add("contradiction", where, twin=twin)


def _answer(item: Pair | Conversation, half: Conversation) -> Sequence[Turn]:
    """The turns of a half behind its prompt."""
    return half.turns[len(item.prompt) :] if isinstance(item, Pair) else half.turns[-1:]


def _said(turns: Sequence[Turn]) -> str:
    return "\n".join(turn.content.strip() for turn in turns)
