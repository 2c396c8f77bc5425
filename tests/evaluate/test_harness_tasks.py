"""Tasks of lm-evaluation-harness as they are run here: whole, as a chat, and what cannot be is found before any
work.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemma_ft.build.pretrained import load_tokenizer
from gemma_ft.data.conversation import Turn
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.errors import UserError
from gemma_ft.evaluate.harness import Tasks
from gemma_ft.evaluate.statistics import mean, perplexity
from gemma_ft.families.chat_template import TURNS
from tests.evaluate.conftest import CONTEXT, ROWS, SPECIFIC, write_task

pytest.importorskip("lm_eval", reason="the harness is an extra: pip install 'gemma-ft[eval]'")

from gemma_ft.evaluate.harness_model import NativeLM
from tests.evaluate.test_harness import request_like

pytestmark = pytest.mark.usefixtures("offline")


def test_the_harness_runs_our_tasks(task_folder: Path, model: Any, encoder: ChatEncoder) -> None:
    """Through the harness's evaluator: its metrics, with rows that give the same values."""
    tasks = Tasks(["local_choice", "local_rolling", "local_open"], path=task_folder, limit=3, chat=False)
    assert tasks.requests(encoder, context=CONTEXT) == 12 + 3 + 3
    heard: list[int] = []
    found, cut = tasks.run(model, encoder, batch_size=4, on_progress=heard.append)
    assert {task: list(figures) for task, figures in found.items()} == {
        "local_choice": ["acc"], "local_rolling": ["word_perplexity", "bits_per_byte"], "local_open": ["exact_match"],
    }  # fmt: skip
    assert cut == 0
    assert sum(heard) == 12 + 3 + 3
    for one in (found["local_choice"]["acc"], found["local_rolling"]["bits_per_byte"]):
        assert one.figure is mean
        assert one.value == pytest.approx(one.rows[:, 0].sum() / one.rows[:, 1].sum())
    assert found["local_rolling"]["word_perplexity"].figure is perplexity
    again, _ = tasks.run(model, encoder, batch_size=4, on_progress=heard.append)
    assert again["local_choice"]["acc"].value == found["local_choice"]["acc"].value


def test_a_chat_is_written_as_it_was_trained(folder: Path, task_folder: Path, model: Any) -> None:
    tokenizer = load_tokenizer(folder)
    lm = NativeLM(model, ChatEncoder(tokenizer, "fold"), batch_size=2)
    turns = [Turn("system", "Be brief."), Turn("user", " Hi there ")]
    text = lm.apply_chat_template([{"role": turn.role, "content": turn.content} for turn in turns])
    ids = lm.tok_encode(text)
    assert ids == lm.encoder.encode_prompt(turns)
    assert ids.count(lm.encoder.control.bos) == 1
    assert lm.tok_encode("Hi") == [lm.encoder.control.bos, *lm.tok_encode("Hi", add_special_tokens=False)]
    assert lm.chat_template(True) == text_of_template("fold")
    refusing = NativeLM(model, ChatEncoder(tokenizer, "error"), batch_size=2)
    with pytest.raises(UserError) as error:
        refusing.apply_chat_template([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])
    assert str(error.value) == (
        "--task-chat: the task's turns do not fit the chat template: system turns are refused by this model"
    )
    assert lm.tokenizer_name != refusing.tokenizer_name
    chats = Tasks(["local_open"], path=task_folder, limit=2, chat=True)
    assert chats.requests(lm.encoder, context=CONTEXT) == 2
    (task,) = chats._loaded["tasks"].values()
    assert task.instances[0].args[0] == lm.apply_chat_template(
        [{"role": "user", "content": ROWS["open"][0]["question"]}]
    )


