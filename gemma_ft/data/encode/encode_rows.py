"""Rows become tokens: a row is read as items by its format, and each item encoded as one document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from gemma_ft.data.conversation import Pair, RowKind
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.documents import table_of, table_of_pairs
from gemma_ft.data.read.bad_rows import BadRows
from gemma_ft.data.read.chunks import Chunk
from gemma_ft.data.read.parse_rows import parse_row
from gemma_ft.data.read.sources import Row

LAYOUT = 7  # of encoded rows, and of how a format reads one: a cache finds none that have another number


@dataclass(frozen=True)
class Reading:
    """How rows become items, and items tokens. `rows`: which items are wanted of them."""

    format: str
    columns: Mapping[str, str]
    encoder: ChatEncoder
    rows: RowKind = "answers"

    def key(self, chunk: Chunk) -> str:
        """SHA-256 (hex) of all that decides what a chunk becomes."""
        encoder = self.encoder
        decides = [LAYOUT, chunk.digest, self.format, sorted(self.columns.items()), encoder.content.sha256,
                   encoder.template_hash, encoder.system_policy, encoder.trained_turns]  # fmt: skip
        if self.rows != "answers":
            decides.append(self.rows)
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    def items(self, chunk: Chunk, bad: BadRows) -> list[tuple[int, Any]]:
        """(offset of its row, item) of all that a chunk holds: an Item, or a Pair where rows are pairs."""
        found: list[tuple[int, Any]] = []
        for offset, fields in chunk.rows(bad):
            row = Row(chunk.where(offset), fields)
            for item in parse_row(row, self.format, self.columns, bad, chat=self.encoder.chat, rows=self.rows):
                why = self.encoder.refuses(item)
                if why is not None:
                    bad.add(row.where, why)
                else:
                    found.append((offset, item))
        return found


def encoded_chunk(reading: Reading, chunk: Chunk) -> pa.Table:
    """The documents of a chunk, its bad rows with their reasons."""
    bad = BadRows()
    found = reading.items(chunk.at_origin(), bad)
    reasons = [(int(where.removeprefix(":")), reason) for where, reason in bad.rows]
    items, offsets = [item for _, item in found], [offset for offset, _ in found]
    pairs = [item for item in items if isinstance(item, Pair)]
    if pairs:
        return table_of_pairs(pairs, offsets, reading.encoder, reasons).combine_chunks()
    rest = [item for item in items if not isinstance(item, Pair)]
    return table_of(rest, offsets, reading.encoder, reasons).combine_chunks()
