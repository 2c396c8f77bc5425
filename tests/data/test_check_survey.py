"""A look at all rows: each kind of finding, at its place, weighed as the recipe says, with nothing of a row in it."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from gemma_ft.data.check.rows import RowSource, Side
from gemma_ft.data.check.survey import Report, survey
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.encode_rows import Reading
from gemma_ft.data.read.sources import read_chunks

File = Callable[[str, str | bytes], str]
Check = Callable[..., Report]
TOKEN = "ghp_" + "aB3" * 10
LONG = " ".join(f"n{number}" for number in range(200))
OTHERS = [
    (f"Which city is number {n}, of {n * n} in all?", f"It is city {n}, as {n + 7} people say.") for n in range(9)
]


def lines(*pairs: tuple[Any, Any]) -> str:
    return "".join(json.dumps({"prompt": one, "completion": two}, ensure_ascii=False) + "\n" for one, two in pairs)


@pytest.fixture
def check(file: File, encoder: ChatEncoder) -> Check:
    """Looks at lines of train.jsonl and, where given, eval.jsonl."""

    def run(train: str, held_out: str | None = None, form: str = "prompt_completion", **options: Any) -> Report:
        sides: list[tuple[Side, str | None]] = [("train", train), ("eval", held_out)]
        sources = [
            RowSource(side, name, partial(read_chunks, name), Reading(form, {}, encoder), "named")
            for side, content in sides
            if content is not None
            for name in [file(f"{side}.jsonl", content)]
        ]
        return survey(sources, **{"max_seq_len": 4096, **options})

    return run


def found(report: Report) -> dict[str, list[str]]:
    """The places of each kind."""
    kinds = report.findings.all()
    assert all(one.count >= len(one.places) for one in kinds if one.kind.name != "repeated_answer")
    return {one.kind.name: [str(place) for place in one.places] for one in kinds}


def test_nothing_is_found_in_sound_rows(check: Check) -> None:
    report = check(lines(*OTHERS), lines(("What else is there to ask?", "Nothing, I should think.")))
    assert found(report) == {}
    assert report.findings.worst() is None
    facts = report.sources[0]
    assert (facts.side, facts.name, facts.rows, facts.bad_rows) == ("train", "train.jsonl", 9, 0)
    assert 0 < facts.trained_tokens < facts.tokens
    assert report.scripts == {"LATIN": 10}


def test_every_bad_row_is_told(check: Check) -> None:
    broken = '{"prompt": "x"\n' * 30 + lines((None, "x"), *OTHERS)
    report = check(broken)
    assert found(report) == {
        "bad_row": [f"train.jsonl:{n}: not valid JSON: Expecting ',' delimiter (column 15)" for n in range(1, 31)]
        + ["train.jsonl:31: 'prompt' is null, expected text"]
    }
    assert report.as_dict()["bad_rows"] == found(report)["bad_row"]
    assert (report.sources[0].rows, report.sources[0].bad_rows) == (9, 31)


def test_all_rows_may_be_bad(check: Check) -> None:
    report = check("{\n{\n")
    assert (report.findings["bad_row"].count, report.scripts) == (2, {})


def test_roles_out_of_order_are_bad_rows(check: Check) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    report = check(json.dumps({"messages": turns}) + "\n", form="messages")
    assert found(report) == {"bad_row": ["train.jsonl:1: has no assistant turn, nothing to train on"]}


def test_repeated_rows_and_rows_on_both_sides(check: Check) -> None:
    near = (OTHERS[2][0] + " And now " + LONG, OTHERS[2][1])
    train = lines(*OTHERS, OTHERS[0], OTHERS[0], near, (near[0].replace("n50", "fifty"), near[1]))
    held_out = lines(OTHERS[4], (near[0].replace("n90", "ninety"), near[1]), ("New?", "Yes."), ("New?", "Yes."))
    report = check(train, held_out)
    places = found(report)
    alike = [places.pop(kind)[0].split() for kind in ("near_overlap", "near_duplicate")]
    assert places == {
        "overlap": ["eval.jsonl:1: as train.jsonl:5"],
        "duplicate": ["train.jsonl:10: as train.jsonl:1", "train.jsonl:11: as train.jsonl:1",
                      "eval.jsonl:4: as eval.jsonl:3"],
    }  # fmt: skip
    assert [(one[0], one[2:]) for one in alike] == [
        ("eval.jsonl:2:", ["as", "train.jsonl:12"]),
        ("train.jsonl:13:", ["as", "train.jsonl:12"]),
    ]
    assert report.findings.worst() == "error"
    allowed = check(train, held_out, severities={"overlap": "note"})
    assert allowed.findings.worst() == "warning"


def test_a_row_of_several_items_repeats_another_when_all_of_them_do(check: Check) -> None:
    def row(*instances: str) -> str:
        pairs = [{"input": "", "output": one} for one in instances]
        return json.dumps({"instruction": "Say a word.", "instances": pairs}) + "\n"

    report = check(row("a", "b") + row("b", "c") + row("c", "a"), form="alpaca")
    assert found(report) == {"duplicate": ["train.jsonl:3: as train.jsonl:2"]}


def test_damage_and_secrets_are_told_by_place_and_kind_alone(check: Check) -> None:
    rows = [("Ã©tÃ©", "a"), ("b \ufffd", "b"), ("c", "\x07c"), ("d", "d \ue000"), ("e", f"e {TOKEN} {TOKEN}"),
            ("f", "-----BEGIN PRIVATE KEY-----" + "A" * 64), ("g", "g@mail.company.org"), ("h", "")]  # fmt: skip
    report = check(lines(*rows))
    kinds = ("mojibake", "replacement_character", "control_character", "private_use", "access_token", "private_key",
             "email", "empty")  # fmt: skip
    expected = {kind: [f"train.jsonl:{number}"] for number, kind in enumerate(kinds, start=1)}
    assert found(report) == expected
    assert "aB3" not in json.dumps(report.as_dict())


def test_answers_that_many_questions_have(check: Check) -> None:
    refusal, label = "I am sorry, I cannot help with that.", "positive"
    rows = [(f"Question {n} of many?", refusal) for n in range(6)] + [(f"Review {n}?", label) for n in range(50)]
    report = check(lines(*rows, *OTHERS))
    assert found(report) == {"repeated_answer": ["train.jsonl:1: and 5 more"]}
    assert report.findings["repeated_answer"].count == 6
    assert found(check(lines(*rows[:4], *OTHERS))) == {}


def test_a_row_that_gives_two_common_answers_is_one_row(check: Check) -> None:
    said = ["Hello, how can I help you?", "You are very welcome, come again."]
    turns = [("user", "q{}"), ("assistant", said[0]), ("user", "Thanks!"), ("assistant", said[1])]
    chats = [{"messages": [{"role": role, "content": text.format(n)} for role, text in turns]} for n in range(7)]
    report = check("".join(json.dumps(chat) + "\n" for chat in chats), form="messages")
    assert report.findings["repeated_answer"].count == 7
    assert len(report.findings["repeated_answer"].places) == 2


@pytest.mark.parametrize(
    ("too_long", "kinds"),
    [
        ("auto", {"too_long": "train.jsonl:1", "answer_past": "train.jsonl:2"}),
        ("truncate_left", {"too_long": "train.jsonl:1"}),
        ("split", {}),
    ],
)
def test_rows_that_do_not_fit(too_long: str, kinds: dict[str, str], check: Check) -> None:
    report = check(
        lines(("Count.", LONG), (LONG.replace("n", "m"), "Thank you."), *OTHERS), max_seq_len=256, too_long=too_long
    )
    places = {kind: where for kind, (where, *_) in found(report).items() if kind != "extreme_share"}
    assert {kind: where.partition(": ")[0] for kind, where in places.items()} == kinds
    assert all(where.endswith(" tokens") for where in places.values())
    assert report.findings["too_long"].count == (too_long == "auto") + 2 * (too_long == "truncate_left")


def test_a_long_document_is_split_and_no_fault(check: Check) -> None:
    assert found(check(json.dumps({"text": LONG}) + "\n", form="text", max_seq_len=64)) == {}
    cut = check(json.dumps({"text": LONG}) + "\n", form="text", max_seq_len=64, too_long="truncate_right")
    assert list(found(cut)) == ["too_long"]


def test_hardly_anything_trained(check: Check) -> None:
    report = check(lines(*OTHERS, (LONG * 2, "No.")))
    (place,) = found(report)["extreme_share"]
    assert place.startswith("train.jsonl:10: 0.")


def test_another_script_is_told_where_one_prevails(check: Check) -> None:
    other = ("Как пройти в библиотеку?", "Прямо и потом налево.")
    assert found(check(lines(*OTHERS, other))) == {"other_script": ["train.jsonl:10: CYRILLIC in a LATIN data set"]}
    mixed = check(lines(*OTHERS[:2], other))
    assert (found(mixed), mixed.scripts) == ({}, {"LATIN": 2, "CYRILLIC": 1})


def test_few_bad_rows_are_no_error_where_they_are_left_out(check: Check) -> None:
    broken = lines(*OTHERS) + "{\n"
    assert check(broken).findings.worst() == "error"
    assert check(broken, skip_bad_rows=True).findings.worst() == "warning"
    assert check(broken + "{\n", skip_bad_rows=True).findings.worst() == "error"


def test_only_so_many_places_are_kept(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma_ft.data.check.findings.PLACES_KEPT", 3)
    report = check(lines(*[OTHERS[0]] * 6) + "{\n" * 5)
    (bad, repeated) = report.as_dict()["findings"]
    assert (repeated["count"], len(repeated["places"])) == (5, 3)
    assert (bad["count"], len(bad["places"]), len(report.as_dict()["bad_rows"])) == (5, 3, 5)


def test_progress_counts_rows(check: Check) -> None:
    heard: list[int] = []
    check(lines(*OTHERS), progress=heard.append)
    assert sum(heard) == 9


@pytest.mark.parametrize(
    ("name", "form", "kinds"),
    [
        ("seed_tasks.jsonl", "alpaca", {"email": 2, "extreme_share": 9}),
        ("sharegpt_sample.json", "sharegpt", {"repeated_answer": 500, "near_duplicate": 152}),
        ("tinyshakespeare.txt", "text", {}),
    ],
)
def test_real_data_gives_no_false_alarms(
    name: str, form: str, kinds: dict[str, int], real_data: Callable[[str], str], encoder: ChatEncoder
) -> None:
    path = real_data(name)
    source = RowSource("train", name, partial(read_chunks, path), Reading(form, {}, encoder), "named")
    report = survey([source], max_seq_len=4096)
    assert {one.kind.name: one.count for one in report.findings.all()} == kinds
