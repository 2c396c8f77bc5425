"""A file of rows in, a file of answers out: in order, continued where it was stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gemma_ft.adapters.kinds import ADAPTER_CONFIG
from gemma_ft.build.place import Place
from gemma_ft.data.read.bad_rows import BadRows
from gemma_ft.data.read.sources import Row, read_rows
from gemma_ft.errors import DataError, InterruptedWork, UserError
from gemma_ft.families.chat_template import TURNS, ChatTemplate
from gemma_ft.infer.answer_file import AnswerFile, settings_path
from gemma_ft.infer.answers import texts_in_order
from gemma_ft.infer.engine import Request
from gemma_ft.infer.prompts import Prompt, prompts_of
from gemma_ft.infer.sampling import Sampling
from gemma_ft.infer.session import Session
from gemma_ft.system.observer import SILENT, Observer

ADDED = ("output", "finish", "index")


@dataclass(frozen=True)
class BatchOptions:
    """How every row is answered. With a seed, row n is drawn with a seed of its own that follows from both."""

    max_new_tokens: int
    sampling: Sampling
    stop: Sequence[str] = ()
    system: str | None = None
    raw: bool = False
    format: str = "auto"
    columns: Mapping[str, str] | None = None


class BatchFile:
    """The work of answering the rows of one file, and how much of it is done.

    Each line of the output is the row's fields, and `output`, `finish` ("stop", or "length" where max_new_tokens cut
    the answer) and `index` (the row's number from 0); where the rows have such a field, ours ends in an underscore.
    """

    def __init__(
        self,
        source: str,
        output: Path,
        batch_options: BatchOptions,
        model: Mapping[str, Any],
        chat: ChatTemplate = TURNS,
    ) -> None:
        """Reads and checks rows; `model` is what tells this model from others (`identity_of`), `chat` its family's.

        Raises: DataError naming bad rows; UserError when source is the output or its settings.
        """
        for path in (output, settings_path(output)):
            if path.exists() and Path(source).exists() and path.samefile(source):
                raise UserError(f"{path}: is the file that is read; name another --output")
        rows = read_rows(source)
        self.batch_options = batch_options
        self.prompts = prompts_of(
            rows,
            format=batch_options.format,
            columns=batch_options.columns,
            system=batch_options.system,
            raw=batch_options.raw,
            chat=chat,
        )
        self.names = _names_beside(rows)
        settings = {"rows": digest([row.fields for row in rows]), **model, **_settings(batch_options)}
        self.file = AnswerFile(output, settings, total=len(rows), index=self.names["index"])

    @property
    def notes(self) -> list[str]:
        """What a user should know of the output before it is written."""
        taken = [name for name in ADDED if self.names[name] != name]
        return [f"the rows have a field {name!r}; ours is {self.names[name]!r}" for name in taken]

    def run(self, session: Session, *, overwrite: bool = False, observer: Observer = SILENT) -> int:
        """Answer what is left, line by line; returns how many answers are now in the file.

        Raises: DataError naming rows that are too long; InterruptedWork after Ctrl-C; DiskError, LockedError, UserError
        as AnswerFile.
        """
        requests = self._requests(session)
        try:
            with contextlib.ExitStack() as stack:
                file = stack.enter_context(self.file.begin(overwrite=overwrite))
                job = stack.enter_context(observer.job("answers", file.total, done=file.done))
                texts = texts_in_order(session, requests[file.done :], stop=self.batch_options.stop)
                stack.enter_context(contextlib.closing(texts))
                for prompt, text in zip(self.prompts[file.done :], texts, strict=True):
                    added = (text.text, text.finish, file.done)
                    file.append(prompt.row.fields | dict(zip(self.names.values(), added, strict=True)))
                    job.advance(tokens=text.tokens)
        except KeyboardInterrupt:
            raise InterruptedWork(
                f"{self.file.path}: stopped with {self.file.done} of {self.file.total} answers; the same command "
                f"goes on from there{', without --overwrite' if overwrite else ''}"
            ) from None
        return self.file.done

    def _requests(self, session: Session) -> list[Request]:
        """What the engine is asked for each row, in order."""
        bad = BadRows()
        requests = []
        room = session.engine.max_seq_len - self.batch_options.max_new_tokens
        for number, prompt in enumerate(self.prompts):
            ids = _ids(session, prompt, bad)
            if len(ids) > room:
                bad.add(
                    prompt.row.where,
                    f"{len(ids):,} tokens and {self.batch_options.max_new_tokens:,} new ones (--max-tokens) are more "
                    f"than the {session.engine.max_seq_len:,} of this model",
                )
            sampling = replace(self.batch_options.sampling, seed=_row_seed(self.batch_options.sampling.seed, number))
            requests.append(Request(ids, self.batch_options.max_new_tokens, sampling))
        bad.raise_if_any()
        return requests


def identity_of(place: Place) -> dict[str, str]:
    """What tells a model from others, wherever it lies: a digest of its weights, its config and its adapter."""
    base, adapter = place.of_base, place.of_adapter
    parts = [base.sha256, (base.folder / "config.json").read_text(encoding="utf-8")]  # as it stands there
    if adapter is not None:
        parts.append(adapter.weights.fingerprint())
        parts.append((adapter.folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return {"model": digest(parts)}


def loading_of(place: Place, *, dtype: str | None, quantize: str) -> dict[str, str]:
    """What --dtype and --quantize come to for this model, as `open_session` takes them: left out or spelled out, the
    same work is the same.
    """
    if quantize == "auto":
        quantize = place.trained_over or "none"
    return {"dtype": dtype or place.trained_in, "quantize": quantize}


def _ids(session: Session, prompt: Prompt, bad: BadRows) -> list[int]:
    """A prompt's token ids; what cannot be asked of this model is noted under the row's place."""
    try:
        return session.completion_ids(prompt.text) if prompt.text is not None else session.chat_ids(prompt.turns)
    except DataError as fault:
        bad.add(prompt.row.where, str(fault).removeprefix("prompt: "))
        return []


def _names_beside(rows: Sequence[Row]) -> dict[str, str]:
    """The names of our fields, none of which any row has."""
    taken = {name for row in rows for name in row.fields}
    names = {}
    for name in ADDED:
        names[name] = name
        while names[name] in taken:
            names[name] += "_"
    return names


def _settings(batch_options: BatchOptions) -> dict[str, Any]:
    """How the answers are made, by the names of the options; how many at once is left out, for it changes nothing."""
    return {
        "max_tokens": batch_options.max_new_tokens,
        **asdict(batch_options.sampling),
        "stop": list(batch_options.stop),
        "system": batch_options.system,
        "raw": batch_options.raw,
        "format": batch_options.format,
        "column": dict(batch_options.columns or {}),
    }


def _row_seed(seed: int | None, number: int) -> int | None:
    """A seed for row `number`, so that its draws do not depend on what was answered before it."""
    if seed is None:
        return None
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # below 2**63


def digest(value: Any) -> str:
    """SHA-256 (hex) of a value, as JSON."""
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()
