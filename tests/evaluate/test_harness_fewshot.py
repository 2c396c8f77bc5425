"""Few-shot examples of the harness: every model is asked with the same, and they are those of `lm_eval.simple_evaluate`
(lm_eval 0.4.13, seed 1234 by `Task.set_fewshot_seed`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_ft.build.pretrained import load_tokenizer
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.system import environment
from gemma_ft.system.shipped import shipped_root

pytest.importorskip("lm_eval", reason="the harness is an extra: pip install 'gemma-ft[eval]'")

from gemma_ft.evaluate import harness
from gemma_ft.evaluate.harness import Tasks
from gemma_ft.evaluate.harness_model import NativeLM

CONTEXT = 512
ROWS = [{"q": f"How much is {n} and {n}? ", "g": f"It is {2 * n}.", "c": [" A", " B"], "n": n % 2} for n in range(12)]
SHARED: dict[str, Any] = {"doc_to_text": "{{q}}", "doc_to_target": "{{g}}", "num_fewshot": 2}
SPECIFIC: dict[str, dict[str, Any]] = {
    "said": {**SHARED, "output_type": "loglikelihood", "metric_list": [{"metric": "perplexity"}]},
    "chosen": {**SHARED, "output_type": "multiple_choice", "doc_to_choice": "{{c}}", "doc_to_target": "{{n}}",
               "metric_list": [{"metric": "acc"}]},
    "told": {**SHARED, "output_type": "generate_until", "num_fewshot": 3, "metric_list": [{"metric": "exact_match"}],
             "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}},
    # what a task draws by itself
    "drawn": {**SHARED, "output_type": "generate_until", "doc_to_text": "{{q}}{{[1, 2, 3, 4, 5, 6, 7, 8] | random}}",
              "metric_list": [{"metric": "exact_match"}], "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}},
    "first": {**SHARED, "output_type": "loglikelihood", "fewshot_config": {"sampler": "first_n"},
              "metric_list": [{"metric": "perplexity"}]},
    "zero": {**SHARED, "output_type": "loglikelihood", "num_fewshot": 0, "metric_list": [{"metric": "perplexity"}]},
}  # fmt: skip
GROUPED = ("said", "chosen")


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    environment.quiet_libraries()
    folder = tmp_path_factory.mktemp("tasks")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}},
              "test_split": "test", "fewshot_split": "test"}  # fmt: skip
    for name, specific in SPECIFIC.items():
        (folder / f"{name}.yaml").write_text(json.dumps({**shared, "task": name, **specific}))
    (folder / "both.yaml").write_text(json.dumps({"group": "both", "task": list(GROUPED)}))
    return folder


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(load_tokenizer(shipped_root() / "data" / "gemma-tiny"), "fold")


class Listening(NativeLM):
    """Says the same to every request, and keeps the prompts."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.prompts: list[tuple[Any, ...]] = []

    def _heard(self, requests: list[Any]) -> int:
        self.prompts += [request.args[:1] if request.request_type == "generate_until" else request.args
                         for request in requests]  # fmt: skip
        return len(requests)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return [(-1.0, False)] * self._heard(requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        return ["x"] * self._heard(requests)


@pytest.fixture
def asked(
    task_folder: Path, encoder: ChatEncoder, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[list[tuple[Any, ...]]]]:
    """What each of several models hears in one evaluation."""

    def ask(names: list[str], *, models: int, chat: bool = False, count: bool = True) -> list[list[tuple[Any, ...]]]:
        heard: list[Listening] = []

        def listening(model: Any, *arguments: Any, **options: Any) -> NativeLM:
            made = Listening(model, *arguments, **{"max_length": CONTEXT, **options})
            heard.append(made)
            return made

        monkeypatch.setattr(harness, "_model", lambda: listening)
        tasks = Tasks(names, path=task_folder, limit=None, chat=chat)
        if count:
            tasks.requests(encoder, context=CONTEXT)
        heard.clear()
        for _ in range(models):
            tasks.run(None, encoder, batch_size=2, on_progress=lambda done: None)
        return [one.prompts for one in heard]

    return ask


def harness_own(
    names: list[str], task_folder: Path, encoder: ChatEncoder, monkeypatch: pytest.MonkeyPatch, *, chat: bool
) -> list[tuple[Any, ...]]:
    """What `simple_evaluate` asks of a model."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    for slow in ("add_env_info", "get_git_commit_hash"):  # programs that are asked for their versions
        monkeypatch.setattr(f"lm_eval.evaluator.{slow}", lambda *_: None)
    lm = Listening(None, encoder, batch_size=2, max_length=CONTEXT)
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    lm_eval.simple_evaluate(
        lm, tasks=names, task_manager=manager, bootstrap_iters=0, apply_chat_template=chat, fewshot_as_multiturn=chat
    )
    return lm.prompts


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
@pytest.mark.parametrize("names", [["said"], ["chosen"], ["told", "drawn"], ["both"]], ids=str)
def test_every_model_is_asked_with_the_examples_of_the_harness(
    names: list[str],
    chat: bool,
    asked: Callable[..., list[list[tuple[Any, ...]]]],
    task_folder: Path,
    encoder: ChatEncoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = harness_own(names, task_folder, encoder, monkeypatch, chat=chat)
    found = asked(names, models=3, chat=chat)
    assert len({prompt[0] for prompt in expected}) >= len(ROWS)
    assert [one == expected for one in found] == [True] * 3


def test_a_model_alone_is_asked_as_behind_another(asked: Callable[..., list[list[tuple[Any, ...]]]]) -> None:
    (alone,) = asked(["told"], models=1, count=False)
    assert asked(["told"], models=2)[1] == alone


@pytest.mark.parametrize("name", ["first", "zero"])
def test_tasks_that_draw_nothing_are_asked_as_before(
    name: str,
    asked: Callable[..., list[list[tuple[Any, ...]]]],
    task_folder: Path,
    encoder: ChatEncoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = harness_own([name], task_folder, encoder, monkeypatch, chat=False)
    assert asked([name], models=2) == [expected] * 2
    examples = [prompt[0].count("It is ") for prompt in expected]
    assert set(examples) == {0 if name == "zero" else 2}
