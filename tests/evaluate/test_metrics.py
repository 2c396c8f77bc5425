"""Metrics of answers: each rule on its own pairs, and against lm-evaluation-harness, sacrebleu and rouge-score."""

import sys
from decimal import Decimal

import numpy as np
import pytest

from gemma_ft.errors import UserError
from gemma_ft.evaluate.held_out import Reply, is_exact
from gemma_ft.evaluate.metrics import (
    METRICS,
    NOT_JSON,
    chosen,
    fitting,
    json_equal,
    last_number,
    marked_number,
    numeric_flexible,
    numeric_match,
    parsed,
    token_f1,
)
from gemma_ft.evaluate.statistics import estimate


def test_exact_means_every_letter_and_an_end() -> None:
    assert is_exact(Reply("Yes.", True), " Yes.\n")
    assert not is_exact(Reply("Yes.", False), "Yes.")
    assert not is_exact(Reply("yes.", True), "Yes.")


@pytest.mark.parametrize(
    ("text", "marked", "last"),
    [
        ("3 + 4 = 7\n#### 7", "7", "7"),
        ("#### 1,234", "1234", "1234"),
        ("#### -5.", "-5", "-5"),
        ("#### 18.00", "18.00", "18.00"),
        ("so she pays $1,234.50.", None, "1234.50"),
        ("####7", None, "7"),
        ("#### $7", None, "7"),
        ("#### 7\nAnd 9 more.\n#### 8", "7", "8"),
        ("no number", None, None),
        ("#### ...", None, None),
        ("#### 1.2.3", None, None),
    ],
)
def test_numbers_in_answers(text: str, marked: str | None, last: str | None) -> None:
    assert marked_number(text) == (None if marked is None else Decimal(marked))
    assert last_number(text) == (None if last is None else Decimal(last))


def test_numbers_are_compared_as_numbers() -> None:
    assert numeric_match("#### 18.00", "#### 18")
    assert not numeric_match("18", "#### 18")
    assert numeric_flexible("That makes 18 in all.", "2 * 9 = 18\n#### 18")
    assert not numeric_flexible("18 of 20", "#### 18")


