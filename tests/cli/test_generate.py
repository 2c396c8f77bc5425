"""`gemma-ft generate` as a user meets it: the text alone on stdout, or a file of answers; one line for each failure."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_ft.cli import model_options
from gemma_ft.cli.app import main
from gemma_ft.data.conversation import Turn
from gemma_ft.infer.sampling import Sampling
from gemma_ft.ui import progress
from tests.infer.tiny_session import TINY, ScriptedSession, tiny_session

BASE_NOTE = f"note: {TINY}: a base model without a chat template; it was never tuned to answer\n"
QUESTION = "Set up a budget review on Monday with Paul at 10:15 for 20 minutes."
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`gemma-ft generate MODEL ...` in a folder of its own: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def generate(*arguments: str, model: str = str(TINY)) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["generate", model, "--dtype", "float32", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return generate


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ScriptedSession]:
    """Puts a session in place that answers as told."""

    def put(*answers: list[str], **options: Any) -> ScriptedSession:
        session = ScriptedSession(*answers, **options)
        monkeypatch.setattr(model_options, "open_model", lambda *args, **more: session)
        return session

    return put


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, str]]:
    """rows.jsonl with five questions."""
    found = [
        {"question": f"Set up {event} on Monday with Paul."} for event in ("a call", "lunch", "tea", "a review", "judo")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return found


def expected(prompt_ids: list[int], max_new_tokens: int, **sampling: Any) -> str:
    pieces = tiny_session().stream(prompt_ids, max_new_tokens=max_new_tokens, sampling=Sampling(**sampling))
    return "".join(pieces)


def test_a_question_is_answered_on_stdout_alone(run: Run) -> None:
    answer = expected(tiny_session().chat_ids([Turn("user", QUESTION)]), 30)
    assert run("--prompt", QUESTION, "--max-tokens", "30") == (0, answer + "\n", BASE_NOTE)


def test_plain_text_is_continued(run: Run) -> None:
    text = expected(tiny_session().completion_ids("I want"), 5)
    assert run("--prompt", "I want", "--raw", "--max-tokens", "5") == (
        0, text + "\n", BASE_NOTE + "note: cut at --max-tokens 5\n",
    )  # fmt: skip


def test_the_same_seed_gives_the_same_text(run: Run) -> None:
    drawn = ["--prompt", QUESTION, "--max-tokens", "8", "--temperature", "3"]
    first, again, other = (run(*drawn, "--seed", seed)[1] for seed in ("1", "1", "2"))
    assert first == again != other


def test_stop_texts_end_the_answer(run: Run) -> None:
    answer = expected(tiny_session().chat_ids([Turn("user", QUESTION)]), 30)
    head, stop, _ = answer.partition(" review")
    assert stop
    assert run("--prompt", QUESTION, "--stop", "never", "--stop", stop) == (0, head + "\n", BASE_NOTE)


def test_a_prompt_from_stdin_and_a_system_text(
    run: Run, scripted: Callable[..., ScriptedSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = scripted(["fine"])
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert run("--prompt", "-", "--system", "Be brief.") == (0, "fine\n", "")
    assert session.asked == [[Turn("system", "Be brief."), Turn("user", "two\nlines")]]
    answer = expected(tiny_session().chat_ids([Turn("user", QUESTION)]), 30)
    stop = answer[4:6]
    monkeypatch.undo()
    assert (
        main(["generate", str(TINY), "--dtype", "float32", "--prompt", QUESTION, "--stop", "never", "--stop", stop])
        == 0
    )


@pytest.mark.parametrize(("terminal", "shown"), [(True, "ared\nb\n"), (False, "a\x1b[31mred\x1b[0m\nb\n")])
def test_escape_codes_never_reach_a_terminal(
    terminal: bool,
    shown: str,
    run: Run,
    scripted: Callable[..., ScriptedSession],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file or a pipe gets the text as it is."""
    scripted(["a\x1b", "[31mred\x1b[0m", "\nb"])
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    assert run("--prompt", "x") == (0, shown, "")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "nothing to answer: give --prompt TEXT, or --input ROWS with --output FILE"),
        (["--prompt", "x", "--input", "rows.jsonl"],
         "--prompt and --input: one is answered on stdout, the other in --output; give one"),
        (["--input", "rows.jsonl"], "--input: needs --output FILE for the answers"),
        (["--prompt", "x", "--output", "o"], "--output: goes with --input; the answer to --prompt goes to stdout"),
        (["--prompt", "x", "--overwrite"], "--overwrite: goes with --input; the answer to --prompt goes to stdout"),
        (["--prompt", "x", "--batch-size", "2"],
         "--batch-size: goes with --input; the answer to --prompt goes to stdout"),
        (["--prompt", "x", "--stop", "a", "--stop", ""], "--stop: is empty; give a text, or leave it out"),
        (["--prompt", "x", "--system", " "], "--system: is empty; give a text, or leave it out"),
        (["--prompt", "x", "--raw", "--system", "y"],
         "--system and --raw: plain text has no system turn; give one of them"),
        (["--prompt", "x", "--temperature", "-1"], "temperature: expected 0 to 100, got -1.0"),
        (["--prompt", " "], "--prompt: is empty; ask something"),
        (["--prompt", "\udc80"],
         "--prompt: holds half a surrogate pair at character 1; the text was cut inside a character"),
        (["--input", "none.jsonl", "--output", "o.jsonl"], "none.jsonl: no such file; did you mean 'rows.jsonl'?"),
        (["--input", "rows.jsonl", "--output", "o.jsonl", "--column", "question"],
         "--column question: expected KEY=TEMPLATE, such as prompt='{question}'"),
        (["--input", "rows.jsonl", "--output", "o.jsonl", "--column", "text={body}"],
         "\n".join(f"rows.jsonl:{n}: no field 'body'; the row has question" for n in range(1, 6))),
        (["--input", "rows.jsonl", "--output", "o.jsonl", "--column", "say={body}"],
         "--column: unknown key 'say'; use prompt, completion, system, messages, text, chosen, rejected, "
         "weight, label, margin"),
        (["--input", "rows.jsonl", "--output", "o.jsonl", "--format", "chatml"],
         "--format: unknown format 'chatml'; use auto, messages, sharegpt, alpaca, prompt_completion, text, "
         "preference"),
        (["--input", "rows.jsonl", "--output", "rows.jsonl"],
         "rows.jsonl: is the file that is read; name another --output"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("rows")
def test_misuse_is_one_line_before_anything_is_loaded(
    arguments: list[str], line: str, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(model_options, "open_model", lambda *args, **options: pytest.fail("a model was loaded"))
    assert run(*arguments) == (2, "", line + "\n")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_models_that_are_not_there(run: Run, tmp_path: Path) -> None:
    missing = "./nowhere: no such folder; name a folder with a model, or a hub id (owner/name)\n"
    assert run("--prompt", "x", model="./nowhere") == (2, "", missing)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x"}\n')
    files = ["--input", "rows.jsonl", "--output", "o.jsonl"]
    assert run(*files, model="./nowhere") == (2, "", missing)


def test_too_long_a_prompt_is_told(run: Run) -> None:
    limit = tiny_session().engine.max_seq_len
    code, out, err = run("--prompt", QUESTION, "--max-tokens", str(limit))
    tokens = len(tiny_session().chat_ids([Turn("user", QUESTION)]))
    assert (code, out) == (2, "")
    assert err == BASE_NOTE + (
        f"prompt of {tokens} tokens + {limit} new tokens > {limit}, the longest sequence of this model; "
        "shorten the prompt or ask for fewer tokens\n"
    )


def test_no_memory_left_says_what_to_do(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(model_options, "open_model", out_of_memory)
    assert run("--prompt", "x") == (
        2, "", "out of GPU memory; lower --batch-size or --max-tokens, or give --quantize nf4\n",
    )  # fmt: skip


FILES = ["--input", "rows.jsonl", "--output", "out.jsonl", "--max-tokens", "4"]


def test_a_file_of_rows(run: Run, rows: list[dict[str, str]]) -> None:
    code, out, err = run(*FILES)
    assert (code, out) == (0, "")
    lines = err.splitlines(keepends=True)
    assert lines[0] == BASE_NOTE
    assert [line.split(" answers")[0] for line in lines[1:-1]] == [f"  {n}/5" for n in range(1, 6)]
    assert lines[-1] == "out.jsonl: 5 answers\n"
    answers = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [answer["question"] for answer in answers] == [row["question"] for row in rows]
    assert run(*FILES) == (0, "", "out.jsonl: all 5 rows are answered; nothing to do\n")


@pytest.mark.usefixtures("rows")
def test_ctrl_c_then_the_same_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run(*FILES, "--temperature", "2")
    whole = Path("out.jsonl").read_bytes()
    advance, answered = progress._Job.advance, []

    def interrupt(job: progress._Job, count: int = 1, /, **figures: float | None) -> None:
        advance(job, count, **figures)
        answered.append(count)
        if len(answered) == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(progress._Job, "advance", interrupt)
        code, out, err = run(*FILES, "--temperature", "2", "--overwrite")
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == (
        "out.jsonl: stopped with 2 of 5 answers; the same command goes on from there, without --overwrite"
    )
    code, _, err = run(*FILES, "--temperature", "2")
    assert code == 0
    assert err.splitlines()[1] == "out.jsonl: going on after 2 of 5 answers"
    assert Path("out.jsonl").read_bytes() == whole


def test_options_that_change_nothing_are_told(run: Run, scripted: Callable[..., ScriptedSession]) -> None:
    scripted(["fine"], ["fine"], ["fine"])
    note = "note: --top-p and --seed change nothing at temperature 0\n"
    assert run("--prompt", "x", "--top-p", "0.9", "--seed", "0") == (0, "fine\n", note)
    assert run("--prompt", "x", "--min-p", "0.1") == (0, "fine\n", "note: --min-p changes nothing at temperature 0\n")
    assert run("--prompt", "x", "--min-p", "0.1", "--temperature", "1") == (0, "fine\n", "")


@pytest.mark.usefixtures("rows")
def test_spelled_out_options_are_the_same_work(run: Run) -> None:
    assert run(*FILES)[0] == 0
    assert run(*FILES, "--quantize", "none") == (0, "", "out.jsonl: all 5 rows are answered; nothing to do\n")


def test_closed_standard_streams(
    run: Run, scripted: Callable[..., ScriptedSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(["fine"])
    monkeypatch.setattr("sys.stdin", None)
    assert run("--prompt", "-") == (2, "", "--prompt: is empty; ask something\n")
    monkeypatch.setattr("sys.stdout", None)
    assert run("--prompt", "x") == (0, "", "")
