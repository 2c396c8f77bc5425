"""lm-evaluation-harness: every request of three kinds of local tasks, item by item against the harness's own hf backend
with stock transformers on the same folder.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_ft.build.pretrained import load_model, load_tokenizer
from gemma_ft.data.conversation import Turn
from gemma_ft.data.encode.chat import IGNORE, ChatEncoder
from gemma_ft.errors import UserError
from gemma_ft.evaluate.harness import Tasks
from gemma_ft.evaluate.statistics import mean, perplexity
from gemma_ft.families import TURNS
from gemma_ft.system import environment
from gemma_ft.system.shipped import shipped_root

pytest.importorskip("lm_eval", reason="the harness is an extra: pip install 'gemma-ft[eval]'")

from gemma_ft.evaluate.harness_model import NativeLM

CONTEXT = 96  # of the model under test: some requests have to be cut, and long texts roll
CHOICES = [" late", " early in the morning", " A", " B"]  # the last two are one token each
OPEN = [
    "Set up a review on Sunday at 11:45. Thanks",
    "Set up a review on Sunday at 11:45. Thanks Thanks",
    "What is the",
    "We meet on Monday at",
    "again " * 100 + "We meet on Monday at",
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "choice": [
        {"question": f"The meeting is on day {n}. It is" + " very" * (35 * n), "choices": CHOICES, "gold": n}
        for n in range(4)
    ]
    + [{"question": "", "choices": CHOICES, "gold": 0}, {"question": "Well, ", "choices": CHOICES, "gold": 1}],
    "rolling": [{"text": "The dog met Anna at noon. " * repeats} for repeats in (1, 7, 25)] + [{"text": ""}],
    "open": [{"question": question, "answer": "Done."} for question in OPEN],
}
SPECIFIC: dict[str, dict[str, Any]] = {
    "choice": {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
               "doc_to_target": "{{gold}}", "metric_list": [{"metric": "acc"}]},
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]},
    "open": {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
             "generation_kwargs": {"until": ["\n", " team", TURNS.end_of_turn], "max_gen_toks": 10},
             "metric_list": [{"metric": "exact_match"}]},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _offline() -> Any:
    """Any attempt to reach another machine is an error."""
    patch = pytest.MonkeyPatch()

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"a connection was opened: {arguments}")

    patch.setattr(socket.socket, "connect", refuse)
    patch.setattr(socket, "getaddrinfo", refuse)
    environment.quiet_libraries()
    yield
    patch.undo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Gemma with a short context."""
    place = tmp_path_factory.mktemp("model") / "gemma"
    shutil.copytree(shipped_root() / "data" / "gemma-tiny", place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}))
    return place


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of each kind; JSON is YAML."""
    place = tmp_path_factory.mktemp("tasks")
    for name, rows in ROWS.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_task(place, f"local_{name}", place / f"{name}.jsonl", SPECIFIC[name])
    return place


def write_task(folder: Path, name: str, data: Path, specific: dict[str, Any]) -> None:
    shared = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
              "test_split": "test"}  # fmt: skip
    (folder / f"{name}.yaml").write_text(json.dumps({**shared, **specific}))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> ChatEncoder:
    return ChatEncoder(load_tokenizer(folder))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Callable[[bool], Any]:
    """The harness's hf backend: stock transformers in float32, with or without the tokenizer's BOS."""
    from lm_eval.models.huggingface import HFLM

    made: dict[bool, Any] = {}

    def make(add_bos: bool) -> Any:
        if add_bos not in made:
            loaded = made[not add_bos].model if made else str(folder)
            made[add_bos] = HFLM(
                loaded, tokenizer=str(folder), device="cpu", dtype="float32", batch_size=3, add_bos_token=add_bos
            )
        return made[add_bos]

    return make


@pytest.fixture(scope="module")
def requests(task_folder: Path, encoder: ChatEncoder) -> dict[str, list[Any]]:
    """The harness's own requests, by task."""
    tasks = Tasks([f"local_{name}" for name in ROWS], path=task_folder, limit=None, chat=False)
    assert tasks.requests(encoder, context=CONTEXT) == 24 + 4 + 5
    return {name: task.instances for name, task in tasks._loaded["tasks"].items()}


