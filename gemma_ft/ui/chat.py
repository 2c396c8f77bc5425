"""A conversation in a terminal, or line by line from a script: questions in, answers as they are made."""

from __future__ import annotations

import contextlib
import difflib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

from gemma_ft.data.conversation import Turn, text_fault
from gemma_ft.errors import UserError
from gemma_ft.infer.base_model import BaseModelSession
from gemma_ft.infer.prompts import system_turns
from gemma_ft.infer.sampling import Sampling
from gemma_ft.infer.session import Session
from gemma_ft.system.escape import EscapeStripper
from gemma_ft.ui.compare import NAMES, SideBySide, Stacked

COMMANDS = {
    "/help": "this list",
    "/reset": "forget the conversation; the system text stays",
    "/system [TEXT]": "set the system text; without TEXT: none",
    "/compare": "let the base answer as well, or stop that; both are given the same conversation",
    "/exit": "leave, as Ctrl-D does",
    "//TEXT": "ask something that begins with a slash",
}
VERBS = [usage.split()[0] for usage in COMMANDS if not usage.startswith("//")]
CONTINUED = "\\"  # at the end of a line: the question goes on in the next


@dataclass
class Screen:
    """Where a conversation takes place. `read` gives the next question (EOFError: there is none, KeyboardInterrupt:
    Ctrl-C), `write` takes the model's text, `say` takes lines to the user, `view` makes the place of a comparison.
    """

    read: Callable[[], str]
    write: Callable[[str], None]
    say: Callable[[str], None]
    view: Callable[[], Stacked | SideBySide]
    lasting: bool = True  # a user reads what went wrong and goes on; a script ends there