def test_numeric_metrics_judge_as_the_harness_judges_gsm8k() -> None:
    """Its filters and its exact_match with the settings of gsm8k.yaml, on answers that end in different ways."""
    pytest.importorskip("lm_eval", reason="the harness is an extra")
    from lm_eval.api.metrics import exact_match_fn
    from lm_eval.filters.extraction import RegexFilter

    rules = {"regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.$"], "ignore_case": True, "ignore_punctuation": False}
    patterns = {
        numeric_match: ("#### (\\-?[0-9\\.\\,]+)", 0),
        numeric_flexible: ("(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
    }
    answers = [
        "5 + 5 = 10\n#### 10", "#### 10.", "#### 1,0", "#### $10", "it costs $10.", "10 apples and 3 pears", "ten", "",
        "####10", "#### -10", "#### 10\n#### 11", "#### 9\nso 10", "-10", "10,", "$10.00", "#### 100",
    ]  # fmt: skip
    for metric, (pattern, which) in patterns.items():
        kept = RegexFilter(regex_pattern=pattern, group_select=which).apply([[answer] for answer in answers], [{}])
        for answer, (found,) in zip(answers, kept, strict=True):
            theirs = exact_match_fn(predictions=[found], references=["5 + 5 = 10\n#### 10"], **rules)["exact_match"]
            if answer == "$10.00":  # the one difference: 10.00 is the number 10
                assert (metric(answer, "#### 10"), theirs) == (metric is numeric_flexible, 0)
            else:
                assert metric(answer, "5 + 5 = 10\n#### 10") == bool(theirs), answer


@pytest.mark.parametrize("text", ["{", "", "NaN", '{"a": 1, "a": 2}', "[1] and more", "{'a': 1}", "[" * 100_000])
def test_what_is_not_json(text: str) -> None:
    assert parsed(text) is NOT_JSON


def test_json_is_compared_as_values() -> None:
    assert json_equal('{"b": [1, null], "a": "x"}', '{"a":"x","b":[1.0,null]}')
    assert not json_equal("[true]", "[1]")
    assert not json_equal("[1, 2]", "[2, 1]")
    assert not json_equal("[1", "[1")
    limit = sys.getrecursionlimit()
    deeper_than_can_be_compared = ["[" * depth + "]" * depth for depth in range(limit // 4, limit, limit // 20)]
    assert not all(json_equal(text, text) for text in deeper_than_can_be_compared)


def test_token_f1_counts_words() -> None:
    assert token_f1("The cat sat", "a cat sat down") == pytest.approx(2 * 2 / 7)
    assert token_f1("кот", "Кот!") == 1
    assert (token_f1("", ""), token_f1("x", "")) == (1, 0)


REFERENCES = ["the cat sat on the mat", "a dog ran home", "it is late and dark outside today"]
REPLIES = [Reply(text, True) for text in ("the cat sat on a mat", "the dog went home", "it is late and cold today")]


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_corpus_scores_are_sacrebleus(name: str) -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="comes with the extra [eval]")
    metric = METRICS[name]
    found = estimate(metric.rows(REPLIES * 4, REFERENCES * 4), metric.figure)
    theirs = getattr(sacrebleu, f"corpus_{name}")([reply.text for reply in REPLIES * 4], [REFERENCES * 4])
    assert found.value == pytest.approx(theirs.score, rel=1e-12)
    assert found.low < found.value < found.high
    # a resample in which one pair was drawn alone is that pair as a corpus
    one = metric.figure(metric.rows(REPLIES, REFERENCES)[:1])
    alone = getattr(sacrebleu, f"corpus_{name}")([REPLIES[0].text], [REFERENCES[:1]])
    assert one[0] == pytest.approx(alone.score, rel=1e-12)


@pytest.mark.parametrize("name", ["rouge1", "rougeL"])
def test_rouge_is_rouge_scores(name: str) -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="comes with the extra [eval]").RougeScorer([name])
    rows = METRICS[name].rows(REPLIES, REFERENCES)
    expected = [
        scorer.score(reference, reply.text)[name].fmeasure for reference, reply in zip(REFERENCES, REPLIES, strict=True)
    ]
    assert rows.tolist() == [[score, 1] for score in expected]
    assert len(set(expected)) == 3


@pytest.mark.parametrize(
    ("references", "names"),
    [
        (REFERENCES, ["exact_match", "rouge1", "rougeL", "chrf", "bleu"]),
        (["#### 3", "so\n#### 1,000"], ["exact_match", "numeric_match", "numeric_flexible"]),
        (['{"a": 1}', "[2]"], ["exact_match", "json_valid", "json_equal"]),
        (['{"a": 1}', "no"], ["exact_match", "rouge1", "rougeL", "chrf", "bleu"]),
        (["3", "true"], ["exact_match", "rouge1", "rougeL", "chrf", "bleu"]),
        (["кот", "cat"], ["exact_match", "chrf", "bleu"]),
    ],
)
def test_a_metric_is_shown_where_it_means_something(references: list[str], names: list[str]) -> None:
    assert fitting(references) == names


def test_a_user_chooses_metrics() -> None:
    assert chosen(["bleu", "exact_match", "token_f1"], REFERENCES) == ["exact_match", "bleu", "token_f1"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rouge", "--metrics: unknown metric 'rouge'; known are exact_match, numeric_match, numeric_flexible, "
         "json_valid, json_equal, rouge1, rougeL, chrf, bleu, token_f1"),
        ("numeric_match",
         "--metrics: numeric_match needs a number after '####' in every held-out answer; leave it out"),
        ("json_equal", "--metrics: json_equal needs a JSON object or list in every held-out answer; leave it out"),
    ],
)  # fmt: skip
def test_a_metric_that_does_not_suit_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        chosen([name], REFERENCES)
    assert str(error.value) == message


def test_json_validity_is_a_share_of_rows() -> None:
    metric = METRICS["json_valid"]
    rows = metric.rows([Reply("[1]", True), Reply("{", True), Reply("null", False)], ["[1]"] * 3)
    assert np.array_equal(rows, [[1, 1], [0, 1], [1, 1]])
    assert estimate(rows, metric.figure).value == pytest.approx(2 / 3)
