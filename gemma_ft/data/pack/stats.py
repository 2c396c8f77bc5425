"""What became of the rows of a data set, in counts, and in lines for a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from gemma_ft.data.read.rendered import is_custom
from gemma_ft.system.row_kind import RowKind

UNREAD_SHOWN = 8  # fields
REMARKS = ("unread", "rendered", "ends")  # counts by name
EXAMPLE_WORDS: Mapping[RowKind, str] = {"answers": "examples", "pairs": "pairs", "labelled": "rows"}


@dataclass
class DataStats:
    """What became of the rows. `describe` says it in a few lines."""

    row_kind: RowKind = "answers"
    rows: int = 0  # conversations and documents that came in
    documents: int = 0  # sequences that are trained on: conversations, and chunks of long documents
    packed_rows: int = 0  # examples
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0  # rows cut at max_seq_len and still trained on
    dropped: int = 0  # those of which no trained token is left within max_seq_len
    overlapping: int = 0  # left out, for they are held-out rows as well (data.streaming)
    untrained: int = 0  # their weight is 0, or no answer of them is to be trained (data.trained_turns: last)
    too_long: int = 0  # rows left out for their length (data.too_long: drop)
    dropped_empty: int = 0  # an answer, a question or a whole document is empty
    left_out_turns: int = 0  # leading answers and trailing questions of sharegpt
    dropped_system: int = 0  # system turns left out by the policy "drop"
    terminators: int = 0  # trained <end_of_turn> tokens
    weights: tuple[float, float] = (1.0, 1.0)  # least and greatest, in the loss, of what is trained
    max_seq_len: int = 0
    unread: dict[str, int] = field(default_factory=dict)  # path of a field that is not read -> rows that have it
    rendered: dict[str, int] = field(default_factory=dict)  # chat template -> rows that spell it out
    ends: dict[str, int] = field(default_factory=dict)  # ending token -> rows whose last text ends with its name

    @property
    def example_word(self) -> str:
        """What a person calls several examples."""
        return EXAMPLE_WORDS[self.row_kind]

    @property
    def fill(self) -> float:
        """Share of the token budget that holds tokens, 0 to 1."""
        return self.tokens / max(self.packed_rows * self.max_seq_len, 1)

    def describe(self) -> str:
        """A few lines for a person: totals first, then only what needs attention."""
        return "\n".join([self.counted(), *self.warnings()])

    def warnings(self) -> list[str]:
        """What the rows say that is not learned, or not as it was meant, a line each."""
        found = []
        if self.unread:
            found.append(unread_line(self.unread))
        if self.rendered:
            count, names = sum(self.rendered.values()), ", ".join(sorted(self.rendered))
            found.append(
                f"{count:,} of {self.rows:,} rows spell a chat template as text ({names}), whose markers are learned "
                "as words: take them out, and give turns as messages"
            )
        found += [
            f"{count:,} of {self.rows:,} rows end in {end} as text, which is learned as a word: take it off, an end is "
            "trained without it"
            for end, count in sorted(self.ends.items())
            if is_custom(count, self.rows)
        ]
        return found

    def counted(self) -> str:
        """The totals, and what was cut or left out, each with its count."""
        share = self.trained_tokens / max(self.tokens, 1)
        rest = f"{self.tokens:,} tokens, {share:.0%} trained"
        if self.row_kind == "answers":
            lines = [
                f"{self.rows:,} rows -> {self.documents:,} sequences, {rest}",
                f"{self.packed_rows:,} examples of up to {self.max_seq_len:,} tokens, {self.fill:.1%} full",
            ]
        else:
            mean = self.tokens / max(self.documents, 1)
            lines = [
                f"{self.rows:,} {self.example_word} -> {self.documents:,} answers, {rest}",
                f"{mean:,.0f} of up to {self.max_seq_len:,} tokens in an answer with its prompt",
            ]
        notes = (
            (self.truncated, "cut at max_seq_len"),
            (self.dropped, "dropped: their answer lies past max_seq_len"),
            (self.overlapping, "left out: they are held-out rows too"),
            (self.untrained, "dropped: none of their answers is to be trained, or their weight is 0"),
            (self.too_long, "dropped: longer than max_seq_len (data.too_long: drop)"),
            (self.dropped_empty, "dropped: empty question, answer or text"),
            (self.left_out_turns, "turns left out: answers before the first question, questions after the last answer"),
            (self.dropped_system, "system turns left out (data.system: drop)"),
        )
        if self.weights != (1.0, 1.0):
            lines.append("in the loss a row weighs from {:g} to {:g}".format(*self.weights))
        return "\n".join(lines + [f"{count:,} {what}" for count, what in notes if count])

    def add(self, other: DataStats) -> None:
        """Count what became of further rows as well."""
        weights = min(self.weights[0], other.weights[0]), max(self.weights[1], other.weights[1])
        for one in fields(self):
            if one.name in REMARKS:
                setattr(self, one.name, dict(Counter(getattr(self, one.name)) + Counter(getattr(other, one.name))))
            elif one.name not in ("row_kind", "weights", "max_seq_len"):
                setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))
        self.weights = weights

    def as_dict(self) -> dict[str, Any]:
        """The counts by name, for a report file."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "row_kind"}


def unread_line(unread: Mapping[str, int]) -> str:
    """Fields that are not read, those of most rows first: "not read: system in 12 rows, messages[].tool_calls in 3"."""
    ordered = sorted(unread.items(), key=lambda pair: (-pair[1], pair[0]))
    told = [f"{path} in {count:,}" for path, count in ordered[:UNREAD_SHOWN]]
    told[0] += " rows" if ordered[0][1] > 1 else " row"
    if len(ordered) > UNREAD_SHOWN:
        told.append(f"and {len(ordered) - UNREAD_SHOWN:,} more fields")
    return f"not read: {', '.join(told)}"
