"""A conversation: what is asked, what is shown and kept, how it is stopped and left."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from gemma_ft.build.contract import contract_of
from gemma_ft.build.place import Place
from gemma_ft.build.weights import WeightFiles
from gemma_ft.data.conversation import Turn
from gemma_ft.errors import UserError
from gemma_ft.infer.base_model import BaseModelSession
from gemma_ft.infer.sampling import Sampling
from gemma_ft.infer.session import Session, open_session
from gemma_ft.ui.chat import Repl, Screen, terminal_reader
from gemma_ft.ui.compare import SideBySide, Stacked, compare_view
from tests.infer.tiny_session import TINY, ScriptedSession, save_loud_adapter, tiny_session

CTRL_C, CTRL_D = KeyboardInterrupt, EOFError
HINT = "Ctrl-C once more, Ctrl-D or /exit leaves"
Key = str | type[BaseException]


class Desk:
    """A user whose keys are known beforehand; everything that is shown is kept."""

    def __init__(self, *keys: Key, lasting: bool = True) -> None:
        self.keys = list(keys)
        self.written = ""
        self.said: list[str] = []
        self.screen = Screen(self.read, self.write, self.said.append, lambda: Stacked(self.write), lasting)

    def read(self) -> str:
        key = self.keys.pop(0) if self.keys else CTRL_D
        if isinstance(key, str):
            return key
        raise key

    def write(self, text: str) -> None:
        self.written += text


def talk(session: Any, desk: Desk, **options: Any) -> Repl:
    """The conversation after it was left with exit code 0."""
    repl = Repl(session, desk.screen, **{"max_new_tokens": 50, "sampling": Sampling(), **options})
    assert repl.run() == 0
    return repl


def contents(turns: Sequence[Turn]) -> list[str]:
    return [f"{turn.role}: {turn.content}" for turn in turns]


def test_the_history_is_asked_again_with_each_question() -> None:
    session, desk = ScriptedSession(["Hi", " you."], ["Blue."]), Desk("hello", "  ", "which colour?")
    talk(session, desk)
    assert desk.written == "Hi you.\nBlue.\n"
    assert [contents(asked) for asked in session.asked] == [
        ["user: hello"],
        ["user: hello", "assistant: Hi you.", "user: which colour?"],
    ]
    assert session.closed == 2


def test_escape_sequences_are_stripped_across_pieces_and_kept_in_the_history() -> None:
    session, desk = ScriptedSession(["a\x1b", "[3", "1mb\x1b]0;ti", "tle\x07c\r"]), Desk("x")
    repl = talk(session, desk)
    assert desk.written == "abc\n"
    assert repl.turns[-1].content == "a\x1b[31mb\x1b]0;title\x07c\r"


def test_reset_system_and_slashes() -> None:
    session = ScriptedSession(["1"], ["2"], ["3"], ["4"])
    desk = Desk(
        "a", "/reset", "/system Be\tbrief. ", "b", "//etc is?", "/system", "/reset", "/help", "c", "/exit", "never read"
    )
    talk(session, desk)
    assert [contents(asked) for asked in session.asked] == [
        ["user: a"],
        ["system: Be\tbrief.", "user: b"],
        ["system: Be\tbrief.", "user: b", "assistant: 2", "user: /etc is?"],
        ["user: c"],
    ]
    anew = "the conversation begins anew"
    assert desk.said[:4] == [anew, "the system text is set", "there is no system text", anew]
    assert desk.said[4].splitlines()[1] == "  /reset          forget the conversation; the system text stays"
    assert desk.keys == ["never read"]


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("/rest", "/rest: no such command; did you mean /reset?"),
        ("/usr/bin is what?",
         "/usr/bin: no such command; /help lists them, // asks a text that begins with a slash"),
        ("/compare",
         "scripted: no base to compare with; name an adapter, or a model whose gemma_ft.json names its base"),
        ("nul \x00", "the question holds a NUL character; is the file damaged, or not UTF-8?"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line(typed: str, line: str) -> None:
    """A user goes on; a script ends there."""
    session, desk = ScriptedSession(["fine"]), Desk(typed, "go on")
    talk(session, desk)
    assert desk.said == [line, ""]
    assert desk.written == "fine\n"
    script = Desk(typed, "go on", lasting=False)
    with pytest.raises(UserError) as caught:
        Repl(ScriptedSession(), script.screen, max_new_tokens=5, sampling=Sampling()).run()
    assert str(caught.value) == line


def test_a_system_text_is_refused_where_it_was_not_trained() -> None:
    session = ScriptedSession()
    session.encoder = SimpleNamespace(system_policy="drop")
    line = "this model was trained to leave out system texts; put the text into the question"
    with pytest.raises(UserError) as caught:
        talk(session, Desk(), system="Be brief.")
    assert str(caught.value) == line
    desk = Desk("/system Be brief.")
    talk(session, desk)
    assert desk.said == [line, ""]


def interrupting(pieces: Sequence[str], after: int) -> Any:
    """Pieces, with a real Ctrl-C when so many have been shown."""
    for number, piece in enumerate(pieces):
        if number == after:
            signal.raise_signal(signal.SIGINT)
        yield piece


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said() -> None:
    session, desk = ScriptedSession(interrupting(["one", " two", " three"], 1), ["fine"]), Desk("count", "and?")
    before = signal.getsignal(signal.SIGINT)
    repl = talk(session, desk)
    assert desk.written == "one two\nfine\n"
    assert desk.said == ["(stopped)", ""]
    assert contents(repl.turns) == ["user: count", "assistant: one two", "user: and?", "assistant: fine"]
    assert session.closed == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_question_without_any_answer_is_forgotten() -> None:
    session, desk = ScriptedSession(interrupting(["", "never"], 0), ["fine"]), Desk("count", "again")
    assert contents(talk(session, desk).turns) == ["user: again", "assistant: fine"]


def test_an_empty_answer_is_an_answer() -> None:
    assert contents(talk(ScriptedSession([]), Desk("x")).turns) == ["user: x", "assistant: "]


def test_a_second_ctrl_c_during_an_answer_leaves() -> None:
    def twice() -> Any:
        yield "a"
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    session, desk = ScriptedSession(twice()), Desk("x", "never read")
    talk(session, desk)
    assert desk.keys == ["never read"]
    assert session.closed == 1


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ([CTRL_D, "never read"], [""]),
        ([CTRL_C, CTRL_C, "never read"], ["\n" + HINT, ""]),
        ([CTRL_C, "x", CTRL_C, CTRL_C, "never read"], ["\n" + HINT, "\n" + HINT, ""]),
    ],
    ids=["ctrl-d", "ctrl-c twice", "not in a row"],
)
def test_how_it_is_left(keys: list[Key], said: list[str]) -> None:
    session, desk = ScriptedSession(["fine"]), Desk(*keys)
    talk(session, desk)
    assert (desk.said, desk.keys) == (said, ["never read"])


def test_ctrl_c_ends_a_script() -> None:
    script = Desk("x", "never read", lasting=False)
    session = ScriptedSession(interrupting(["a", "b", "c"], 1))
    with pytest.raises(KeyboardInterrupt):
        Repl(session, script.screen, max_new_tokens=5, sampling=Sampling()).run()  # type: ignore[arg-type]
    assert script.keys == ["never read"]


def test_a_full_context_is_told_and_nothing_is_cut_silently() -> None:
    session = ScriptedSession(["four words are these"], ["short"], ["one"], finish="length", max_seq_len=12)
    desk = Desk("one two three", "four five six seven eight nine", "four", "/reset", "one")
    talk(session, desk, max_new_tokens=7)
    assert session.budgets == [7, 4, 7]
    assert desk.said[0] == "(cut at --max-tokens 7)"
    assert desk.said[1] == (
        "the conversation has 13 tokens with this question, and the model reads 12; /reset begins a new one"
    )
    assert desk.said[2] == "(cut: the model's 12 tokens are full; /reset begins a new one)"
    assert contents(session.asked[2]) == ["user: one two three", "assistant: four words are these", "user: four"]


def test_a_line_that_ends_in_a_backslash_goes_on() -> None:
    lines, prompts = ["one \\", "two\\", "three", "alone"], []

    def ask(prompt: str) -> str:
        prompts.append(prompt)
        return lines.pop(0)

    read = terminal_reader(ask)
    assert [read(), read()] == ["one \ntwo\nthree", "alone"]
    assert prompts == ["> ", "... ", "... ", "> "]


def alone(session: Session, ids: Sequence[int]) -> str:
    with closing(session.stream(ids, max_new_tokens=12)) as pieces:
        return "".join(pieces)


def test_compared_with_the_adapter_off(tmp_path: Path) -> None:
    """The base's answer is that of the base alone, the tuned one's that of the adapter, in one model in memory."""
    session = open_session(save_loud_adapter(tmp_path / "adapter"), dtype=torch.float32)
    ids = session.chat_ids([Turn("user", "Set up a review on Monday.")])
    base, tuned = alone(tiny_session(), ids), alone(session, ids)
    assert base != tuned
    desk = Desk(
        "Set up a review on Monday.", "/compare", "/reset", "/compare", "/compare", "Set up a review on Monday."
    )
    repl = talk(session, desk, max_new_tokens=12, compare=True)
    cut = "(cut at --max-tokens 12)"
    assert desk.written == f"base:\n{base} {cut}\ntuned:\n{tuned} {cut}\n{tuned}\n"
    only, both = "only the tuned model answers", "the base answers as well"
    assert desk.said == [only, "the conversation begins anew", both, only, cut, ""]
    assert contents(repl.turns) == ["user: Set up a review on Monday.", f"assistant: {tuned}"]
    assert alone(session, ids) == tuned


@pytest.fixture
def merged() -> Session:
    """A session of the tiny Gemma with other weights, whose contract names the tiny Gemma as its base."""
    session = open_session(TINY, dtype=torch.float32)
    with torch.no_grad():
        session.model.model.norm.weight.add_(torch.randn(session.model.model.norm.weight.shape).sign() * 3)
    contract = contract_of(session.encoder, base=str(TINY), base_sha256=WeightFiles.open(TINY).fingerprint())
    return replace(session, place=Place(session.place.base, None, TINY, contract))


def test_compared_with_a_base_that_is_loaded_once(merged: Session) -> None:
    ids = merged.chat_ids([Turn("user", "Set up a review on Monday.")])
    base, tuned = alone(tiny_session(), ids), alone(merged, ids)
    desk = Desk("Set up a review on Monday.", "/reset", "Set up a review on Monday.")
    talk(merged, desk, max_new_tokens=12, compare=True)
    assert base != tuned
    assert desk.written.count(f"base:\n{base}") == desk.written.count(f"tuned:\n{tuned}") == 2
    assert [line for line in desk.said if "loading" in line] == [f"loading {TINY}"]
    loaded = BaseModelSession(merged)
    with loaded.session() as first, loaded.session() as second:
        assert first is second


def test_another_base_is_refused(merged: Session) -> None:
    contract = replace(merged.place.contract, base_sha256="0" * 64)  # type: ignore[type-var]
    other = replace(merged, place=replace(merged.place, contract=contract))
    desk = Desk("Set up a review on Monday.")
    talk(other, desk, compare=True)
    assert desk.said[1] == f"{TINY}: is not the base that {TINY} was tuned from any more (gemma_ft.json)"
    assert desk.written == ""


def test_an_interrupt_stops_both_answers(tmp_path: Path) -> None:
    session, desk = open_session(save_loud_adapter(tmp_path / "adapter"), dtype=torch.float32), Desk("Who?")
    write = desk.write

    def interrupt(text: str) -> None:
        write(text)
        if len(desk.written.split()) == 2:  # the name, and the first word
            signal.raise_signal(signal.SIGINT)

    desk.screen.view = lambda: Stacked(interrupt)
    repl = talk(session, desk, max_new_tokens=12, compare=True)
    name, word, note = desk.written.split()
    assert (name, word != "", note) == ("base:", True, "(stopped)")
    assert repl.turns == []


def console(width: int, *, terminal: bool = True) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, height=20, color_system=None)


def test_columns_need_a_wide_terminal() -> None:
    made: Callable[[Console], object] = lambda one: type(compare_view(one, print))  # noqa: E731
    assert [made(console(80)), made(console(79)), made(console(120, terminal=False))] == [SideBySide, Stacked, Stacked]


def test_two_columns() -> None:
    """Text of a model is no markup, and long words are folded, not cut."""
    place = console(80)
    with SideBySide(place) as view:
        write = view.answer("base")
        write("[bold]left")
        view.ended("(cut at --max-tokens 2)")
        write = view.answer("tuned")
        write("right" * 10)
        view.ended("")
    last = place.file.getvalue().rpartition("\x1b")[0].rpartition("base")[2].splitlines()  # type: ignore[attr-defined]
    rows = [[cell.strip() for cell in line.split("│")] for line in last[2:4]]
    assert rows == [["[bold]left (cut at --max-tokens 2)", ("right" * 10)[:37]], ["", ("right" * 10)[37:]]]
