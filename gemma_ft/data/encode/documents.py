"""Encoded conversations and documents as Arrow tables, in memory or on disk: what sequences are cut and packed from."""

from __future__ import annotations

import functools
import json
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import pyarrow as pa

from gemma_ft.data.conversation import Conversation, Item, Pair, PlainText
from gemma_ft.data.encode.chat import ChatEncoder, Encoded
from gemma_ft.data.read.rendered import rendered_as, spelled_end
from gemma_ft.system.limits import IGNORE
from gemma_ft.system.row_kind import RowKind

COUNTS = ("tokens", "trained", "terminators", "left_out", "system", "chat")
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("offset", pa.int64()),  # of its row in the chunk
        ("content", pa.binary(32)),  # ChatEncoder.content_hash
        ("weight", pa.float64()),  # in the loss
        ("remarks", pa.int32()),  # number of its set of remarks, which stand in the schema's metadata
        *((name, pa.int32()) for name in COUNTS),
    ]
)

PREFERENCES = pa.schema(  # of documents that are preferred or not, in further columns
    [
        ("side", pa.int8()),  # 1: the chosen half of a pair, or an answer that is called good; 0: the other
        ("margin", pa.float64()),  # of a pair, 0 where the data has none
    ]
)

Remark = tuple[str, str]  # ("unread", path of a field), ("rendered", template) or ("ends", token): see DataStats
REMARK_SETS = 1000  # of one table; rows of more different fields than that are told as OTHERS
OTHERS: tuple[Remark, ...] = (("unread", "other fields"),)


def remarks_of(item: Item) -> tuple[Remark, ...]:
    """What is to be told of an item although it is trained: its unread fields, a template that it spells out."""
    made = [("unread", path) for path in item.unread]
    if (template := rendered_as(item)) is not None:
        made.append(("rendered", template))
    elif (end := spelled_end(item)) is not None:
        made.append(("ends", end))
    return tuple(made)


def without_empty(items: Sequence[Item]) -> list[int]:
    """Which items have something to say: no question, answer or document is empty."""
    return [
        number
        for number, item in enumerate(items)
        if (
            item.text.strip()
            if isinstance(item, PlainText)
            else all(turn.content.strip() for turn in item.turns if turn.role != "system")
        )
    ]


def table_of(
    items: Sequence[Item], offsets: Sequence[int], encoder: ChatEncoder, bad: Sequence[tuple[int, str]] = ()
) -> pa.Table:
    """Items in their order, encoded whole; empty ones are left out and counted in the schema's metadata, in which the
    (offset, reason) of each bad row stands as well, and what is remarked of the items.

    Nothing is trained of an item whose weight is 0. Of what is labelled the side is told as well.

    Raises: DataError for a system turn under the policy "error".
    """
    return _table(items, offsets, encoder, bad)


def table_of_pairs(
    pairs: Sequence[Pair], offsets: Sequence[int], encoder: ChatEncoder, bad: Sequence[tuple[int, str]] = ()
) -> pa.Table:
    """As `table_of`: two documents of each pair, the chosen half and the rejected one behind it, none of which is
    empty; their content is that of the prompt.
    """
    items = [half for pair in pairs for half in pair.halves]
    twice = [offset for offset in offsets for _ in range(2)]
    return _table(items, twice, encoder, bad, [pair for pair in pairs for _ in range(2)])


