"""Answers against references: pure functions of one pair, and the table of metrics that are made of them.

Each metric gives numbers for each pair, and a figure of their sums over rows: a mean, or BLEU and chrF of a corpus.
A metric is shown where it means something: `fitting` looks at the references, `chosen` at a user's list.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

from gemma_ft.errors import UserError
from gemma_ft.evaluate.held_out import Reply, is_exact
from gemma_ft.evaluate.statistics import Figure, Floats, mean

EXTRA = "pip install 'gemma-ft[eval]'"
# The two patterns are lm-evaluation-harness's for GSM8K (lm_eval/tasks/gsm8k/gsm8k.yaml: strict-match and
# flexible-extract); the first is also the data set's own (openai/grade-school-math, dataset.py, ANS_RE).
MARKED_NUMBER = re.compile(r"#### (-?[0-9.,]+)")
ANY_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
WORD = re.compile(r"\w+")


# One pair


def marked_number(text: str) -> Decimal | None:
    """The number of the first "#### 1,234" in a text; commas, dollar signs and a final dot are not part of it."""
    found = MARKED_NUMBER.search(text)
    return _number(found.group(1)) if found else None


def last_number(text: str) -> Decimal | None:
    """The last number in a text, wherever it stands: "... so she pays $1,234." gives 1234."""
    found = ANY_NUMBER.findall(text)
    return _number(found[-1]) if found else None


def _number(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").replace("$", "").removesuffix("."))
    except InvalidOperation:
        return None


def numeric_match(text: str, reference: str) -> bool:
    """Whether the number after "####" is the reference's. Numbers are compared, so that 18.00 is 18."""
    found = marked_number(text)
    return found is not None and found == marked_number(reference)


def numeric_flexible(text: str, reference: str) -> bool:
    """Whether the last number of a text is the one after the reference's "####"."""
    found = last_number(text)
    return found is not None and found == marked_number(reference)


def parsed(text: str) -> Any:
    """The value of a text that is JSON as a whole, without NaN or a name that comes twice; else `NOT_JSON`."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return NOT_JSON


def json_equal(text: str, reference: str) -> bool:
    """Whether two texts are the same JSON value; the order of an object's names does not matter, 1.0 is 1, true not."""
    found = parsed(text)
    try:
        return found is not NOT_JSON and _typed(found) == _typed(parsed(reference))
    except RecursionError:  # the parser goes deeper than a comparison can
        return False


