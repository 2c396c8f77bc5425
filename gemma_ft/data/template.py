"""Gemma's turns as text constants, stated once: the ids (chat.py) and the Jinja template are both made from these."""

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


def chat_template(policy: SystemPolicy = "fold") -> str:
    """Jinja text with which `apply_chat_template` gives ChatEncoder's ids, for text that spells no control token.

    Source: the chat_template of google/gemma-2-2b-it, whose only policy is "error".
    """
    user, model = ROLE_NAMES["user"], ROLE_NAMES["assistant"]
    # A backslash and an n inside a Jinja string literal: the template stays on one line.
    parts = (AFTER_ROLE, AFTER_TURN, AFTER_SYSTEM)
    after_role, after_turn, after_system = (part.replace("\n", "\\n") for part in parts)
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
        "+ '" + after_role + "' + content + '" + END_OF_TURN + after_turn + "' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + START_OF_TURN + model + after_role + "' }}{% endif %}"
    )
