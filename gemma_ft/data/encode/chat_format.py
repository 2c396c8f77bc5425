"""How a chat is written for a model: what begins and ends a turn, what its speakers are called, what becomes of a
system text. Gemma's own turns are what training writes; a folder tuned elsewhere may have another (own_template.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gemma_ft.families.chat_template import ChatTemplate, SystemPolicy

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
    after_system: str = "\n\n"
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


def gemma_format(chat: ChatTemplate, policy: SystemPolicy = "fold") -> ChatFormat:
    """A family's own turns under a system policy: what gemma-ft trains."""
    return ChatFormat(
        name=f"{chat.name} turns",
        start=chat.start_of_turn,
        end=chat.end_of_turn,
        roles={"user": chat.user, "assistant": chat.model},
        after_role=chat.after_role,
        after_turn=chat.after_turn,
        after_system=chat.after_system,
        system=policy,
        template=chat.text(policy),
    )
