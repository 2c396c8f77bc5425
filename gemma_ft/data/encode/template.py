"""Chat templates as text: whose they are, and what other engines can read of them."""

import re
from typing import Any

from gemma_ft.errors import UserError
from gemma_ft.families.chat_template import ChatTemplate, SystemPolicy
from gemma_ft.families.records import CHATS

GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


def chat_of(tokenizer: Any) -> ChatTemplate:
    """How chats are written for a transformers tokenizer: as by the family whose tokens it has, most of several.

    Raises: UserError naming the tokens that it lacks of the nearest family's.
    """
    known = tokenizer.backend_tokenizer.token_to_id
    wanted = [(*chat.control_tokens, *chat.marks) for chat in CHATS]
    lacking = [[name for name in names if known(name) is None] for names in wanted]
    whole = [place for place, missing in enumerate(lacking) if not missing]
    if not whole:
        missing = min(lacking, key=len)
        raise UserError(f"{tokenizer.name_or_path}: not a Gemma tokenizer: it has no token {', '.join(missing)}")
    return CHATS[max(whole, key=lambda place: len(wanted[place]))]


def policy_of(template: str) -> tuple[ChatTemplate, SystemPolicy] | None:
    """The family's template, and its system policy, that a text is, marked or not; None for any other text."""
    known = ((chat, policy, marked) for chat in CHATS for policy in chat.systems for marked in (True, False))
    return next(((chat, one) for chat, one, marked in known if template == chat.text(one, marked=marked)), None)


def unmarked(template: str) -> str:
    """A template of the same text without `{% generation %}`, a tag that only transformers knows: other engines' Jinja
    (llama-cpp-python's, TGI's) refuses it.
    """
    found = policy_of(template)
    if found is not None:
        chat, policy = found
        return chat.text(policy, marked=False)
    return GENERATION_TAG.sub(
        lambda tag: "{%" + tag[1] + (" endif " if tag[2] else " if true ") + tag[3] + "%}", template
    )