class Repl:
    """One user, one model, one conversation. The model's text is shown without anything that controls a terminal."""

    def __init__(
        self,
        session: Session,
        screen: Screen,
        *,
        max_new_tokens: int,
        sampling: Sampling,
        stop: tuple[str, ...] = (),
        system: str | None = None,
        compare: bool = False,
        quantize: str | None = None,
        around_turn: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """`quantize`: as `load_model`, for a base that has to be loaded to be compared with. `around_turn`: entered for
        each turn, to make of a fault that a user can help (no GPU memory left) the UserError that says so.

        Raises: UserError when the model takes no system text, or has no base.
        """
        self.session, self.screen = session, screen
        self.max_new_tokens, self.sampling, self.stop = max_new_tokens, sampling, stop
        self.system = system_turns(session.encoder, system)
        self.turns: list[Turn] = []
        self._quantize, self._around_turn = quantize, around_turn
        self._base: BaseModelSession | None = None
        self.comparing = False
        if compare:
            self._switch_compare()

    def run(self) -> int:
        """Take turns until the user leaves; the exit code 0.

        Ctrl-C stops an answer, and a second one before it has stopped leaves; so do two at the prompt. In a script the
        first ends everything.
        Raises: KeyboardInterrupt and UserError when the screen is a script's.
        """
        warned = False
        while True:
            try:
                line = self.screen.read()
            except EOFError:
                return self._leave()
            except KeyboardInterrupt:
                if not self.screen.lasting:
                    raise
                if warned:
                    return self._leave()
                self.screen.say("\nCtrl-C once more, Ctrl-D or /exit leaves")
                warned = True
                continue
            warned = False
            try:
                with self._around_turn():
                    stays = self._took(line)
                if not stays:
                    return 0
            except KeyboardInterrupt:
                if not self.screen.lasting:
                    raise
                return 0
            except UserError as error:
                if not self.screen.lasting:
                    raise
                self.screen.say(str(error))

    def _leave(self) -> int:
        if self.screen.lasting:
            self.screen.say("")  # the prompt's line is open
        return 0

    def _took(self, line: str) -> bool:
        """Does what a line asks; False when it was to leave."""
        text = line.strip()
        if text.startswith("/") and not text.startswith("//"):
            return self._command(text)
        if text:
            self._ask(text.removeprefix("/") if text.startswith("//") else text)
        return True

    def _command(self, text: str) -> bool:
        verb, *rest = text.split(maxsplit=1)
        if verb not in VERBS:
            near = difflib.get_close_matches(verb, VERBS, n=1)
            hint = f"did you mean {near[0]}?" if near else "/help lists them, // asks a text that begins with a slash"
            raise UserError(f"{verb}: no such command; {hint}")
        if verb == "/help":
            width = max(map(len, COMMANDS))
            self.screen.say("\n".join(f"  {usage:<{width}}  {what}" for usage, what in COMMANDS.items()))
        elif verb == "/reset":
            self.turns = []
            self.screen.say("the conversation begins anew")
        elif verb == "/system":
            self.system = system_turns(self.session.encoder, "".join(rest))
            self.screen.say("the system text is set" if self.system else "there is no system text")
        elif verb == "/compare":
            self._switch_compare()
            self.screen.say("the base answers as well" if self.comparing else "only the tuned model answers")
        return verb != "/exit"

    def _switch_compare(self) -> None:
        if self._base is None:
            self._base = BaseModelSession(self.session, quantize=self._quantize)
        self.comparing = not self.comparing

    def _ask(self, text: str) -> None:
        """One question, answered and kept; a question without any answer is forgotten."""
        if fault := text_fault(text):
            raise UserError(f"the question {fault}")
        asked = [*self.turns, Turn("user", text)]
        ids = self.session.chat_ids([*self.system, *asked])
        room = self.session.engine.max_seq_len - len(ids)
        if room < 1:
            raise UserError(
                f"the conversation has {len(ids):,} tokens with this question, and the model reads "
                f"{self.session.engine.max_seq_len:,}; /reset begins a new one"
            )
        base = self._base if self.comparing else None
        if base is not None:
            self._load(base)
        with _first_interrupt_noted() as interrupted:
            if base is not None:
                said = self._compared(base, ids, room, interrupted)
            else:
                said, note = self._answer(self.session, ids, room, self.screen.write, interrupted)
                self.screen.write("\n")
                if note:
                    self.screen.say(note)
        if interrupted() and not self.screen.lasting:
            raise KeyboardInterrupt
        if said or not interrupted():
            self.turns = [*asked, Turn("assistant", said)]

    def _load(self, base: BaseModelSession) -> None:
        """Have the base in memory, or refused, before anything is shown."""
        if base.unloaded:
            self.screen.say(f"loading {base.unloaded}")
        with base.session():
            pass

    def _compared(self, base: BaseModelSession, ids: list[int], room: int, interrupted: Callable[[], bool]) -> str:
        """Both answers in the view; the tuned model's, empty when it was not reached before an interrupt."""
        said = {}
        with self.screen.view() as view:
            for name in NAMES:
                if interrupted():
                    break
                with contextlib.ExitStack() as stack:
                    session = stack.enter_context(base.session()) if name == NAMES[0] else self.session
                    said[name], note = self._answer(session, ids, room, view.answer(name), interrupted)
                view.ended(note)
        return said.get(NAMES[1], "")

    def _answer(
        self,
        session: Session,
        ids: list[int],
        room: int,
        write: Callable[[str], None],
        interrupted: Callable[[], bool],
    ) -> tuple[str, str]:
        """(answer, note): as much as was said before an interrupt; the note says why it is not complete."""
        shown = EscapeStripper()
        said: list[str] = []
        budget = min(self.max_new_tokens, room)
        pieces = session.stream(ids, max_new_tokens=budget, sampling=self.sampling, stop=self.stop)
        with contextlib.closing(pieces):
            while not interrupted():
                try:
                    piece = next(pieces)
                except StopIteration as end:
                    return "".join(said), self._cut(budget) if end.value == "length" else ""
                said.append(piece)
                write(shown.feed(piece))
        return "".join(said), "(stopped)"

    def _cut(self, budget: int) -> str:
        if budget < self.max_new_tokens:
            return f"(cut: the model's {self.session.engine.max_seq_len:,} tokens are full; /reset begins a new one)"
        return f"(cut at --max-tokens {budget})"


@contextlib.contextmanager
def _first_interrupt_noted() -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C makes the given function true, so that no step of the engine is torn; the second is a
    KeyboardInterrupt.
    """
    noted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)


def terminal_reader(ask: Callable[[str], str]) -> Callable[[], str]:
    """Reads questions with `ask` (which shows a prompt, as `input` does); a line that ends in a backslash goes on."""

    def read() -> str:
        lines = [ask("> ")]
        while lines[-1].endswith(CONTINUED):
            lines[-1] = lines[-1].removesuffix(CONTINUED)
            lines.append(ask("... "))
        return "\n".join(lines)

    return read
