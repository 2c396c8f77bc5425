"""Who says which of two answers is better: a metric, a user's function, a reward model; and what none of them is."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from gemma_ft.data.conversation import Turn
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.tokenizer import add_tokens, load_tokenizer
from gemma_ft.errors import UserError
from gemma_ft.evaluate.held_out import Question
from gemma_ft.evaluate.judge import Judge, judge_hash, judge_of
from gemma_ft.evaluate.metrics import METRICS
from gemma_ft.infer.scorer import open_scorer
from gemma_ft.system.files import file_hash
from tests.reward import TINY, save_reward_adapter

SCORING = """\
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Weights:
    length: float = 1.0

def shorter(prompt, answer, expected):
    return -Weights().length * len(answer)

def told(prompt, answer, expected):
    return {("Add 1 and 1", "2", "2"): 1.0, ("Say hi", "Hello", "Hi"): 0.25}[prompt, answer, expected]

word = "no function"
"""
NAN = "def score(prompt, answer, expected):\n    return float('nan')\n"


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(load_tokenizer(str(TINY)))


@pytest.fixture(scope="module")
def questions(encoder: ChatEncoder) -> list[Question]:
    asked = [("Add 1 and 1", "2"), ("Say hi", "Hi")]
    return [Question(encoder.encode_prompt([Turn("user", text), Turn("assistant", right)]), text, right)
            for text, right in asked]  # fmt: skip


def written(folder: Path, text: str, name: str = "mine.py") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def refusal(named: str, encoder: ChatEncoder, sha256: str | None = None) -> str:
    with pytest.raises(UserError) as refused:
        judge_of(named, encoder, batch_size=2, sha256=sha256)
    return str(refused.value)


def test_a_users_function_is_given_texts_and_gives_numbers(
    encoder: ChatEncoder, questions: list[Question], tmp_path: Path
) -> None:
    file = written(tmp_path, SCORING)
    judge = judge_of(f"{file}:shorter", encoder, batch_size=2)
    assert judge.scores(questions, ["2", "Hello"]) == [-1.0, -5.0]
    assert judge_of(f"{file}:told", encoder, batch_size=2).scores(questions, ["2", "Hello"]) == [1.0, 0.25]
    assert (judge.name, judge.sha256) == (f"{file}:shorter", file_hash(file))
    assert judge_hash(judge.name) == judge.sha256


def test_a_hash_is_taken_without_running_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, f"open({str(tmp_path / 'marker')!r}, 'w')\ndef score(*texts): return 0\n")
    assert judge_hash(f"{file}:score") == file_hash(file)
    assert not (tmp_path / "marker").exists()
    assert (judge_hash(None), judge_hash("exact_match"), judge_hash("runs/reward")) == (None, None, None)


def test_another_file_than_the_run_knows_is_not_run(encoder: ChatEncoder, tmp_path: Path) -> None:
    file = written(tmp_path, f"open({str(tmp_path / 'marker')!r}, 'w')\ndef score(*texts): return 0\n")
    assert refusal(f"{file}:score", encoder, sha256="0" * 64) == (
        f"objective.judge: {file} was changed since this run began to read it; start the run again"
    )
    assert not (tmp_path / "marker").exists()
    assert judge_of(f"{file}:score", encoder, batch_size=2, sha256=file_hash(file)).scores([], []) == []
    assert (tmp_path / "marker").exists()


def test_no_compiled_copy_is_run_or_left_behind(encoder: ChatEncoder, tmp_path: Path) -> None:
    """What lies in __pycache__ has no hash in the run."""
    import importlib.util
    import py_compile

    file = written(tmp_path, "def score(*texts): return 1\n")
    judge_of(f"{file}:score", encoder, batch_size=2)
    assert not (tmp_path / "__pycache__").exists()
    other = written(tmp_path, "def score(*texts): return 2\n", "other.py")
    cached = Path(importlib.util.cache_from_source(str(file)))
    cached.parent.mkdir()
    py_compile.compile(str(other), cfile=str(cached), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    judge = judge_of(f"{file}:score", encoder, batch_size=2)
    assert judge.scores([Question([], "", "")], [""]) == [1.0]


def test_files_that_cannot_judge(encoder: ChatEncoder, tmp_path: Path) -> None:
    gone = tmp_path / "gone.py"
    for named in (f"{gone}:score", f"{tmp_path}.py:score"):
        path = named.rpartition(":")[0]
        told = f"objective.judge: {path}: no such file on this machine; give FILE.py:function"
        assert refusal(named, encoder) == told
        with pytest.raises(UserError) as refused:
            judge_hash(named)
        assert str(refused.value) == told
    file = written(tmp_path, SCORING)
    for name in ("score", "word", ""):
        assert refusal(f"{file}:{name}", encoder) == f"objective.judge: {file} has no function {name}"
    for code, told in [
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("raise ValueError('one\\ntwo')", "ValueError: one"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def score(:", "SyntaxError: invalid syntax (bad.py, line 1)"),
    ]:
        bad = written(tmp_path, code, "bad.py")
        assert refusal(f"{bad}:score", encoder) == f"objective.judge: {bad}: {told}"


def test_what_is_no_number_is_an_error_of_the_judge(
    encoder: ChatEncoder, questions: list[Question], tmp_path: Path
) -> None:
    """Which costs the metric alone: train/test_judged_runs.py."""
    judge = judge_of(f"{written(tmp_path, NAN)}:score", encoder, batch_size=2)
    with pytest.raises(ValueError) as refused:
        judge.scores(questions, ["2", "Hi"])
    assert str(refused.value) == "gave a number that is not finite"
    file = written(tmp_path, "def score(prompt, answer, expected):\n    return None\n")
    with pytest.raises(TypeError):
        judge_of(f"{file}:score", encoder, batch_size=2).scores(questions, ["2", "Hi"])


def test_a_metric_scores_each_answer_by_itself(encoder: ChatEncoder, questions: list[Question]) -> None:
    exact = judge_of("exact_match", encoder, batch_size=2)
    assert exact == Judge("exact_match", exact.scores, None)
    assert exact.scores(questions, ["2", "Hello"]) == [1.0, 0.0]
    f1 = judge_of("token_f1", encoder, batch_size=2).scores(questions, ["2 or 3", "Hi"])
    assert f1 == pytest.approx([0.5, 1.0])
    chrf = judge_of("chrf", encoder, batch_size=2).scores(questions, ["2", "Ho"])
    assert chrf[0] == pytest.approx(100.0)
    assert 0 < chrf[1] < 50
    with pytest.raises(ValueError) as refused:
        judge_of("json_equal", encoder, batch_size=2).scores(questions, ["2", "Hi"])
    assert str(refused.value) == "it needs a JSON object or list in every held-out answer"


def test_a_language_model_is_no_judge(encoder: ChatEncoder) -> None:
    assert refusal(str(TINY), encoder) == (
        f"objective.judge: {TINY} is no reward model; name one, FILE.py:function, or one of {', '.join(METRICS)}"
    )


def test_a_reward_model_gives_its_reward_at_the_end_of_the_answer(
    encoder: ChatEncoder, questions: list[Question], tmp_path: Path
) -> None:
    folder = save_reward_adapter(tmp_path / "reward")
    judge = judge_of(str(folder), encoder, batch_size=1)
    found = judge.scores(questions, ["2", "Hello"])
    scorer = open_scorer(folder)
    chats = [
        [*encoder.encode_prompt([Turn("user", text), Turn("assistant", "")]), *encoder.content.encode(answer),
         encoder.control.end_of_turn]
        for text, answer in (("Add 1 and 1", "2"), ("Say hi", "Hello"))
    ]  # fmt: skip
    assert found == pytest.approx(scorer.rewards(chats, batch_size=2), abs=1e-5)
    assert len(set(found)) == 2
    assert all(map(math.isfinite, found))
    assert judge.sha256 is None


def test_a_reward_model_of_another_tokenizer_is_no_judge(tmp_path: Path) -> None:
    folder = save_reward_adapter(tmp_path / "reward")
    other = load_tokenizer(str(TINY))
    add_tokens(other, ["<think>"])
    assert refusal(str(folder), ChatEncoder(other)) == (
        f"objective.judge: {folder} has another tokenizer than the model that is trained; name a reward model of the "
        "same generation of Gemma"
    )
