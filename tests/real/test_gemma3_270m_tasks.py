"""Three local tasks on the real Gemma 3 270M, item by item those of lm-evaluation-harness's own hf backend with stock
transformers on the same folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import gemma_ft
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.evaluate.harness import Tasks
from tests.evaluate.conftest import write_task
from tests.real.long_texts import SENTENCES

pytest.importorskip("lm_eval", reason="the harness is an extra: pip install 'gemma-ft[eval]'")

from gemma_ft.evaluate.harness_model import NativeLM

BATCH = 3
CONTEXT = 32_768  # of the model: nothing here is cut
TOLERANCE = {"abs": 2e-4, "rel": 1e-5}  # of sums of log probabilities in float32
CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Peru": "Lima"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "choice": [
        {
            "question": f"The capital of {country} is",
            "choices": [f" {city}" for city in CAPITALS.values()],
            "gold": number,
        }
        for number, country in enumerate(CAPITALS)
    ],
    "rolling": [{"text": text} for text in (SENTENCES, "Water boils.", "def f(x):\n    return x + 1\n")],
    "open": [
        {"question": f"Question: What is the capital of {country}?\nAnswer:", "answer": city}
        for country, city in CAPITALS.items()
    ],
}
SPECIFIC: dict[str, dict[str, Any]] = {
    "choice": {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
               "doc_to_target": "{{gold}}", "target_delimiter": "", "metric_list": [{"metric": "acc"}]},
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                "metric_list": [{"metric": "word_perplexity"}]},
    "open": {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
             "num_fewshot": 1, "fewshot_split": "test", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
             "metric_list": [{"metric": "exact_match"}]},
}  # fmt: skip


@pytest.fixture(scope="module")
def encoder(gemma3_270m: Path) -> ChatEncoder:
    return ChatEncoder(gemma_ft.load_tokenizer(gemma3_270m))


@pytest.fixture(scope="module")
def ours(gemma3_270m: Path, encoder: ChatEncoder) -> NativeLM:
    return NativeLM(gemma_ft.load_model(gemma3_270m, dtype=torch.float32), encoder, batch_size=BATCH)


@pytest.fixture(scope="module")
def theirs(gemma3_270m: Path) -> Any:
    """The harness's hf backend in float32, with one BOS before what it reads."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(gemma3_270m), device="cpu", dtype="float32", batch_size=BATCH, add_bos_token=True)


@pytest.fixture(scope="module")
def requests(encoder: ChatEncoder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """The harness's own requests, by task."""
    place = tmp_path_factory.mktemp("tasks")
    for name, rows in ROWS.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_task(place, f"local_{name}", place / f"{name}.jsonl", SPECIFIC[name])
    tasks = Tasks([f"local_{name}" for name in ROWS], path=place, limit=None, chat=False)
    assert tasks.requests(encoder, context=CONTEXT) == 16 + 3 + 4
    return {name.removeprefix("local_"): task.instances for name, task in tasks._loaded["tasks"].items()}


def test_choices_score_as_on_the_hf_backend(ours: NativeLM, theirs: Any, requests: dict[str, list[Any]]) -> None:
    asked = requests["choice"]
    found, expected = ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True)
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], **TOLERANCE)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    best = [max(range(4), key=lambda n: found[row + n][0]) for row in range(0, 16, 4)]
    assert best == [0, 1, 2, 3], "the real model knows its capitals"


def test_texts_score_as_on_the_hf_backend(ours: NativeLM, theirs: Any, requests: dict[str, list[Any]]) -> None:
    """Its prefix is the one BOS: the tokenizer's own would be a second one."""
    asked = requests["rolling"]
    found = ours.loglikelihood_rolling(asked)
    theirs.add_bos_token = False
    try:
        expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    finally:
        theirs.add_bos_token = True
    assert found == pytest.approx(expected, **TOLERANCE)


def test_answers_are_those_of_the_hf_backend(ours: NativeLM, theirs: Any, requests: dict[str, list[Any]]) -> None:
    asked = requests["open"]
    found = ours.generate_until(asked)
    assert found == theirs.generate_until(asked, disable_tqdm=True)
    assert [city in answer for city, answer in zip(CAPITALS.values(), found, strict=True)].count(True) >= 3