def _table(
    items: Sequence[Item],
    offsets: Sequence[int],
    encoder: ChatEncoder,
    bad: Sequence[tuple[int, str]],
    pairs: Sequence[Pair] = (),
) -> pa.Table:
    """pairs: of which pair each of the items is a half."""
    kept = list(range(len(items))) if pairs else without_empty(items)
    sides = [one.label for one in items if isinstance(one, Conversation) and one.label is not None]
    fields = [*SCHEMA, *(PREFERENCES if sides or pairs else ())]
    chats = {number: items[number] for number in kept if isinstance(items[number], Conversation)}
    texts = {number: items[number] for number in kept if number not in chats}
    encoded: dict[int, Encoded] = dict(
        zip(chats, encoder.encode_many(list(chats.values())), strict=True)  # type: ignore[arg-type]
    )
    encoded |= zip(texts, encoder.encode_documents(list(texts.values())), strict=True)  # type: ignore[arg-type]
    columns: dict[str, list[Any]] = {field.name: [] for field in fields}
    remarks: dict[tuple[Remark, ...], int] = {(): 0}
    for number in kept:
        one, chat, weight = encoded[number], chats.get(number), items[number].weight
        labels = one.labels if weight else [IGNORE] * len(one.labels)
        columns["input_ids"].append(one.input_ids)
        columns["labels"].append(labels)
        columns["weight"].append(weight)
        columns["offset"].append(offsets[number])
        made = remarks_of(items[number])
        made = made if made in remarks or len(remarks) < REMARK_SETS else OTHERS
        columns["remarks"].append(remarks.setdefault(made, len(remarks)))
        columns["content"].append(encoder.content_hash(pairs[number] if pairs else items[number]))
        columns["tokens"].append(len(one.input_ids))
        columns["trained"].append(len(labels) - labels.count(IGNORE))
        columns["terminators"].append(labels.count(encoder.control.end_of_turn))
        columns["left_out"].append(chat.left_out if isinstance(chat, Conversation) else 0)
        columns["system"].append(int(isinstance(chat, Conversation) and chat.turns[0].role == "system"))
        columns["chat"].append(int(chat is not None))
        if "side" in columns:
            columns["side"].append(
                1 - number % 2 if pairs else int(isinstance(chat, Conversation) and bool(chat.label))
            )
            columns["margin"].append((pairs[number].margin or 0.0) if pairs else 0.0)
    arrays = [pa.array(columns[field.name], field.type) for field in fields]
    told = {"items": len(items), "bad": bad, "remarks": list(remarks)}
    told |= {"rows": "pairs" if pairs else "labelled"} if "side" in columns else {}
    schema = pa.schema(fields).with_metadata({"told": json.dumps(told)})
    return pa.Table.from_arrays(arrays, schema=schema)


@dataclass(frozen=True)
class Part:
    """One table, and where the row at an offset stands in its source."""

    table: pa.Table
    where: Callable[[int], str]

    @property
    def items(self) -> int:
        """Items that were read for it, the empty ones among them."""
        return int(self._told["items"])

    @property
    def rows(self) -> RowKind:
        """What its rows are: of pairs each has two documents."""
        kind: RowKind = self._told.get("rows", "answers")
        return kind

    @property
    def bad(self) -> list[tuple[str, str]]:
        """(where, reason) of each row that is not in it."""
        return self.bad_until(sys.maxsize)

    def bad_until(self, last: int) -> list[tuple[str, str]]:
        """As `bad`, of rows up to an offset."""
        return [(self.where(offset), reason) for offset, reason in self._told["bad"] if offset <= last]

    def remarks(self, rows: Any) -> Counter[Remark]:
        """How many of some of its rows have each remark; a row counts as often as it is named."""
        found: Counter[Remark] = Counter()
        counts = numpy.bincount(self.table.column("remarks").to_numpy()[rows], minlength=1)
        for number in numpy.flatnonzero(counts).tolist():
            for kind, what in self._told["remarks"][number]:
                found[kind, what] += int(counts[number])
        return found

    def offset(self, row: int) -> int:
        """Of a row of it in the chunk."""
        return int(self.table.column("offset")[row].as_py())

    def sliced(self, start: int, stop: int) -> Part:
        """Some of its rows; the first ones bring the empty items with them, so that each is counted once."""
        empty = 0 if start else self.items - len(self.table)
        told = {**self._told, "items": stop - start + empty, "bad": []}
        table = self.table.slice(start, stop - start).replace_schema_metadata({"told": json.dumps(told)})
        return Part(table, self.where)

    @functools.cached_property
    def _told(self) -> Any:
        return json.loads(self.table.schema.metadata[b"told"])

    @functools.cached_property
    def ids(self) -> tuple[Any, Any]:
        """(values, offsets of each document in them) as numpy sees them, without a copy."""
        return _flat(self.table.column("input_ids"))

    @functools.cached_property
    def labels(self) -> tuple[Any, Any]:
        """As `ids`."""
        return _flat(self.table.column("labels"))


