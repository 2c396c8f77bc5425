"""How a chat is written for a model: what begins and ends a turn, what its speakers are called, what becomes of a
system text. Gemma's own turns are what training writes; a folder tuned elsewhere may have another (own_template.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gemma_ft.data.encode.template import (  # fmt: skip
    AFTER_ROLE,
    AFTER_SYSTEM,
    AFTER_TURN,
    END_OF_TURN,
    ROLE_NAMES,
    START_OF_TURN,
    SystemPolicy,
    chat_template,
)

# What becomes of a system text: a turn of its own, or one of the policies that training knows.
System = Literal["turn", "fold", "error", "drop"]
EVERY_ROLE = frozenset(("system", "user", "assistant"))


@dataclass(frozen=True)
class ChatFormat:
    """A turn is `start`, the speaker's name, `end_of_role` (where there is one), `after_role`, the text, `end`,
    `after_turn`; `start`, `end` and `end_of_role` are control tokens, the rest is text.

    roles: the speakers' names (system only where it has a turn). stripped: the speakers whose texts lose their outer
    white space. bos: whether one BOS begins a chat. after_system: between a folded system text and the first question.
    default_system: the system turn of a chat that brings none. template: Jinja text that writes the same.
    """

    name: str
    start: str
    end: str
    roles: Mapping[str, str]
    after_role: str
    after_turn: str
    system: System
    template: str
    end_of_role: str | None = None
    after_system: str = AFTER_SYSTEM
    stripped: frozenset[str] = EVERY_ROLE
    bos: bool = True
    default_system: str | None = None

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """The control tokens that it is written with, BOS aside."""
        return tuple(name for name in (self.start, self.end, self.end_of_role) if name is not None)

    def head(self, role: str) -> str:
        """What stands before the text of a turn."""
        return self.start + self.roles[role] + (self.end_of_role or "") + self.after_role


def gemma_format(policy: SystemPolicy = "fold") -> ChatFormat:
    """Gemma's turns under a system policy: what gemma-ft trains."""
    return ChatFormat(
        name="Gemma's turns",
        start=START_OF_TURN,
        end=END_OF_TURN,
        roles=ROLE_NAMES,
        after_role=AFTER_ROLE,
        after_turn=AFTER_TURN,
        system=policy,
        template=chat_template(policy),
    )
