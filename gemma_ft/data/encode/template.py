"""Gemma's turns as text constants, stated once: the ids (chat.py) and the Jinja template are both made from these."""

import re
from typing import Literal, get_args

PAD, EOS, BOS = "<pad>", "<eos>", "<bos>"
START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"
CONTROL_TOKENS = (PAD, EOS, BOS, START_OF_TURN, END_OF_TURN)

ROLE_NAMES = {"user": "user", "assistant": "model"}  # Gemma calls the assistant "model"
AFTER_ROLE = "\n"
AFTER_TURN = "\n"
AFTER_SYSTEM = "\n\n"  # between a folded system text and the first question

SystemPolicy = Literal["fold", "error", "drop"]
SYSTEM_POLICIES: tuple[SystemPolicy, ...] = get_args(SystemPolicy)

SYSTEM_BRANCH: dict[str, str] = {
    "fold": "{% set system = messages[0]['content'] | trim %}",
    "error": "{{ raise_exception('system turns are refused by this model') }}",
    "drop": "",
}
GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


def chat_template(policy: SystemPolicy = "fold", *, marked: bool = True) -> str:
    """Jinja text with which `apply_chat_template` gives ChatEncoder's ids, for text that spells no control token.

    `marked`: what is trained of an answer stands in `{% generation %}`, as `return_assistant_tokens_mask` asks for; the
    text is the same. Source: the chat_template of google/gemma-2-2b-it, whose only policy is "error"; transformers
    utils/chat_template_utils.py (AssistantTracker).
    """
    user, model = ROLE_NAMES["user"], ROLE_NAMES["assistant"]
    # A backslash and an n inside a Jinja string literal: the template stays on one line.
    parts = (AFTER_ROLE, AFTER_TURN, AFTER_SYSTEM)
    after_role, after_turn, after_system = (part.replace("\n", "\\n") for part in parts)
    said = (
        "' }}{% if message['role'] == 'user' %}{{ content + '" + END_OF_TURN + "' }}"
        "{% else %}{% generation %}{{ content + '" + END_OF_TURN + "' }}{% endgeneration %}{% endif %}{{ '"
        if marked
        else "' + content + '" + END_OF_TURN
    )
    return (
        "{{ bos_token }}{% set system = '' %}{% set turns = messages %}"
        "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}" + SYSTEM_BRANCH[policy] + "{% endif %}"
        "{% for message in turns %}"
        "{% if message['role'] not in ['user', 'assistant', '" + model + "'] "
        "or (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('user and assistant must alternate') }}{% endif %}"
        "{% set content = message['content'] | trim %}"
        "{% if loop.first and system %}{% set content = system + '" + after_system + "' + content %}{% endif %}"
        "{{ '" + START_OF_TURN + "' + ('" + user + "' if message['role'] == 'user' else '" + model + "') "
        "+ '" + after_role + said + after_turn + "' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + START_OF_TURN + model + after_role + "' }}{% endif %}"
    )


def policy_of(template: str) -> SystemPolicy | None:
    """The system policy of a template that `chat_template` made, marked or not; None for any other text."""
    return next(
        (one for one in SYSTEM_POLICIES for marked in (True, False) if template == chat_template(one, marked=marked)),
        None,
    )


def unmarked(template: str) -> str:
    """A template of the same text without `{% generation %}`, a tag that only transformers knows: other engines' Jinja
    (llama-cpp-python's, TGI's) refuses it.
    """
    policy = policy_of(template)
    if policy is not None:
        return chat_template(policy, marked=False)
    return GENERATION_TAG.sub(
        lambda tag: "{%" + tag[1] + (" endif " if tag[2] else " if true ") + tag[3] + "%}", template
    )