class Documents:
    """Encoded documents of several tables, as one sequence."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = [part for part in parts if len(part.table)]
        self.items = sum(part.items for part in parts)
        self._starts = [0, *numpy.cumsum([len(part.table) for part in self.parts]).tolist()]
        self.rows: RowKind = self.parts[0].rows if self.parts else "answers"
        assert all(part.rows == self.rows for part in self.parts), "rows are read for one objective"

    @classmethod
    def of(cls, items: Sequence[Item | Pair], encoder: ChatEncoder) -> Documents:
        """Items in memory. Raises: DataError as `table_of`."""
        pairs = [item for item in items if isinstance(item, Pair)]
        table = table_of_pairs(pairs, range(len(pairs)), encoder) if pairs else table_of(
            [item for item in items if not isinstance(item, Pair)], range(len(items)), encoder
        )  # fmt: skip
        return cls([Part(table, lambda number: items[number].where)])

    @classmethod
    def joined(cls, several: Sequence[Documents]) -> Documents:
        """The documents of several, one behind the other."""
        found = cls([part for one in several for part in one.parts])
        found.items = sum(one.items for one in several)
        return found

    def __len__(self) -> int:
        return int(self._starts[-1])

    def column(self, name: str) -> Any:
        """One of COUNTS for every document: int64 [documents]."""
        return self._joined(name, numpy.int64)

    def weights(self) -> Any:
        """Of every document, in the loss: float64 [documents]."""
        return self._joined("weight", numpy.float64)

    def preferences(self) -> tuple[Any, Any]:
        """The side of each document, int64 [documents], and the margin of its pair, float64 [documents]; where rows are
        pairs or labelled.
        """
        return self._joined("side", numpy.int64), self._joined("margin", numpy.float64)

    def contents(self) -> list[bytes]:
        """The content hash of each document; of pairs and labelled answers that of the prompt."""
        return [one for part in self.parts for one in part.table.column("content").to_pylist()]

    def remarks(self, chosen: Any) -> Counter[Remark]:
        """How many of some documents (their numbers, one as often as it is seen) have each remark."""
        found: Counter[Remark] = Counter()
        part_of = numpy.searchsorted(self._starts, chosen, side="right") - 1
        for number in numpy.unique(part_of).tolist():
            found += self.parts[number].remarks(chosen[part_of == number] - self._starts[number])
        return found

    def cut(self, document: int, start: int, end: int) -> tuple[Any, Any]:
        """Tokens `start` to `end` of a document, ids and labels: int32 arrays that may lie on disk."""
        part, row = self._place(document)
        (ids, starts), (labels, _) = part.ids, part.labels
        at, after = int(starts[row]), int(starts[row + 1])
        wanted = slice(at + start, min(at + end, after))
        return ids[wanted], labels[wanted]

    def where(self, document: int) -> str:
        """Where a document stands in its source."""
        part, row = self._place(document)
        return part.where(part.table.column("offset")[row].as_py())

    def place(self, document: int) -> tuple[int, int]:
        """(number of its part, number within it)."""
        part = bisect_right(self._starts, document) - 1
        return part, document - self._starts[part]

    def _joined(self, name: str, dtype: Any) -> Any:
        found = [part.table.column(name).to_numpy() for part in self.parts]
        return numpy.concatenate(found).astype(dtype) if found else numpy.zeros(0, dtype)

    def _place(self, document: int) -> tuple[Part, int]:
        part, row = self.place(document)
        return self.parts[part], row


def _flat(column: pa.ChunkedArray) -> tuple[Any, Any]:
    assert column.num_chunks == 1, "a table is written as one batch"
    array = column.chunk(0)
    return array.values.to_numpy(), array.offsets.to_numpy()
