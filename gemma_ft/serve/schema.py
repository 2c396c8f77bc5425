"""What a request may say, in OpenAI's words: everything is done as it says, or the request is refused.

A field that this server does not do is taken only where it asks for nothing (fields.py); null is as absent; a field
that nobody's API knows is refused. A fault names the field by its path, counted from 0: messages.1.content.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from gemma_ft.data.conversation import Role, Turn, misplaced, text_fault
from gemma_ft.errors import UserError
from gemma_ft.families.chat_template import TURNS, ChatTemplate
from gemma_ft.infer.sampling import Sampling
from gemma_ft.serve.errors import ApiFault
from gemma_ft.serve.fields import (
    AS_ABSENT,
    IN_CHATS,
    IN_COMPLETIONS,
    IN_MESSAGES,
    IN_STREAM_OPTIONS,
    IN_TEXT_PARTS,
    Table,
    is_among,
    refusal,
)
from gemma_ft.serve.limits import Limits

ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
PART = '{"type": "text", "text": ...}'


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        hide_input_in_errors=True,
    )
    not_done: ClassVar[Table] = {}

    @model_validator(mode="before")
    @classmethod
    def _only_what_asks(cls, given: Any) -> Any:
        needed = {name for name, field in cls.model_fields.items() if field.is_required()}
        return _asked_for(given, cls.not_done, needed)


class StreamOptions(_Strict):
    """What a stream brings besides its text."""

    not_done = IN_STREAM_OPTIONS
    include_usage: bool = False


class TextPart(_Strict):
    """One part of a content that is a list."""

    not_done = IN_TEXT_PARTS
    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _no_other_kind(cls, given: Any) -> Any:
        kind = given.get("type") if isinstance(given, dict) else None
        if isinstance(kind, str) and kind != "text":  # in OpenAI's words, by which clients know it
            raise _fault(f"invalid content type: {kind} is only supported by certain models; send text: {PART}", "type")
        if kind != "text":
            raise _fault(f"only text parts are taken: {PART}")
        return given

    @field_validator("text", mode="before")
    @classmethod
    def _sound_text(cls, text: Any) -> Any:
        return _sound(text)


class TextParts(RootModel[list[TextPart]]):
    """A content that is a list."""


class Message(_Strict):
    """One message of a chat; its content is text, or a list of text parts. An assistant's may be null or absent, which
    is as empty.
    """

    not_done = IN_MESSAGES
    role: Literal["system", "developer", "user", "assistant"]
    content: str | tuple[str, ...]

    @model_validator(mode="before")
    @classmethod
    def _silent_assistant(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("role") == "assistant" and given.get("content") is None:
            return {**given, "content": ""}
        return given

    @field_validator("content", mode="before")
    @classmethod
    def _text_of_parts(cls, content: Any) -> Any:
        if isinstance(content, list):
            return tuple(part.text for part in TextParts.model_validate(content).root)
        return _sound(content)

    def text(self, chat: ChatTemplate) -> str:
        """What it says; a list of parts is one text as `chat` has it."""
        return self.content if isinstance(self.content, str) else chat.joined(self.content)


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

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @property
    def answer_tokens(self) -> tuple[str, int | None]:
        """The field that says how long an answer may be, and what it says."""
        return "max_tokens", self.max_tokens

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
        if self.stream_options is not None and not self.stream:
            raise _wrong("stream_options", "only with stream: true")


class ChatRequest(_Request):
    """The body of /v1/chat/completions."""

    not_done = IN_CHATS
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None  # the newer name of max_tokens

    @property
    def answer_tokens(self) -> tuple[str, int | None]:
        """As in completions, under either name."""
        newer = self.max_completion_tokens
        return super().answer_tokens if newer is None else ("max_completion_tokens", newer)

    def check(self, limits: Limits) -> None:
        """As in completions; also where a length is given under both of its names."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise _wrong("max_completion_tokens", "max_tokens is another name of it; give one")
        super().check(limits)

    def prompt_at(self, place: int) -> str:
        """The path of what is answered."""
        return "messages"

    def turns(self, chat: ChatTemplate = TURNS) -> list[Turn]:
        """The turns of the chat, written as `chat`; `developer` is the system's. Raises: ApiFault when there is nothing
        to answer, or the turns are in no order that was trained.
        """
        turns = [Turn(ROLES[message.role], message.text(chat)) for message in self.messages]
        if wrong := misplaced(turns):
            raise _wrong(f"messages.{wrong[0]}", wrong[1])
        last, at = turns[-1], f"messages.{len(turns) - 1}"
        if last.role == "system":
            raise _wrong("messages", "a system message alone asks nothing; add one of the user's")
        if last.role != "user":
            raise _wrong(at, "the last one must be the user's; an answer that was begun is not continued")
        if not last.content.strip():
            raise _wrong(f"{at}.content", "the last one is empty; ask something")
        return turns


class CompletionRequest(_Request):
    """The body of /v1/completions; prompts are text, never token ids, which could forge a turn."""

    not_done = IN_COMPLETIONS
    prompt: str | list[str]

    @field_validator("prompt", mode="before")
    @classmethod
    def _text_or_texts(cls, prompt: Any) -> Any:
        several = prompt if isinstance(prompt, list) else [prompt]
        if not several:
            raise _fault("the list is empty; give a text")
        if any(isinstance(one, int | list) for one in several):
            raise _fault("token ids are not taken; send text")
        for place, one in enumerate(several):
            _sound(one, *((place,) if isinstance(prompt, list) else ()))
        return prompt

    @property
    def prompts(self) -> list[str]:
        """What is to be continued: one text, or several."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    def prompt_at(self, place: int) -> str:
        """The path of one of the prompts."""
        return "prompt" if isinstance(self.prompt, str) else f"prompt.{place}"


Body = TypeVar("Body", ChatRequest, CompletionRequest)


def parsed(kind: type[Body], content: bytes, limits: Limits) -> Body:
    """A request out of the bytes of its body. Raises: ApiFault naming the first field that is wrong, and why."""
    try:
        request = kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "json_invalid":
            raise ApiFault(400, "the body is not valid JSON") from None
        text = "unknown field" if first["type"] == "extra_forbidden" else first["msg"]
        if first["input"] is None:
            text = text.replace("Input should be", "is null, expected", 1)
        raise _wrong(where, text) if where else ApiFault(400, text) from None
    request.check(limits)
    return request


def _asked_for(given: Any, not_done: Table, needed: set[str]) -> Any:
    """An object without what is null or asks for nothing; a null stays where a value is needed. Raises where it asks
    for something that is not done.
    """
    if not isinstance(given, dict):
        return given
    asked: dict[str, Any] = {}
    for key, value in given.items():
        if value is None or is_among(value, AS_ABSENT.get(key, ())):
            asked |= {key: value} if key in needed else {}
        elif key not in not_done:
            asked[key] = value
        elif why := refusal(value, not_done[key]):
            raise _fault(why, key)
    return asked


def _sound(text: Any, *path: int | str) -> str:
    """A text that a tokenizer takes. Raises where it is none; `path`: where it is, below what is validated."""
    fault = text_fault(text)
    if fault is not None:
        raise _fault(f"the text {fault}" if isinstance(text, str) else fault, *path)
    return str(text)


def _fault(text: str, *path: int | str) -> ValidationError:
    """A fault at a path below what is validated."""
    found = PydanticCustomError("refused", "{text}", {"text": text})
    return ValidationError.from_exception_data("request", [InitErrorDetails(type=found, loc=path, input=...)])


def _wrong(where: str, text: str) -> ApiFault:
    return ApiFault(400, f"{where}: {text}", param=where)