def test_examples_of_a_chat_are_turns_of_their_own(folder: Path, tmp_path: Path) -> None:
    """As lm_eval.simple_evaluate has it."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS["open"][:3]))
    write_task(tmp_path, "shown", rows, {**SPECIFIC["open"], "num_fewshot": 1})
    lm = NativeLM(None, ChatEncoder(load_tokenizer(folder), "fold"), batch_size=1)
    tasks = Tasks(["shown"], path=tmp_path, limit=1, chat=True)
    tasks.requests(lm.encoder, context=CONTEXT)
    (task,) = tasks._loaded["tasks"].values()
    assert task.instances[0].args[0].count("<start_of_turn>user") == 2


def text_of_template(policy: str) -> str:

    return TURNS.text(policy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "--tasks: generation_kwargs: num_beams is not supported; leave it out of the task"),
        ({"max_gen_toks": CONTEXT},
         f"--tasks: max_gen_toks {CONTEXT} leaves no room for a prompt in {CONTEXT} tokens of context; "
         "lower it in the task"),
        ({"do_sample": True, "temperature": 1.0, "top_p": 2.0, "max_gen_toks": 8}, "top_p: expected 0 to 1, got 2.0"),
    ],
)  # fmt: skip
def test_options_of_tasks_that_cannot_be(
    options: dict[str, Any], message: str, model: Any, encoder: ChatEncoder, requests: dict[str, list[Any]]
) -> None:
    asked = [request_like(requests["local_open"][0], ("Hello", options))]
    with pytest.raises(UserError) as error:
        NativeLM(model, encoder, batch_size=1).generate_until(asked)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "generation_kwargs: num_beams is not supported; leave it out of the task"),
        ({"do_sample": True, "top_k": -1, "max_gen_toks": 8},
         f"top_k: expected a whole number from 0 to {2**31 - 1}, got -1"),
        ({"max_gen_toks": CONTEXT},
         f"max_gen_toks {CONTEXT} leaves no room for a prompt in {CONTEXT} tokens of context; lower it in the task"),
        ({"max_gen_toks": "many"},
         "generation_kwargs: ValueError: invalid literal for int() with base 10: 'many'; mend them in the task"),
        ({"until": [5]}, "generation_kwargs: until: expected texts, got 5; mend it in the task"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_found_before_any_work(
    options: dict[str, Any], message: str, task_folder: Path, tmp_path: Path, encoder: ChatEncoder
) -> None:
    """By the task's name, while there is no model yet."""
    specific = {**SPECIFIC["open"], "generation_kwargs": {"until": ["\n"], **options}}
    write_task(tmp_path, "odd", task_folder / "open.jsonl", specific)
    tasks = Tasks(["odd"], path=tmp_path, limit=1, chat=False)
    with pytest.raises(UserError) as error:
        tasks.requests(encoder, context=CONTEXT)
    assert str(error.value) == f"--tasks: odd: {message}"


@pytest.mark.parametrize(
    ("answer", "message"),
    [("", "--tasks: a text to be scored is empty; mend the task"),
     (" very" * 100, f"--tasks: a text to be scored has 100 tokens, the model reads {CONTEXT}; mend the task")],
)  # fmt: skip
def test_texts_that_cannot_be_scored(
    answer: str, message: str, model: Any, encoder: ChatEncoder, requests: dict[str, list[Any]]
) -> None:
    asked = [request_like(requests["local_choice"][0], ("It is", answer))]
    with pytest.raises(UserError) as error:
        NativeLM(model, encoder, batch_size=1).loglikelihood(asked)
    assert str(error.value) == message


def test_tasks_that_cannot_be_loaded(tmp_path: Path, encoder: ChatEncoder) -> None:
    def line(names: list[str], path: Path | None) -> str:
        with pytest.raises(UserError) as error:
            Tasks(names, path=path, limit=None, chat=False).requests(encoder, context=CONTEXT)
        return str(error.value)

    assert line(["local_open"], tmp_path / "no") == (
        f"--task-path: {tmp_path / 'no'}: no such folder; give one that holds task files (.yaml)"
    )
    write_task(tmp_path, "lost", tmp_path / "lost.jsonl", SPECIFIC["open"])
    assert line(["lost"], tmp_path).startswith("--tasks: lost: cannot be loaded: FileNotFoundError: ")
    (tmp_path / "rows.jsonl").write_text('{"n": 1, "answer": ""}\n{"n": 0, "answer": ""}\n')
    write_task(tmp_path, "crooked", tmp_path / "rows.jsonl", {**SPECIFIC["open"], "doc_to_text": "{{1 / n}}"})
    assert line(["crooked"], tmp_path) == (
        "--tasks: crooked: its requests cannot be made: ZeroDivisionError: division by zero"
    )


def test_a_task_that_is_nowhere(task_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    real = TaskManager.__init__
    monkeypatch.setattr(  # the harness's own list takes ten seconds to read
        TaskManager, "__init__", lambda self, **options: real(self, **{**options, "include_defaults": False})
    )
    with pytest.raises(UserError) as error:
        Tasks(["gsm9k"], path=task_folder, limit=None, chat=False)
    assert str(error.value) == (
        f"--tasks: gsm9k: no such task in {task_folder}, nor in the harness; `lm-eval ls tasks` lists its own"
    )


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(UserError) as error:
        Tasks(["gsm8k"], path=None, limit=None, chat=False)
    assert str(error.value) == "--tasks: lm-evaluation-harness is not installed; pip install 'gemma-ft[eval]'"
