"""What a look at a data set found: kinds with a severity and an advice, places, counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
PLACES_KEPT = 1000  # of one kind, but for bad rows, of which all are kept


class Kind(NamedTuple):
    """One kind of finding; what is counted is rows."""

    name: str
    severity: Severity
    title: str
    advice: str


FIX = "gemma-ft data fix leaves them out"
KINDS = (
    Kind("bad_row", "error", "bad rows", f"mend them; {FIX}"),
    Kind("overlap", "error", "held-out rows that are training rows too", f"{FIX} of the training rows"),
    Kind("prompt_overlap", "error", "held-out rows with the prompt of a training row", f"{FIX} of the training rows"),
    Kind(
        "one_label",
        "error",
        "labels that are all the same",
        "add rows with the other one, or set objective.kind: sft for good answers alone",
    ),
    Kind("near_overlap", "warning", "held-out rows nearly the same as a training row", "scores on them are flattered"),
    Kind("duplicate", "warning", "rows that repeat another exactly", FIX),
    Kind("empty", "warning", "rows with an empty question, answer or text", "they are not trained on"),
    Kind("unread", "warning", "rows with fields that are not read", "map them with data.columns, or take them out"),
    Kind("rendered", "warning", "rows that spell a chat template as text", "give them as messages: [{role, content}]"),
    Kind("ends", "warning", "rows that end in a token's name", "take it off; an end is trained without it"),
    Kind("repeated_answer", "warning", "rows with an answer that many others have", "a model learns to say it always"),
    Kind("contradiction", "warning", "rows whose answers another row judges the other way", "take one of them out"),
    Kind("too_long", "warning", "rows longer than data.max_seq_len", "raise it, or shorten them"),
    Kind("answer_past", "warning", "rows whose answer begins past data.max_seq_len", "raise it; they are not trained"),
    Kind("replacement_character", "warning", "rows with U+FFFD, the sign for a character that was lost", FIX),
    Kind(
        "mojibake", "warning", "rows with UTF-8 that was read as Latin-1 (Ã© for é)", "mend them where they come from"
    ),
    Kind("control_character", "warning", "rows with control characters", "take them out where they come from"),
    Kind("private_use", "warning", "rows with private-use characters", "they mean nothing without their font"),
    Kind("access_token", "warning", "rows with what looks like an access token", "take it out, and revoke it"),
    Kind("private_key", "warning", "rows with what looks like a private key", "take it out, and replace the key"),
    Kind("email", "note", "rows with an e-mail address", "a model can learn it by heart"),
    Kind("strike_through", "note", "rows with </s>", "in a GGUF llama.cpp ends an answer at it; take it out"),
    Kind("near_duplicate", "note", "rows nearly the same as an earlier one", "are all of them needed?"),
    Kind("equal_prompt", "note", "rows with the prompt of an earlier one", "they stay on one side of a split"),
    Kind("near_halves", "note", "rows whose better answer is nearly the worse one", "little is learned from them"),
    Kind("other_script", "note", "rows in another script than most", "are they meant?"),
    Kind("extreme_share", "note", "rows of which hardly any, or nearly every, token is trained", "are they meant?"),
)


class FindingPlace(NamedTuple):
    """Where a row stands, and what is to be said of it there; never what the row says."""

    where: str
    detail: str = ""
    twin: str = ""  # where the row stands that it is like

    def __str__(self) -> str:
        said = " ".join(part for part in (self.detail, self.twin and f"as {self.twin}") if part)
        return f"{self.where}: {said}" if said else self.where


@dataclass
class Finding:
    """All rows of one kind."""

    kind: Kind
    severity: Severity
    count: int = 0
    places: list[FindingPlace] = field(default_factory=list)


class Findings:
    """Collects places by kind. `severities`: of kinds that weigh otherwise than in KINDS."""

    def __init__(self, severities: Mapping[str, Severity] | None = None) -> None:
        weighed = severities or {}
        self._found = {kind.name: Finding(kind, weighed.get(kind.name, kind.severity)) for kind in KINDS}

    def add(self, name: str, where: str, detail: str = "", *, twin: str = "") -> None:
        """One more row of a kind."""
        finding = self._found[name]
        finding.count += 1
        if name == "bad_row" or len(finding.places) < PLACES_KEPT:
            finding.places.append(FindingPlace(where, detail, twin))

    def drop(self, name: str) -> None:
        """Forget a kind."""
        self._found[name].count = 0
        self._found[name].places.clear()

    def __getitem__(self, name: str) -> Finding:
        return self._found[name]

    def all(self) -> list[Finding]:
        """The kinds that were found, the gravest first."""
        found = [one for one in self._found.values() if one.count]
        return sorted(found, key=lambda one: SEVERITIES.index(one.severity))

    def worst(self) -> Severity | None:
        """The gravest severity, None where nothing was found."""
        return next((one.severity for one in self.all()), None)

    def as_list(self) -> list[dict[str, Any]]:
        """For a report file; of kinds with very many rows the first PLACES_KEPT places."""
        return [
            {
                "kind": one.kind.name,
                "severity": one.severity,
                "what": one.kind.title,
                "count": one.count,
                "what_to_do": one.kind.advice,
                "places": [place._asdict() for place in one.places[:PLACES_KEPT]],
            }
            for one in self.all()
        ]
