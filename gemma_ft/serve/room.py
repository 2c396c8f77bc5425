"""How many tokens an answer may have: what the context has room for, in the words that clients look for."""

from __future__ import annotations

from gemma_ft.serve.errors import ApiFault
from gemma_ft.serve.limits import Limits

OVERFLOW = "context_length_exceeded"


def answer_room(
    prompt_tokens: int, asked: int | None, *, context: int, limits: Limits, prompt_at: str, asked_at: str
) -> int:
    """Tokens for an answer behind a prompt in a context of so many. `prompt_at` and `asked_at`: the fields that prompt
    and `asked` came in.

    Raises: ApiFault when they do not fit, in OpenAI's words, by which clients know to shorten a chat or to take a
    larger model; or when more is asked for than this server gives.
    """
    left = context - prompt_tokens
    what = prompt_at.partition(".")[0]
    longest = f"This model's maximum context length is {context} tokens. However,"
    if left < 1:
        text = f"your {what} resulted in {prompt_tokens} tokens and left no room for an answer."
        cure = f"Please reduce the length of the {what}."
        raise ApiFault(400, f"{longest} {text} {cure}", param=prompt_at, code=OVERFLOW)
    if asked is None:
        return min(left, limits.max_tokens)
    if asked > left:
        parts = f"{prompt_tokens} in the {what}, {asked} in the completion"
        text = f"you requested {prompt_tokens + asked} tokens ({parts})."
        cure = f"Please reduce the length of the {what} or {asked_at}."
        raise ApiFault(400, f"{longest} {text} {cure}", param=asked_at, code=OVERFLOW)
    if asked > limits.max_tokens:
        text = f"{asked_at}: this server gives up to {limits.max_tokens} for one answer"
        raise ApiFault(400, text, param=asked_at)
    return asked
