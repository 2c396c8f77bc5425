"""A look at pairs and labelled answers: their lengths, prompts that come back or are held out too, verdicts that
contradict each other; and copies without what was found.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gemma_ft.data.check.clean import copy_clean
from gemma_ft.data.check.preferences import PreferenceFacts
from gemma_ft.data.check.rows import RowSource, Side
from gemma_ft.data.check.survey import Report, survey
from gemma_ft.data.conversation import RowKind
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.encode_rows import Reading
from gemma_ft.data.read.sources import read_chunks

File = Callable[[str, str | bytes], str]
Sources = Callable[..., list[RowSource]]
NEAR = "The old bridge over the river was built by hand in a year that nobody here remembers any more"


def pair(prompt: str, chosen: str, rejected: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def judged(prompt: str, completion: str, label: bool) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label}


SOUND = [pair(f"Which is number {n}?", f"It is {n * n} here", f"No idea of {n}") for n in range(4)]


@pytest.fixture
def sources(file: File, encoder: ChatEncoder) -> Sources:
    def made(
        train: list[dict[str, Any]], held_out: list[dict[str, Any]] | None = None, kind: RowKind = "pairs"
    ) -> list[RowSource]:
        sides: list[tuple[Side, list[dict[str, Any]] | None]] = [("train", train), ("eval", held_out)]
        form = "preference" if "chosen" in train[0] else "prompt_completion"
        return [
            RowSource(side, name, partial(read_chunks, name), Reading(form, {}, encoder, kind), "named")
            for side, rows in sides
            if rows is not None
            for name in [file(f"{side}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))]
        ]

    return made


def looked(sources: list[RowSource], **options: Any) -> Report:
    return survey(sources, **{"max_seq_len": 4096, **options})


def found(report: Report) -> dict[str, list[str]]:
    return {one.kind.name: [str(place) for place in one.places] for one in report.findings.all()}


def test_nothing_is_found_in_sound_pairs(sources: Sources) -> None:
    report = looked(sources(SOUND, [pair("What else?", "Nothing", "All")]))
    assert found(report) == {}
    assert report.preferences is not None
    assert report.preferences.margins == 0
    assert (report.sources[0].rows, report.scripts) == (4, {"LATIN": 5})


def test_lengths_and_openings_are_those_of_the_answers_of_training_rows(sources: Sources, encoder: ChatEncoder) -> None:
    rows = [
        pair("A long question that is no part of an answer?", "a b c d", "a b c", margin=1),
        pair("q", "x", "a b c d e f"),
        pair("r", "The sky is blue", "The sky is green"),
    ]
    facts = looked(sources(rows, [pair("held out", "x " * 99, "y")])).preferences
    sizes = [[len(encoder.content.encode(row[half])) + 1 for row in rows] for half in ("chosen", "rejected")]
    good, bad = sizes
    assert facts == PreferenceFacts(
        kind="pairs", chosen=3, rejected=3,
        chosen_tokens=sorted(good)[1], rejected_tokens=sorted(bad)[1],
        chosen_characters=7, rejected_characters=11,
        longer=sum(one > two for one, two in zip(*sizes, strict=True)) / 3,
        shorter=sum(one < two for one, two in zip(*sizes, strict=True)) / 3,
        equal_openings=2 / 3, margins=1,
    )  # fmt: skip
    assert facts.describe() == [
        f"3 pairs; answers, medians: chosen {facts.chosen_tokens:.0f} tokens (7 characters), rejected "
        f"{facts.rejected_tokens:.0f} tokens (11 characters)",
        f"the chosen answer is the longer one in {facts.longer:.0%} of the pairs, the shorter one in "
        f"{facts.shorter:.0%}; 67% begin with the same words; 1 say by how much",
    ]


def test_prompts_that_come_back_or_are_held_out_too(sources: Sources) -> None:
    train = [*SOUND, pair(" Which is number 1?\n", "Another", "answer")]
    report = looked(sources(train, [pair("Which is number 2?", "Some", "thing"), pair("q", "a", "b")]))
    assert found(report) == {
        "prompt_overlap": ["eval.jsonl:1: as train.jsonl:3"],
        "equal_prompt": ["train.jsonl:5: as train.jsonl:2"],
    }
    assert report.findings.worst() == "error"
    allowed = looked(sources(train, [SOUND[2]]), severities={"prompt_overlap": "note"})
    assert allowed.findings.worst() == "note"


def test_prompts_that_are_nearly_the_same(sources: Sources) -> None:
    report = looked(sources([*SOUND, pair(NEAR, "a", "b")], [pair(f"{NEAR} now", "a", "b")]))
    (place,) = found(report).pop("near_overlap")
    assert place.startswith("eval.jsonl:1: ")
    assert place.endswith(" as train.jsonl:5")


def test_repeated_near_and_contradicting_pairs(sources: Sources) -> None:
    rows = [
        *SOUND, SOUND[0],
        pair("Which is number 1?", SOUND[1]["rejected"], SOUND[1]["chosen"]),
        pair("q", NEAR, f"{NEAR} now"),
        pair("r", "x", "y " * 3000),
    ]  # fmt: skip
    report = looked(sources(rows), max_seq_len=64)
    near = found(report).pop("near_halves")
    assert [place.rpartition(" ")[0] for place in near] == ["train.jsonl:7:"]
    others = {kind: places for kind, places in found(report).items() if kind not in ("near_halves", "too_long")}
    assert others == {
        "duplicate": ["train.jsonl:5: as train.jsonl:1"],
        "contradiction": ["train.jsonl:6: as train.jsonl:2"],
        "equal_prompt": ["train.jsonl:6: as train.jsonl:2"],
    }
    (long,) = found(report)["too_long"]
    assert long.startswith("train.jsonl:8: rejected ")


def test_several_negatives_are_one_row(sources: Sources) -> None:
    report = looked(sources([pair("q", "good", ["bad", "worse", "worst"])]))
    assert found(report) == {}
    assert report.preferences is not None
    assert (report.sources[0].rows, report.preferences.chosen) == (1, 3)


def test_labelled_answers(sources: Sources) -> None:
    rows = [
        judged("q", "one answer", True), judged("q", "other", False), judged("q", "one answer", False),
        judged("q", "other", False),
    ]  # fmt: skip
    report = looked(sources(rows, [judged("q", "third", True)], kind="labelled"))
    assert found(report) == {
        "prompt_overlap": ["eval.jsonl:1: as train.jsonl:1"],
        "duplicate": ["train.jsonl:4: as train.jsonl:2"],
        "contradiction": ["train.jsonl:3: as train.jsonl:1"],
        "equal_prompt": ["train.jsonl:2: as train.jsonl:1", "train.jsonl:3: as train.jsonl:1"],
    }
    facts = report.preferences
    assert facts is not None
    assert (facts.kind, facts.chosen, facts.rejected, facts.longer) == ("labelled", 1, 3, None)
    assert facts.describe() == [
        f"1 good, 3 bad; answers, medians: good {facts.chosen_tokens:.0f} tokens (10 characters), bad "
        f"{facts.rejected_tokens:.0f} tokens (5 characters)"
    ]


def test_the_report_of_answers_has_no_word_of_preferences(sources: Sources) -> None:
    rows = [{"prompt": "q", "completion": "a"}]
    assert "preferences" not in looked(sources(rows, kind="answers")).as_dict()
    written = looked(sources(SOUND)).as_dict()
    assert written["preferences"]["chosen"] == 4
    json.dumps(written)


def test_a_tie_and_an_equal_pair_are_bad_rows_of_the_check_and_of_the_copy(sources: Sources, tmp_path: Path) -> None:
    rows = [SOUND[0], pair("q", "a", "a"), pair("r", "a", "b", score_chosen=1, score_rejected=1), SOUND[1], SOUND[0]]
    made = sources(rows, [pair("Which is number 1?", "a", "b")])
    bad = [
        "train.jsonl:2: 'chosen' and 'rejected' are the same answer",
        "train.jsonl:3: 'score_chosen' and 'score_rejected' are both 1: a tie, and none of the answers is the better "
        "one; take the row out",
    ]
    assert found(looked(made))["bad_row"] == bad
    folder = tmp_path / "copies"
    folder.mkdir()
    copies = copy_clean(made, folder)
    assert [dict(copy.left_out) for copy in copies] == [
        {"held out as well": 1, "repeats another row": 1, "bad row": 2}, {},
    ]  # fmt: skip
    assert (folder / "train.jsonl").read_text().splitlines() == [json.dumps(SOUND[0])]
    told = [json.loads(line) for line in (folder / "changes.log").read_text().splitlines()]
    assert [f"{one['where']}: {one['why']}" for one in told] == [
        *bad,
        "train.jsonl:4: its prompt is held out for evaluation as well",
        "train.jsonl:5: repeats train.jsonl:1",
    ]


@pytest.mark.parametrize(("label", "called"), [(True, "good"), (False, "bad")])
def test_labels_that_are_all_the_same_are_an_error(sources: Sources, label: bool, called: str) -> None:
    """The objective learns from both, and refuses them."""
    rows = [judged(f"Which is number {n}?", f"It is {n * n} here", label) for n in range(4)]
    report = looked(sources(rows, kind="labelled"))
    (told,) = [one for one in report.as_dict()["findings"] if one["kind"] == "one_label"]
    assert (told["severity"], told["places"]) == (
        "error", [{"where": "train.jsonl:1", "detail": f"all 4 are called {called}", "twin": ""}]
    )  # fmt: skip
    mixed = [*rows, judged("And who?", "Nobody", not label)]
    found = looked(sources(mixed, kind="labelled")).as_dict()["findings"]
    assert "one_label" not in [one["kind"] for one in found]
