"""A look at prepared examples before a run: some of them as tokens, all of them in figures, and the checks that every
one must pass.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy

from gemma_ft.data.check.invariants import broken_invariants
from gemma_ft.data.check.overview import Overview, overview
from gemma_ft.data.check.preview_tokens import ShownExample, shown_example
from gemma_ft.data.check.row_ids import documents_at
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.pack.arrange import Prepared
from gemma_ft.data.pack.counts import count_pieces
from gemma_ft.data.pack.examples import Examples, steps_per_epoch
from gemma_ft.data.pack.preferences import PreferenceExamples
from gemma_ft.data.pack.stats import DataStats


@dataclass(frozen=True)
class Preview:
    """What there is to show of a data set."""

    encoder: ChatEncoder
    format: str  # of the rows, and why; of several sources a line each
    stats: DataStats
    shown: Sequence[ShownExample]
    notes: Sequence[str]  # on what is shown
    overview: Overview
    lengths: Sequence[int]  # tokens of each example
    faults: Sequence[str]  # none: the data can be trained on
    global_batch_size: int
    streamed: bool  # figures are of the first block alone

    @property
    def span(self) -> str:
        """What the figures are of."""
        return "the first block of the stream" if self.streamed else "an epoch"

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch, or of the first block."""
        return steps_per_epoch(self.stats.packed_rows, self.global_batch_size)

    def describe(self) -> str:
        """The counts in a few lines for a person."""
        lines = [self.stats.counted()]
        if cut := self.overview.cut_tokens:
            lines.append(f"{cut:,} tokens are truncated, {self.overview.cut_trained:,} of them to be trained")
        steps = f"{self.steps:,} optimizer step{'s' if self.steps > 1 else ''}"
        batch = f"{self.global_batch_size:,} {self.stats.example_word}"
        lines.append(f"{self.span}: {self.stats.tokens:,} tokens, {steps} of {batch}")
        return "\n".join(lines)

    def warnings(self) -> list[str]:
        """What the rows say that is not learned as it was meant; it can be trained on all the same."""
        return self.stats.warnings()

    def passed(self) -> list[str]:
        """What the checks found to be as it must be, where there is no fault."""
        ends, end = self.stats.terminators, self.encoder.format.end
        return [
            f"{self.encoder.chat.bos} once in each of {self.stats.documents:,} sequences, at the start",
            f"{end} is trained {ends:,} times" if ends else "plain text: no turns, every token is trained",
            "every example has trained tokens",
        ]


def build_preview(
    prepared: Prepared,
    encoder: ChatEncoder,
    *,
    format: str = "",
    rows: int = 3,
    row_ids: Sequence[str] = (),
    held_out: Collection[str] = (),
    global_batch_size: int = 1,
    streamed: bool = False,
) -> Preview:
    """The first `rows` examples, or those that hold the rows named by `row_ids` (the first `rows` for each); figures
    and checks of all examples. `format`: what is said of it. `held_out`: where the rows stand that are kept from
    training.

    Raises: DataError for a row that is not there.
    """
    examples, limit = prepared.examples, prepared.stats.max_seq_len
    asked = documents_at(examples, row_ids, max_seq_len=limit, held_out=held_out)
    wanted, notes = _holding(examples, asked, rows) if asked else (range(min(rows, len(examples))), [])
    named = frozenset(document for found in asked.values() for document in found)
    counts = count_pieces(examples, encoder.control)
    return Preview(
        encoder=encoder,
        format=format,
        stats=prepared.stats,
        shown=[shown_example(examples, row, named) for row in wanted],
        notes=notes,
        overview=overview(examples.documents, counts),
        lengths=examples.lengths.tolist(),
        faults=broken_invariants(counts, encoder) + _faults_of_labels(examples),
        global_batch_size=global_batch_size,
        streamed=streamed,
    )


def _faults_of_labels(examples: Examples) -> list[str]:
    """Why answers that are called good or bad teach nothing, where they do not."""
    why = examples.one_label() if isinstance(examples, PreferenceExamples) else None
    return [] if why is None else [why]


def _holding(examples: Examples, asked: dict[str, list[int]], most: int) -> tuple[list[int], list[str]]:
    """The examples that hold some documents, at most so many for each place, and a line where there are more."""
    pieces, example = examples.in_order()
    wanted: list[int] = []
    notes: list[str] = []
    for where, found in asked.items():
        holding = numpy.unique(example[numpy.isin(pieces[:, 0], found)]).tolist()
        wanted += holding[:most]
        if len(holding) > most:
            notes.append(f"{where} is in {len(holding):,} examples; shown: the first {most}")
    return list(dict.fromkeys(wanted)), notes
