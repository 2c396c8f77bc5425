"""What a request may say, in OpenAI's words: everything is done as it says, or the request is refused.

A field of OpenAI's API that this server does not do is taken only with the value that asks for nothing (NOT_DONE);
null is as absent; a field that neither API knows is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from gemma_ft.data.items import Role, Turn, kind_of, text_fault
from gemma_ft.errors import UserError
from gemma_ft.infer.sampling import Sampling
from gemma_ft.infer.server.faults import ApiFault
from gemma_ft.infer.server.limits import Limits

BETWEEN_PARTS = "\n"  # of a content that is a list of text parts
ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

# field: the values that ask for nothing
NOT_DONE: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
NOT_DONE_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "name": (),
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "annotations": ([],),
    "refusal": (),
    "audio": (),
}


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        hide_input_in_errors=True,
    )


class StreamOptions(_Strict):
    """What a stream brings besides its text."""

    include_usage: bool = False

    @model_validator(mode="before")
    @classmethod
    def _refuse_not_done(cls, given: Any) -> Any:
        return _asked_for(given, {"include_obfuscation": (False,)})


class Message(_Strict):
    """One message of a chat; its content is text, or a list of text parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @model_validator(mode="before")
    @classmethod
    def _refuse_not_done(cls, given: Any) -> Any:
        return _asked_for(given, NOT_DONE_IN_MESSAGES)

    @field_validator("content", mode="before")
    @classmethod
    def _text_of_parts(cls, content: Any) -> Any:
        if isinstance(content, list):
            return BETWEEN_PARTS.join(_text_of_part(part) for part in content)
        return _sound(content)


class _Request(_Strict):
    """What chats and completions have in common."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float = 1.0  # OpenAI's, not the engine's
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: list[str] = []
    n: Annotated[int, Field(ge=1)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # the client's own name for its user: OpenAI's API answers all alike, and so does this

    @model_validator(mode="before")
    @classmethod
    def _refuse_not_done(cls, given: Any) -> Any:
        return _asked_for(given, NOT_DONE)

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the counts of its tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, choice: int) -> Sampling:
        """How one of the `n` answers is sampled: their seeds follow one another. Raises: ApiFault."""
        seed = None if self.seed is None else self.seed + choice
        try:
            return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, seed)
        except UserError as error:
            raise ApiFault(400, str(error), param=str(error).partition(":")[0]) from None

    def check(self, limits: Limits) -> None:
        """Raises ApiFault where more is asked for than a server's limits allow."""
        if self.n > limits.choices:
            raise _wrong("n", f"expected 1 to {limits.choices}")
        if len(self.stop) > limits.stop_strings:
            raise _wrong("stop", f"expected up to {limits.stop_strings} strings")
        if not all(1 <= len(text) <= limits.stop_characters for text in self.stop):
            raise _wrong("stop", f"expected strings of 1 to {limits.stop_characters} characters")
        if self.max_tokens is not None and self.max_tokens > limits.max_tokens:
            raise _wrong("max_tokens", f"this server gives up to {limits.max_tokens} for one answer")
        if self.stream_options is not None and not self.stream:
            raise _wrong("stream_options", "only with stream: true")


class ChatRequest(_Request):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _newer_name(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "max_completion_tokens" not in given:
            return given
        rest = dict(given)
        newer = rest.pop("max_completion_tokens")
        if newer is not None and rest.get("max_tokens") is not None:
            raise _fault("max_tokens and max_completion_tokens: two names of one thing; give one")
        return rest if newer is None else {**rest, "max_tokens": newer}

    def turns(self) -> list[Turn]:
        """The turns of the chat; `developer` is the system's. Raises: ApiFault when there is nothing to answer."""
        if self.messages[-1].role != "user":
            raise _wrong("messages", "the last one must be the user's; an answer that was begun is not continued")
        if not self.messages[-1].content.strip():
            raise _wrong("messages", "the last one is empty; ask something")
        return [Turn(ROLES[message.role], message.content) for message in self.messages]


class CompletionRequest(_Request):
    """The body of /v1/completions; prompts are text, never token ids, which could forge a turn."""

    prompt: Annotated[list[str], Field(min_length=1)]

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_or_several(cls, prompt: Any) -> Any:
        prompts = prompt if isinstance(prompt, list) else [prompt]
        if any(isinstance(one, int | list) for one in prompts):
            raise _fault("token ids are not taken; send text")
        return [_sound(one) for one in prompts]


Body = TypeVar("Body", ChatRequest, CompletionRequest)


def parsed(kind: type[Body], content: bytes, limits: Limits) -> Body:
    """A request out of the bytes of its body. Raises: ApiFault naming the first field that is wrong, and why."""
    try:
        request = kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "json_invalid":
            raise ApiFault(400, "the body is not valid JSON") from None
        text = "unknown field" if first["type"] == "extra_forbidden" else first["msg"]
        raise _wrong(where, text) if where else ApiFault(400, text) from None
    request.check(limits)
    return request


def _asked_for(given: Any, not_done: Mapping[str, tuple[Any, ...]]) -> Any:
    """An object without what is null or asks for nothing. Raises where it asks for something that is not done."""
    if not isinstance(given, dict):
        return given
    for key, value in given.items():
        if key in not_done and value is not None and not any(_same(value, one) for one in not_done[key]):
            raise _fault(f"{key}: not supported by this server; leave it out")
    return {key: value for key, value in given.items() if value is not None and key not in not_done}


def _same(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _text_of_part(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise _fault('only text parts are taken: {"type": "text", "text": ...}')
    if set(part) != {"type", "text"}:
        raise _fault("a text part has type and text, and nothing else")
    return _sound(part["text"])


def _sound(text: Any) -> str:
    """A text that a tokenizer takes. Raises where it is none."""
    fault = text_fault(text)
    if fault is not None:
        raise _fault(f"expected text, got {kind_of(text)}" if not isinstance(text, str) else f"the text {fault}")
    return str(text)


def _fault(text: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{text}", {"text": text})


def _wrong(where: str, text: str) -> ApiFault:
    return ApiFault(400, f"{where}: {text}", param=where)