def token_f1(text: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words (runs of letters and digits, case aside), as in SQuAD."""
    said, wanted = (Counter(WORD.findall(one.lower())) for one in (text, reference))
    common = (said & wanted).total()
    return 2 * common / (said.total() + wanted.total()) if common else float(said == wanted)


class _NotJson:
    """The type of NOT_JSON."""


NOT_JSON = _NotJson()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError("a name comes twice")
    return dict(pairs)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _typed(value: Any) -> Any:
    """A value in which true and 1 differ."""
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, dict):
        return {name: _typed(one) for name, one in value.items()}
    return [_typed(one) for one in value] if isinstance(value, list) else value


# The table


@dataclass(frozen=True)
class Metric:
    """`rows` gives the sums of each pair [N, K], `figure` what they amount to; `fits` says whether references suit it.

    `top` is the best value: 1 for shares, 100 for the scores that are given so in the literature.
    """

    rows: Callable[[Sequence[Reply], Sequence[str]], Floats]
    fits: Callable[[Sequence[str]], bool]
    about: str
    figure: Figure = mean
    top: int = 1
    needs: str = "any text"


def fitting(references: Sequence[str]) -> list[str]:
    """The metrics that say something about these references, in the order of the table.

    JSON objects and lists are compared as values and numbers after "####" as numbers; only other text is compared by
    its words and letters. ROUGE knows Latin letters and digits alone.
    """
    told = METRICS["json_equal"].fits(references) or METRICS["numeric_match"].fits(references)
    names = [name for name, metric in METRICS.items() if metric.fits(references) and name != "token_f1"]
    return [name for name in names if not told or name not in TEXT_METRICS]


def chosen(names: Sequence[str], references: Sequence[str]) -> list[str]:
    """The metrics a user named. Raises: UserError for one that is unknown, or that these references do not suit."""
    for name in names:
        if name not in METRICS:
            raise UserError(f"--metrics: unknown metric {name!r}; known are {', '.join(METRICS)}")
        if not METRICS[name].fits(references):
            raise UserError(f"--metrics: {name} needs {METRICS[name].needs} in every held-out answer; leave it out")
    return [name for name in METRICS if name in names]


def _each(score: Callable[[str, str], float]) -> Callable[[Sequence[Reply], Sequence[str]], Floats]:
    """Rows of a metric that is the mean of a score of each pair."""
    return lambda replies, references: np.array(
        [[score(reply.text, reference), 1] for reply, reference in zip(replies, references, strict=True)], dtype=float
    )


def _exact_rows(replies: Sequence[Reply], references: Sequence[str]) -> Floats:
    pairs = zip(replies, references, strict=True)
    return np.array([[is_exact(reply, reference), 1] for reply, reference in pairs], dtype=float)


def _rouge(kind: str) -> Callable[[Sequence[Reply], Sequence[str]], Floats]:
    def rows(replies: Sequence[Reply], references: Sequence[str]) -> Floats:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind])
        return _each(lambda text, reference: scorer.score(reference, text)[kind].fmeasure)(replies, references)

    return rows


def _has_rouge_words(references: Sequence[str]) -> bool:
    return all(re.search("[a-z0-9]", reference.lower()) for reference in references)


def _corpus_rows(name: str) -> Callable[[Sequence[Reply], Sequence[str]], Floats]:
    """The counts of n-grams of each pair; their sums are what sacrebleu makes a corpus score of."""
    return lambda replies, references: np.array(
        _sacrebleu(name)._extract_corpus_statistics([reply.text for reply in replies], [list(references)]), dtype=float
    )


def _corpus_figure(name: str) -> Figure:
    def figure(sums: Floats) -> Floats:
        metric = _sacrebleu(name)
        return np.array([metric._compute_score_from_stats(row.tolist()).score for row in sums])

    return figure


def _sacrebleu(name: str) -> Any:
    """sacrebleu's metric with its defaults. Its two methods used here are those of its own paired bootstrap."""
    from sacrebleu.metrics import BLEU, CHRF

    return {"bleu": BLEU, "chrf": CHRF}[name]()


def _all_json(references: Sequence[str]) -> bool:
    return all(isinstance(parsed(reference), dict | list) for reference in references)


def _all_numbered(references: Sequence[str]) -> bool:
    return all(marked_number(reference) is not None for reference in references)


def _any(_: Sequence[str]) -> bool:
    return True


TEXT_METRICS = ("rouge1", "rougeL", "chrf", "bleu", "token_f1")
NUMBERED = "a number after '####'"
OBJECTS = "a JSON object or list"
METRICS: dict[str, Metric] = {
    "exact_match": Metric(_exact_rows, _any, "letter for letter, and ended by itself"),
    "numeric_match": Metric(_each(numeric_match), _all_numbered, "the number after ####", needs=NUMBERED),
    "numeric_flexible": Metric(_each(numeric_flexible), _all_numbered, "the last number", needs=NUMBERED),
    "json_valid": Metric(
        _each(lambda text, _: parsed(text) is not NOT_JSON), _all_json, "the answer parses", needs=OBJECTS
    ),
    "json_equal": Metric(_each(json_equal), _all_json, "the same JSON value", needs=OBJECTS),
    "rouge1": Metric(_rouge("rouge1"), _has_rouge_words, "common words, F1", needs="Latin letters or digits"),
    "rougeL": Metric(
        _rouge("rougeL"), _has_rouge_words, "longest common subsequence, F1", needs="Latin letters or digits"
    ),
    "chrf": Metric(_corpus_rows("chrf"), _any, "common character n-grams", _corpus_figure("chrf"), 100),
    "bleu": Metric(_corpus_rows("bleu"), _any, "common word n-grams", _corpus_figure("bleu"), 100),
    "token_f1": Metric(_each(token_f1), _any, "common words in any language, F1"),
}
