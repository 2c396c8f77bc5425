"""A file of rows in, a file of their rewards out: in order, continued where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_ft.data.conversation import Conversation, Pair
from gemma_ft.data.read.bad_rows import BadRows
from gemma_ft.data.read.detect import check_format, detect_format
from gemma_ft.data.read.parse_rows import parse_row
from gemma_ft.data.read.row_format import formats
from gemma_ft.data.read.sources import Row, read_rows
from gemma_ft.errors import DataError, InterruptedWork, UserError
from gemma_ft.families.chat_template import TURNS, ChatTemplate
from gemma_ft.infer.answer_file import AnswerFile, settings_path
from gemma_ft.infer.batch_file import digest
from gemma_ft.infer.scorer import Scorer, scored_ids
from gemma_ft.system.observer import SILENT, Observer

ONE, BOTH = ("reward",), ("reward_chosen", "reward_rejected")
INDEX = "index"


@dataclass(frozen=True)
class Scored:
    """What is scored of one row: a conversation, or the chosen and the rejected one of a pair."""

    row: Row
    halves: tuple[Conversation, ...]


class ScoreFile:
    """The work of scoring the rows of one file, and how much of it is done.

    Each line of the output is the row's fields, and `reward`, or of a pair `reward_chosen` and `reward_rejected`, and
    `index` (the row's number from 0); where the rows have such a field, ours ends in an underscore.
    """

    def __init__(
        self,
        source: str,
        output: Path,
        model: Mapping[str, Any],
        *,
        format: str = "auto",
        columns: Mapping[str, str] | None = None,
        chat: ChatTemplate = TURNS,
    ) -> None:
        """Reads and checks rows; `model` is what tells this model from others (batch_file.identity_of), `chat` its
        family's.

        Raises: DataError naming bad rows; UserError when source is the output or its settings.
        """
        for path in (output, settings_path(output)):
            if path.exists() and Path(source).exists() and path.samefile(source):
                raise UserError(f"{path}: is the file that is read; name another --output")
        rows = read_rows(source)
        columns = dict(columns or {})
        self.format = format if format != "auto" else _format_of(rows, columns)
        check_format(self.format, columns)
        self.pairs = formats()[self.format].pairs is not None
        self.scored = _scored(rows, self.format, columns, self.pairs, chat)
        taken = {name for row in rows for name in row.fields}
        self.names = {name: _free(name, taken) for name in (*(BOTH if self.pairs else ONE), INDEX)}
        how = {"format": format, "column": columns}
        settings = {"rows": digest([row.fields for row in rows]), **model, **how}
        self.file = AnswerFile(output, settings, total=len(rows), index=self.names[INDEX])

    @property
    def notes(self) -> list[str]:
        """What a user should know of the output before it is written."""
        taken = [name for name, ours in self.names.items() if ours != name]
        return [f"the rows have a field {name!r}; ours is {self.names[name]!r}" for name in taken]

    def run(
        self, scorer: Scorer, *, batch_size: int, overwrite: bool = False, observer: Observer = SILENT
    ) -> list[tuple[float, ...]]:
        """Score what is left, line by line; returns the rewards of all rows.

        Rows are read together as they are from the first row on, so that work that goes on gives the same file.

        Raises: DataError naming rows that are too long; InterruptedWork after Ctrl-C; DiskError, LockedError, UserError
        as AnswerFile.
        """
        sequences = self._sequences(scorer)
        size = max(1, batch_size // (len(BOTH) if self.pairs else 1))  # rows
        try:
            with self.file.begin(overwrite=overwrite) as file, observer.job("rows", file.total, done=file.done) as job:
                for start in range(file.done - file.done % size, file.total, size):
                    asked = sequences[start : start + size]
                    flat = scorer.rewards([one for row in asked for one in row], batch_size=batch_size)
                    given = iter(flat)
                    for number, row in enumerate(asked, start=start):
                        rewards = [next(given) for _ in row]
                        if number >= file.done:
                            added = dict(zip(self.names.values(), [*rewards, number], strict=True))
                            file.append(self.scored[number].row.fields | added)
                            job.advance()
        except KeyboardInterrupt:
            raise InterruptedWork(
                f"{self.file.path}: stopped with {self.file.done} of {self.file.total} rows; the same command goes on "
                f"from there{', without --overwrite' if overwrite else ''}"
            ) from None
        return self.rewards()

    def rewards(self) -> list[tuple[float, ...]]:
        """Those in the file, of each row."""
        names = list(self.names.values())[:-1]
        with self.file.path.open(encoding="utf-8") as file:
            return [tuple(json.loads(line)[name] for name in names) for line in file]

    def _sequences(self, scorer: Scorer) -> list[list[list[int]]]:
        """The token ids of each row's conversations. Raises: DataError for those that cannot be scored."""
        bad, found = BadRows(), []
        for one in self.scored:
            try:
                sequences = scored_ids(scorer.encoder, one.halves)
            except DataError as fault:
                bad.add(one.row.where, str(fault).removeprefix(f"{one.row.where}: "))
                continue
            longest = max(map(len, sequences))
            if longest > scorer.max_seq_len:
                bad.add(one.row.where, f"{longest:,} tokens are more than the {scorer.max_seq_len:,} of this model")
            found.append(sequences)
        bad.raise_if_any()
        return found


def _scored(rows: list[Row], format: str, columns: Mapping[str, str], pairs: bool, chat: ChatTemplate) -> list[Scored]:
    """What is scored of each row. Raises: DataError listing bad rows as `file:line: reason`."""
    bad, found = BadRows(), []
    for row in rows:
        faults = len(bad.rows)
        items = parse_row(row, format, columns, bad, trained=False, chat=chat, rows="pairs" if pairs else "answers")
        if len(bad.rows) > faults:
            continue
        if len(items) != 1:
            what = "pairs" if pairs else "conversations"
            bad.add(row.where, f"holds {len(items)} {what}; give each a row of its own")
            continue
        (item,) = items
        if isinstance(item, Pair):
            found.append(Scored(row, item.halves))
        elif not isinstance(item, Conversation):
            bad.add(row.where, "is plain text, which has no answer; give rows of messages, or of prompt and completion")
        elif item.left_out:
            bad.add(
                row.where, "has an answer before its first question, or a question after its last answer; take it out"
            )
        else:
            found.append(Scored(row, (item,)))
    bad.raise_if_any()
    return found


def _format_of(rows: list[Row], columns: Mapping[str, str]) -> str:
    """That of pairs, in whichever layout, where the rows have them, else of answers. Raises: DataError."""
    try:
        return detect_format(rows, columns, "pairs")[0]
    except DataError:
        return detect_format(rows, columns)[0]


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name
