"""A data set looked through once, a chunk at a time. Hashes, signatures and places are kept of its rows, no text."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy

from gemma_ft.data.check.anomalies import damage, script
from gemma_ft.data.check.findings import Findings, Severity
from gemma_ft.data.check.near_duplicates import NearPair, NearTexts
from gemma_ft.data.check.preferences import PreferenceFacts, PreferenceLook
from gemma_ft.data.check.rows import CheckedRow, CountedBadRows, Places, RowSource, repeats, rows_in
from gemma_ft.data.conversation import Conversation, Item, Pair
from gemma_ft.data.encode.documents import remarks_of, table_of, table_of_pairs, without_empty
from gemma_ft.data.pack.arrange import TooLong
from gemma_ft.data.read.chunks import Chunk
from gemma_ft.data.read.rendered import is_custom
from gemma_ft.errors import DataError
from gemma_ft.system.limits import IGNORE
from gemma_ft.system.redact import secret_kinds

SHORT_ANSWER = 5  # words: what is shorter may be a label, which many rows share
OFTEN, OFTEN_SHARE = 5, 0.002  # rows, and share of all, from which on an answer is told as repeated
EXTREME_SHARE = 0.02  # trained tokens among all: less, or so much short of all
ENCODED_AT_ONCE = 1024  # rows
ENDS_IN_GGUF = "</s>"  # llama.cpp takes a token of this text for an end of the answer (llama_vocab: special_eog_ids)
MAIN_SCRIPT = 0.8  # share of the rows from which on the others are told


@dataclass
class SourceFacts:
    """What became of one source."""

    side: str
    name: str
    format: str
    why: str
    rows: int = 0  # that are whole
    bad_rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    unread: dict[str, int] = field(default_factory=dict)  # rows by the path of a field that is not read


@dataclass(frozen=True)
class Report:
    """All that was found, and in what."""

    max_seq_len: int
    sources: Sequence[SourceFacts]
    scripts: Mapping[str, int]  # rows by script
    findings: Findings
    preferences: PreferenceFacts | None = None

    def as_dict(self) -> dict[str, Any]:
        """For a report file."""
        bad = [str(place) for place in self.findings["bad_row"].places]
        sources = [asdict(source) for source in self.sources]
        compared = {} if self.preferences is None else {"preferences": asdict(self.preferences)}
        return {"severity": self.findings.worst(), "max_seq_len": self.max_seq_len, "sources": sources, **compared,
                "scripts": dict(self.scripts), "findings": self.findings.as_list(), "bad_rows": bad}  # fmt: skip


def survey(
    sources: Sequence[RowSource],
    *,
    max_seq_len: int,
    too_long: TooLong = "auto",
    severities: Mapping[str, Severity] | None = None,
    skip_bad_rows: bool = False,
    progress: Callable[[int], None] = lambda rows: None,
) -> Report:
    """Everything that a look at all rows finds. `severities`: of kinds that weigh otherwise than in findings.KINDS.
    `skip_bad_rows`: as few of them as a run would leave out are no error. `progress` hears of each chunk how many rows
    it had.

    Raises: DataError when a source cannot be read to its end.
    """
    look = _Look(max_seq_len, too_long, Findings(severities), skip_bad_rows)
    for side in ("train", "eval"):
        for source in sources:
            if source.side == side:
                look.at(source, progress)
    return look.report()


class _Look:
    """What is known of the rows so far. Training rows come first: rows from `first_held_out` on are held out."""

    def __init__(self, max_seq_len: int, too_long: TooLong, findings: Findings, skip_bad_rows: bool) -> None:
        self.max_seq_len, self.too_long = max_seq_len, too_long
        self.findings, self.skip_bad_rows = findings, skip_bad_rows
        if skip_bad_rows:
            findings["bad_row"].severity = "warning"
        self.facts: list[SourceFacts] = []
        self.places, self.near = Places(), NearTexts()
        self.preferences = PreferenceLook(findings, self.places)
        self.first_held_out: int | None = None
        self.seen: dict[str, dict[bytes, int]] = {"train": {}, "eval": {}}
        self.answers: dict[bytes, int] = {}  # digest of a text -> its number
        self.given, self.given_by = array("q"), array("q")  # number of an answer, and of a row that gives it
        self.script_names: list[str | None] = [None]
        self.scripts = array("B")

    def at(self, source: RowSource, progress: Callable[[int], None]) -> None:
        facts = SourceFacts(source.side, source.name, source.reading.format, source.why)
        self.facts.append(facts)
        if source.side == "eval" and self.first_held_out is None:
            self.first_held_out = len(self.places)
        bad = CountedBadRows(lambda where, reason: self.findings.add("bad_row", where, reason))
        for chunk in source.chunks():
            rows = rows_in(chunk, source.reading, bad)
            self.places.begin(chunk)
            for row in rows:
                self._row(source, chunk, row)
                self._remarks(chunk.where(row.offset), row, facts)
            self._lengths(source, chunk, rows, facts)
            facts.rows += len(rows)
            progress(len(rows))
        facts.bad_rows = bad.count
        if self.skip_bad_rows:
            try:
                bad.raise_if_many(facts.rows + bad.count)
            except DataError:
                self.findings["bad_row"].severity = "error"

    def report(self) -> Report:
        self._repeated_answers()
        self._near()
        if not is_custom(self.findings["ends"].count, len(self.places)):  # prose may name a token at its end
            self.findings.drop("ends")
        names = [name for name in self.script_names if name is not None]
        counts = numpy.bincount(numpy.array(self.scripts, numpy.uint8), minlength=len(names) + 1)[1:].tolist()
        scripts = dict(sorted(zip(names, counts, strict=True), key=lambda pair: -pair[1]))
        self._other_scripts(scripts)
        return Report(self.max_seq_len, self.facts, scripts, self.findings, self.preferences.facts())

    def _row(self, source: RowSource, chunk: Chunk, row: CheckedRow) -> None:
        where = chunk.where(row.offset)
        number = self.places.add(row.offset)
        texts = row.texts()
        for kind in dict.fromkeys(kind for text in texts for kind in (*damage(text), *secret_kinds(text))):
            self.findings.add(kind, where)
        if len(without_empty(row.said)) < len(row.said):
            self.findings.add("empty", where)
        said = "\n".join(map(_without_system, row.said))
        self._script(said)
        if source.reading.rows != "answers":
            self._preference(source, row, number, where)
        elif self._is_new(source, row, number, where):
            self.near.add(number, said)
            if source.side == "train":
                self._answers(row, number)

    def _preference(self, source: RowSource, row: CheckedRow, number: int, where: str) -> None:
        """As `_row` ends, of pairs and labelled answers: what two rows may have in common is their prompt."""
        self.preferences.count(source, row)
        digests, seen = row.digests(source.reading.encoder), self.seen[source.side]
        first = repeats(digests, seen)
        for digest in digests:
            seen.setdefault(digest, number)
        if first is not None:
            self.findings.add("duplicate", where, twin=self.places.where(first))
        elif self.preferences.row(source, row, number, where):
            self.near.add(number, "\n".join(map(_prompt, row.items)))
        if first is None and source.side == "train":
            self._answers(row, number)

    def _remarks(self, where: str, row: CheckedRow, facts: SourceFacts) -> None:
        """Unread fields and templates that are spelled out, once for a row, whatever number of items it has."""
        made: dict[str, list[str]] = {}
        for kind, what in dict.fromkeys(remark for item in row.said for remark in remarks_of(item)):
            made.setdefault(kind, []).append(what)
        for kind, whats in made.items():
            self.findings.add(kind, where, ", ".join(whats))
        for path in made.get("unread", ()):
            facts.unread[path] = facts.unread.get(path, 0) + 1
        if any(ENDS_IN_GGUF in text for text in row.texts()):
            self.findings.add("strike_through", where)

    def _is_new(self, source: RowSource, row: CheckedRow, number: int, where: str) -> bool:
        """Whether the row says something that no earlier row did; told where it does not."""
        digests, seen = row.digests(source.reading.encoder), self.seen[source.side]
        first = repeats(digests, seen)
        trained = [self.seen["train"][digest] for digest in digests if digest in self.seen["train"]]
        if first is not None:
            self.findings.add("duplicate", where, twin=self.places.where(first))
        if source.side == "eval" and trained:
            self.findings.add("overlap", where, twin=self.places.where(trained[0]))
        for digest in digests:
            seen.setdefault(digest, number)
        return first is None and not (source.side == "eval" and trained)

    def _script(self, said: str) -> None:
        name = script(said)
        if name not in self.script_names:
            self.script_names.append(name)
        self.scripts.append(self.script_names.index(name))

    def _answers(self, row: CheckedRow, number: int) -> None:
        items = [item.halves[0] if isinstance(item, Pair) else item for item in row.items]  # a worse one is no matter
        chats = [item for item in items if isinstance(item, Conversation) and item.label is not False]
        turns = [turn for chat in chats for turn in chat.turns]
        answers = {turn.content.strip() for turn in turns if turn.role == "assistant"}
        for answer in answers:
            if len(answer.split()) >= SHORT_ANSWER:
                digest = hashlib.blake2b(answer.encode(), digest_size=16).digest()
                self.given.append(self.answers.setdefault(digest, len(self.answers)))
                self.given_by.append(number)

    def _lengths(self, source: RowSource, chunk: Chunk, rows: Sequence[CheckedRow], facts: SourceFacts) -> None:
        """Counts tokens; tells of rows that are too long, and of those with an extreme share of trained tokens."""
        found: dict[tuple[str, int], str] = {}  # once for a row, whatever number of items it has
        for start in range(0, len(rows), ENCODED_AT_ONCE):  # all of a chunk would take more than a GB
            items = [(row.offset, item) for row in rows[start : start + ENCODED_AT_ONCE] for item in row.items]
            self._measure(_table(items, source), found, facts)
        for (kind, offset), detail in found.items():
            self.findings.add(kind, chunk.where(offset), detail)

    def _measure(self, table: Any, found: dict[tuple[str, int], str], facts: SourceFacts) -> None:
        """As `_lengths`, of rows that are encoded; adds the details by kind and offset to `found`."""
        tokens, trained, chat, offsets = (
            table.column(name).chunk(0).to_numpy() for name in ("tokens", "trained", "chat", "offset")
        )
        facts.tokens += int(tokens.sum())
        facts.trained_tokens += int(trained.sum())
        limit = self.max_seq_len
        if "side" in table.column_names:
            self._compared(table, found, facts)
            return
        split = self.too_long == "split" or (self.too_long == "auto" and chat == 0)  # nothing of them is lost
        for item in numpy.flatnonzero((tokens > limit) & ~numpy.asarray(split)).tolist():
            labels = table.column("labels")[item].values.to_numpy()[:limit]
            cut_right = self.too_long in ("auto", "truncate_right")
            kind = "answer_past" if cut_right and not (labels != IGNORE).any() else "too_long"
            found.setdefault((kind, int(offsets[item])), f"{tokens[item]:,} tokens")
        share = trained / tokens
        for item in numpy.flatnonzero((chat > 0) & (abs(share - 0.5) > 0.5 - EXTREME_SHARE)).tolist():
            found.setdefault(("extreme_share", int(offsets[item])), f"{share[item]:.1%} of {tokens[item]:,} tokens")

    def _compared(self, table: Any, found: dict[tuple[str, int], str], facts: SourceFacts) -> None:
        """As `_measure`, of preferences: an answer that is too long takes its row with it."""
        tokens, trained, sides, offsets = (
            table.column(name).chunk(0).to_numpy() for name in ("tokens", "trained", "side", "offset")
        )
        if facts.side == "train":
            self.preferences.measured(sides, trained)
        for item in numpy.flatnonzero(tokens > self.max_seq_len).tolist():
            which = "" if self.preferences.kind == "labelled" else ("rejected ", "chosen ")[int(sides[item])]
            found.setdefault(("too_long", int(offsets[item])), f"{which}{tokens[item]:,} tokens")

    def _repeated_answers(self) -> None:
        """The answer that most rows give comes first; a row that gives several of them is one row."""
        rows = sum(facts.rows for facts in self.facts if facts.side == "train")
        answers, givers = (numpy.array(held, numpy.int64) for held in (self.given, self.given_by))
        counts = numpy.bincount(answers)
        often = numpy.flatnonzero(counts >= max(OFTEN, OFTEN_SHARE * rows))
        for answer in often[numpy.argsort(-counts[often], kind="stable")].tolist():
            first = int(givers[numpy.argmax(answers == answer)])
            self.findings.add("repeated_answer", self.places.where(first), f"and {counts[answer] - 1:,} more")
        self.findings["repeated_answer"].count = len(numpy.unique(givers[numpy.isin(answers, often)]))

    def _near(self) -> None:
        held_out = len(self.places) if self.first_held_out is None else self.first_held_out
        best: dict[tuple[int, str], NearPair] = {}
        for pair in self.near.pairs():
            kind = "near_overlap" if pair.earlier < held_out <= pair.later else "near_duplicate"
            known = best.get((pair.later, kind))
            if known is None or pair.alike > known.alike:
                best[pair.later, kind] = pair
        for (later, kind), pair in sorted(best.items()):
            where, twin = self.places.where(later), self.places.where(pair.earlier)
            self.findings.add(kind, where, f"{pair.alike:.0%}", twin=twin)

    def _other_scripts(self, scripts: Mapping[str, int]) -> None:
        main = next(iter(scripts), None)
        if main is None or scripts[main] < MAIN_SCRIPT * sum(scripts.values()):
            return
        for row, number in enumerate(self.scripts):
            name = self.script_names[number]
            if name not in (None, main):
                self.findings.add("other_script", self.places.where(row), f"{name} in a {main} data set")


def _table(found: Sequence[tuple[int, Any]], source: RowSource) -> Any:
    """The documents of items, each with the offset of its row."""
    items, offsets = [item for _, item in found], [offset for offset, _ in found]
    make: Any = table_of_pairs if source.reading.rows == "pairs" else table_of
    return make(items, offsets, source.reading.encoder)


def _prompt(item: Any) -> str:
    """What a preference asks, without its system turn."""
    turns = item.prompt if isinstance(item, Pair) else item.turns[:-1]
    return "\n".join(turn.content for turn in turns if turn.role != "system")


def _without_system(item: Item) -> str:
    """What a row says by itself; many rows have the same system turn."""
    if isinstance(item, Conversation):
        return "\n".join(turn.content for turn in item.turns if turn.role != "system")
    return item.text
