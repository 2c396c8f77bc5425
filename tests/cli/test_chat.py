"""`gemma-ft chat`: a user at a terminal, and lines from a pipe."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from gemma_ft.cli import model_options
from gemma_ft.cli.app import main
from gemma_ft.data.conversation import Turn
from tests.infer.tiny_session import TINY, ScriptedSession, tiny_session

Talk = Callable[..., tuple[int, str, str]]


class Typed(io.StringIO):
    """Lines as a user types them."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def talk(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Talk:
    """`gemma-ft chat MODEL ...` with these lines on stdin: exit code, stdout, stderr."""

    def chat(
        stdin: io.TextIOBase | None, *arguments: str, session: ScriptedSession | None = None
    ) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", stdin)
        if session is not None:
            monkeypatch.setattr(model_options, "open_model", lambda *args: session)
        capsys.readouterr()
        code = main(["chat", str(TINY), "--dtype", "float32", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return chat


def test_lines_from_a_pipe_are_turns(talk: Talk) -> None:
    """The real model: the second answer is one to the whole conversation."""
    session = tiny_session()
    turns = [Turn("user", "Set up a budget review on Monday with Paul.")]
    first = "".join(session.stream(session.chat_ids(turns), max_new_tokens=8))
    turns += [Turn("assistant", first), Turn("user", "Now on Tuesday.")]
    second = "".join(session.stream(session.chat_ids(turns), max_new_tokens=8))
    lines = io.StringIO("Set up a budget review on Monday with Paul.\n\nNow on Tuesday.\n")
    note = f"note: {TINY}: a base model without a chat template; it was never tuned to answer\n"
    cut = "(cut at --max-tokens 8)\n"
    assert talk(lines, "--max-tokens", "8") == (0, f"{first}\n{second}\n", note + 2 * cut)


def test_a_script_ends_at_its_first_fault(talk: Talk) -> None:
    session = ScriptedSession(["fine"])
    assert talk(io.StringIO("a\n/rest\nb\n"), session=session) == (
        2, "fine\n", "/rest: no such command; did you mean /reset?\n",
    )  # fmt: skip


def test_a_user_at_a_terminal(talk: Talk) -> None:
    """A prompt, which never goes into a file; control sequences are stripped wherever stdout goes."""
    session = ScriptedSession(["\x1b[2Jfine"], ["again"])
    typed = Typed("hello\n/rest\nmore \\\nlines\n/exit\n")
    code, out, err = talk(typed, "--system", "Be brief.", session=session)
    assert (code, out) == (0, "fine\nagain\n")
    assert err == (
        f"{TINY}: ask something; /help lists the commands, Ctrl-D leaves\n"
        "> > /rest: no such command; did you mean /reset?\n> ... > "
    )
    assert session.asked[1] == [
        Turn("system", "Be brief."),
        Turn("user", "hello"),
        Turn("assistant", "\x1b[2Jfine"),
        Turn("user", "more \nlines"),
    ]


def test_leaving_with_ctrl_d(talk: Talk) -> None:
    code, out, err = talk(Typed(""), session=ScriptedSession())
    assert (code, out) == (0, "")
    assert err.endswith("Ctrl-D leaves\n> \n")


def test_nothing_to_compare_with_is_told_at_once(talk: Talk) -> None:
    assert talk(io.StringIO("x\n"), "--compare", session=ScriptedSession()) == (
        2, "", "scripted: no base to compare with; name an adapter, or a model whose gemma_ft.json names its base\n",
    )  # fmt: skip


def test_bad_options_are_told_before_a_model_is_loaded(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_options, "open_model", lambda *args: pytest.fail("a model was loaded"))
    assert talk(io.StringIO(""), "--top-p", "2") == (2, "", "top_p: expected 0 to 1, got 2.0\n")


def test_closed_and_unreadable_stdin(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    assert talk(None, session=ScriptedSession()) == (0, "", "")
    damaged = io.TextIOWrapper(io.BytesIO(b"a\xffb\n"), encoding="utf-8")
    assert talk(damaged, session=ScriptedSession()) == (
        2, "", "stdin is not utf-8: invalid start byte\n",
    )  # fmt: skip


def test_a_user_without_memory_goes_on_after_the_advice(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The question that was too much is forgotten, what was said before it is kept, and /reset can be given."""
    session = ScriptedSession(["one"], ["two"], ["three"])
    stream = session.stream

    def scarce(prompt_ids: Sequence[int], **options: Any) -> Iterator[str]:
        if len(session.asked) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return stream(prompt_ids, **options)

    monkeypatch.setattr(session, "stream", scarce)
    advice = "out of GPU memory; give --quantize nf4, a lower --max-tokens, or begin anew with /reset\n"
    code, out, err = talk(Typed("a\nb\nc\n/exit\n"), session=session)
    assert (code, out) == (0, "one\ntwo\n")
    assert err.count(advice) == 1
    assert [turn.content for turn in session.asked[2]] == ["a", "one", "c"]
    session.asked.clear()
    assert talk(io.StringIO("a\nb\nc\n"), session=session)[::2] == (2, advice)
