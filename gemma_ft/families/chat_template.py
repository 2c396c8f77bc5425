"""How a family's chats are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from string import Template
from typing import Literal, get_args

SystemPolicy = Literal["fold", "error", "drop"]  # what becomes of a system text where there is no turn for it
SYSTEM_POLICIES: tuple[SystemPolicy, ...] = get_args(SystemPolicy)


@dataclass(frozen=True)
class ChatTemplate:
    """How a family's chats are written. A turn is `start_of_turn`, the speaker's name, `after_role`, the text,
    `end_of_turn`, `after_turn`; one BOS begins a chat. Tokens are named here: their ids are the tokenizer's.

    systems: the Jinja text for a system turn under each policy that there is. after_system: between a folded system
    text and the first question. between_parts, stripped_parts: how a content that is a list of text parts is one text.
    marks: further tokens by which a tokenizer is known to be of this kind. jinja: the whole, with the names below and
    those of `text` after a dollar sign.
    """

    name: str  # whose it is: "Gemma's"
    jinja: str
    systems: Mapping[SystemPolicy, str]
    pad: str = "<pad>"
    eos: str = "<eos>"
    bos: str = "<bos>"
    start_of_turn: str = "<start_of_turn>"
    end_of_turn: str = "<end_of_turn>"
    user: str = "user"
    model: str = "model"  # Gemma's name for the assistant
    after_role: str = "\n"
    after_turn: str = "\n"
    after_system: str = "\n\n"
    between_parts: str = "\n"
    stripped_parts: bool = False
    marks: tuple[str, ...] = ()

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """The tokens that no text may become."""
        return (self.pad, self.eos, self.bos, self.start_of_turn, self.end_of_turn)

    def joined(self, parts: Sequence[str]) -> str:
        """The one text that a list of text parts is."""
        return self.between_parts.join(part.strip() if self.stripped_parts else part for part in parts)

    def text(self, policy: SystemPolicy = "fold", *, marked: bool = True) -> str:
        """Jinja text with which `apply_chat_template` gives ChatEncoder's ids, for text that spells no control token.

        `marked`: what is trained of an answer stands in `{% generation %}`, as `return_assistant_tokens_mask` asks for;
        the text is the same. Source: transformers utils/chat_template_utils.py (AssistantTracker).
        """
        end = f"{{{{ content + '{self.end_of_turn}' }}}}"
        content = (
            f"' }}}}{{% if message['role'] == 'user' %}}{end}"
            f"{{% else %}}{{% generation %}}{end}{{% endgeneration %}}{{% endif %}}{{{{ '"
            if marked
            else f"' + content + '{self.end_of_turn}"
        )
        # A backslash and an n inside a Jinja string literal: the template stays on one line.
        names = {name: value.replace("\n", "\\n") for name, value in vars(self).items() if isinstance(value, str)}
        return Template(self.jinja).substitute(names, system=self.systems[policy], content=content)


# Source: the chat_template of google/gemma-2-2b-it, whose only policy is "error".
TURNS = ChatTemplate(
    name="Gemma's",
    jinja="{{ bos_token }}{% set system = '' %}{% set turns = messages %}"
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}$system{% endif %}"
    "{% for message in turns %}"
    "{% if message['role'] not in ['user', 'assistant', '$model'] "
    "or (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must alternate') }}{% endif %}"
    "{% set content = message['content'] | trim %}"
    "{% if loop.first and system %}{% set content = system + '$after_system' + content %}{% endif %}"
    "{{ '$start_of_turn' + ('$user' if message['role'] == 'user' else '$model') + '$after_role$content$after_turn' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '$start_of_turn$model$after_role' }}{% endif %}",
    systems={
        "fold": "{% set system = messages[0]['content'] | trim %}",
        "error": "{{ raise_exception('system turns are refused by this model') }}",
        "drop": "",
    },
)

# Contents may be lists, as everywhere for this family; an image becomes its token. Source: the chat_template of
# google/gemma-3-4b-it, which takes the first part alone of a system text that is a list.
_PARTS = (
    "{% set said = namespace(text='') %}"
    "{% if CONTENT is string %}{% set said.text = CONTENT | trim %}{% else %}"
    "{% for part in CONTENT %}"
    "{% if part['type'] == 'image' %}{% set said.text = said.text + '<start_of_image>' %}"
    "{% elif part['type'] == 'text' %}{% set said.text = said.text + (part['text'] | trim) %}{% endif %}"
    "{% endfor %}{% endif %}"
)
_TURN, _SYSTEM = (_PARTS.replace("CONTENT", f"{name}['content']") for name in ("message", "messages[0]"))
TURNS_OF_PARTS = replace(
    TURNS,
    jinja=TURNS.jinja.replace(
        "{% set content = message['content'] | trim %}", f"{_TURN}{{% set content = said.text %}}"
    ),
    systems={**TURNS.systems, "fold": f"{_SYSTEM}{{% set system = said.text %}}"},
    between_parts="",
    stripped_parts=True,
    marks=("<start_of_image>", "<end_of_image>"),
)