def test_choices_score_as_on_the_hf_backend(
    model: Any, encoder: ChatEncoder, theirs: Callable[[bool], Any], requests: dict[str, list[Any]]
) -> None:
    asked = requests["local_choice"]
    mine, hf = NativeLM(model, encoder, batch_size=3), theirs(True)
    found = mine.loglikelihood(asked)
    pairs = [hf._encode_pair(*request.args) if request.args[0] else None for request in asked]
    long = [number for number, pair in enumerate(pairs) if pair is not None and sum(map(len, pair)) > CONTEXT + 1]
    assert len(found) == 24
    assert mine.truncated == len(long) == 4  # all choices of the longest question
    expected = hf.loglikelihood(asked, disable_tqdm=True)
    assert all(found[number] != pytest.approx(expected[number], abs=1e-3) for number in long)  # hf drops their BOS
    for number, one in zip(long, with_bos(hf, [pairs[number] for number in long], encoder), strict=True):
        expected[number] = one
    for (total, greedy), (their_total, their_greedy) in zip(found, expected, strict=True):
        assert total == pytest.approx(their_total, abs=1e-4)
        assert greedy == their_greedy
    context = ROWS["open"][0]["question"]
    said = mine.generate_until([request_like(asked[0], (context, {"until": ["\n"], "max_gen_toks": 6}))])
    likeliest = [request_like(asked[0], (context, said[0])), request_like(asked[0], (context, said[0] + " not"))]
    assert [greedy for _, greedy in mine.loglikelihood(likeliest)] == [True, False]
    assert [greedy for _, greedy in theirs(True).loglikelihood(likeliest, disable_tqdm=True)] == [True, False]


def with_bos(hf: Any, pairs: list[tuple[list[int], list[int]]], encoder: ChatEncoder) -> list[tuple[float, bool]]:
    """The harness's own scores of what stays of pairs that are too long, when BOS stays before it."""
    bos = encoder.control.bos
    cut = [((" ", " "), [bos, *[*context, *said][-CONTEXT : -len(said)]], said) for context, said in pairs]
    return hf._loglikelihood_tokens(cut, disable_tqdm=True)


def test_rolling_texts_score_as_on_the_hf_backend(
    model: Any, encoder: ChatEncoder, theirs: Callable[[bool], Any], requests: dict[str, list[Any]]
) -> None:
    """With its tokenizer's BOS off: its prefix is the one BOS then, as ours always is. Of a text longer than a context
    it reads the later windows without any.
    """
    asked = requests["local_rolling"]
    mine = NativeLM(model, encoder, batch_size=3)
    found = mine.loglikelihood_rolling(asked)
    expected = theirs(False).loglikelihood_rolling(asked, disable_tqdm=True)
    windows = list(mine._windows(mine.tok_encode(asked[2].args[0], add_special_tokens=False)))
    assert len(windows) > 2
    assert found[2] != pytest.approx(expected[2], abs=0.1)
    expected[2] = sum(  # one by one: it takes windows of the same tokens, however many of them are scored, for one
        theirs(False)._loglikelihood_tokens([((" ", " "), *window)], disable_tqdm=True)[0][0] for window in windows
    )
    assert found == pytest.approx(expected, abs=1e-4, rel=1e-6)
    twice = theirs(True).loglikelihood_rolling(asked, disable_tqdm=True)
    assert found[1] != pytest.approx(twice[1], abs=1)
    assert found[3] == 0
    spelled = [request_like(asked[0], (TURNS.bos + asked[0].args[0],))]
    assert NativeLM(model, encoder, batch_size=3).loglikelihood_rolling(spelled) == pytest.approx(found[:1], abs=1e-4)


@pytest.mark.parametrize("tokens", [0, 1, 4, 5, 7, 8, 9, 11])
def test_every_window_of_a_rolling_text_begins_with_bos_and_is_full(tokens: int, encoder: ChatEncoder) -> None:
    bos, ids = encoder.control.bos, list(range(100, 100 + tokens))
    windows = list(NativeLM(None, encoder, batch_size=1, max_length=4)._windows(ids))
    if tokens == 9:
        assert windows == [
            ([bos], [100, 101, 102, 103]), ([bos, 103], [104, 105, 106]), ([bos, 105, 106], [107, 108])
        ]  # fmt: skip
    assert [one for _, scored in windows for one in scored] == ids
    assert [context.count(bos) for context, _ in windows] == [1] * len(windows)
    assert all(context[0] == bos for context, _ in windows)
    assert {len(context) + len(scored) for context, scored in windows} <= {5 if tokens >= 4 else tokens + 1}


def test_what_is_too_long_is_read_behind_bos(encoder: ChatEncoder) -> None:
    """The last tokens that fit, with the one BOS that every training chunk begins with; what fits is left alone."""
    bos = encoder.control.bos
    lm = NativeLM(None, encoder, batch_size=1, max_length=32)
    long, said = lm.tok_encode("word " * 60), lm.tok_encode(" Paris", add_special_tokens=False)
    piece = lm._piece(long, said, 0)
    assert piece.input_ids == [bos, *[*long, *said][-32:]]
    assert piece.labels == [IGNORE] * (33 - len(said)) + said
    all_of_it = list(range(200, 232))  # nothing but BOS goes before it
    assert lm._piece(long, all_of_it, 0).input_ids == [bos, *all_of_it]
    options = {"until": ["x"], "max_gen_toks": 4}
    assert lm._request("word " * 60, options, seed=1)[0].prompt_ids == [bos, *long[-27:]]
    assert lm._request(TURNS.bos + "word " * 60, options, seed=1)[0].prompt_ids == [bos, *long[-27:]]
    assert lm.truncated == 4
    assert lm._request("word", options, seed=1)[0].prompt_ids == lm.tok_encode("word")
    fits = lm.tok_encode("word")
    assert lm._piece(fits, said, 0).input_ids == [*fits, *said]
    assert lm.truncated == 4
    with pytest.raises(UserError, match="leaves no room for a prompt"):
        lm._request("word", {**options, "max_gen_toks": 31}, seed=1)


def test_answers_are_those_of_the_hf_backend(
    model: Any, encoder: ChatEncoder, theirs: Callable[[bool], Any], requests: dict[str, list[Any]]
) -> None:
    asked = requests["local_open"]
    mine, hf = NativeLM(model, encoder, batch_size=3), theirs(True)
    found = mine.generate_until(asked)
    assert found[:-1] == hf.generate_until(asked[:-1], disable_tqdm=True)
    assert len(set(found)) > 2
    assert mine.truncated == 1
    long = request_like(asked[-1], (asked[-1].args[0] + " a", {"until": ["@"], "max_gen_toks": 10}))
    kept = torch.tensor([[encoder.control.bos, *mine.tok_encode(long.args[0])[-(CONTEXT - 11) :]]])
    said = hf.model.generate(kept, max_new_tokens=10, do_sample=False, eos_token_id=list(encoder.stop_ids))
    expected = mine.tokenizer.decode(said[0, kept.shape[1] :], skip_special_tokens=True)
    assert mine.generate_until([long]) == [expected]
    assert expected


def test_the_end_of_a_turn_is_no_part_of_an_answer(
    model: Any, encoder: ChatEncoder, theirs: Callable[[bool], Any], requests: dict[str, list[Any]], tmp_path: Path
) -> None:
    """The hf backend writes it into the text, where the tokenizer does not hold it for special."""
    from lm_eval.models.huggingface import HFLM

    tiny = shipped_root() / "data" / "gemma-tiny"
    spec = json.loads((tiny / "tokenizer.json").read_text())
    spec["added_tokens"] = [{**token, "special": token["id"] < 4} for token in spec["added_tokens"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    shutil.copy(tiny / "tokenizer_config.json", tmp_path)
    stock = HFLM(theirs(True).model, tokenizer=str(tmp_path), device="cpu", batch_size=3, add_bos_token=True)
    asked = [request_like(requests["local_open"][0], (OPEN[3], {"until": ["\n"], "max_gen_toks": 20}))]
    found = NativeLM(model, encoder, batch_size=3).generate_until(asked)
    expected = stock.generate_until(asked, disable_tqdm=True)
    assert found == [text.removesuffix(TURNS.end_of_turn) for text in expected]
    assert expected[0].endswith(TURNS.end_of_turn)


def request_like(request: Any, arguments: tuple[Any, ...]) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=request.request_type, doc={}, arguments=arguments, idx=0)


def test_results_do_not_depend_on_the_batch(model: Any, encoder: ChatEncoder, requests: dict[str, list[Any]]) -> None:
    one, many = NativeLM(model, encoder, batch_size=1), NativeLM(model, encoder, batch_size=16)
    asked = requests["local_choice"]
    assert [total for total, _ in one.loglikelihood(asked)] == pytest.approx(
        [total for total, _ in many.loglikelihood(asked)], abs=1e-4
    )
    assert one.generate_until(requests["local_open"]) == many.generate_until(requests["local_open"])


def test_drawn_answers_are_drawn_again(model: Any, encoder: ChatEncoder, requests: dict[str, list[Any]]) -> None:
    drawn = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "max_gen_toks": 6}
    asked = [request_like(requests["local_open"][0], ("Hello", drawn)) for _ in range(3)]
    lm = NativeLM(model, encoder, batch_size=3)
    found = lm.generate_until(asked)
    assert found == lm.generate_until(asked)
    assert len(set(found)) > 1
    greedy = [request_like(one, ("Hello", {**drawn, "do_sample": False})) for one in asked]
    assert len(set(lm.generate_until(greedy))) == 1


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
    from gemma_ft.families import TURNS

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
