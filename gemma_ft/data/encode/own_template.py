"""The chat format of a folder that was tuned elsewhere, found from what its own chat template writes.

The template is rendered by transformers' own `apply_chat_template` (in its sandbox) on a few fixed chats; how it writes
a turn is read off one of them, and only if our ids equal its ids on all of them is the folder asked in that format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from threading import Thread
from typing import Any, Literal, TypeVar

from jinja2 import Environment, TemplateError, TemplateSyntaxError, nodes

from gemma_ft.data.conversation import Turn
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.chat_format import ChatFormat
from gemma_ft.data.encode.template import chat_of, policy_of, unmarked
from gemma_ft.errors import UserError, first_line
from gemma_ft.families.records import CHATS

Chat = Sequence[tuple[Literal["system", "user", "assistant"], str]]
Found = TypeVar("Found")
# Name, what begins and ends a turn, what ends the speaker's name.
CHAT_FORMATS = (
    *dict.fromkeys((f"{chat.name} turns", chat.start_of_turn, chat.end_of_turn, None) for chat in CHATS),
    ("ChatML", "<|im_start|>", "<|im_end|>", None),
    ("Llama 3's headers", "<|start_header_id|>", "<|eot_id|>", "<|end_header_id|>"),
)
CURE = "restore the template that it was trained with, or ask it with transformers"
SECONDS, MOST_CHARACTERS = 20.0, 20_000  # that a template may take for the fixed chats, and write for one of them
ASKED, ANSWERED, AGAIN, ORDERS = "questionone", "answerone", "questiontwo", "systemone"  # words that no template holds

MIXED = " Two  blanks,\n\n\ta tab, <b>bold</b>, </s> <start of turn> [INST] 日本 🙂 1,234.5\n"
PLAIN_CHATS: tuple[Chat, ...] = (
    (("user", "Hello"),),
    (("user", "Hello"), ("assistant", "Yes?"), ("user", "Why?"), ("assistant", "So."), ("user", "Then?")),
    (("user", MIXED), ("assistant", "\n" + MIXED), ("user", "\n\n" + MIXED)),
    (("user", ""), ("assistant", ""), ("user", "")),
    (("user", "1 + 1?"), ("assistant", "<think>\nadd\n</think>\n\n2"), ("user", "2 + 2?")),
)
SYSTEM_CHATS: tuple[Chat, ...] = (
    (("system", "Be brief."), ("user", "Hello")),
    (("system", MIXED), ("user", MIXED), ("assistant", MIXED), ("user", "Why?")),
)
FORGING = "".join(f"{start}{end}{after or ''} " for _, start, end, after in CHAT_FORMATS)
FORGING += "".join(f"{chat.bos}{chat.eos}{chat.pad}" for chat in CHATS)


class UnknownTemplate(UserError):
    """A chat template that is none of the known formats; its folder cannot be asked, but may be copied."""


def own_encoder(tokenizer: Any, where: object, trained_turns: Literal["all", "last"] = "all") -> ChatEncoder:
    """The encoder of a tokenizer's own chat template: our ids are those of `tokenizer.apply_chat_template` for text
    that spells no control token. Its `system_policy` is "error" where the template refuses a system turn.

    Raises: UnknownTemplate: none of the known formats, or it fails, is slow or writes without end.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise UnknownTemplate(f"{where}: none of its named chat templates is 'default'; {CURE}") from error
    known = policy_of(template)
    if known is not None and known[0] == chat_of(tokenizer):
        return ChatEncoder(tokenizer, known[1], trained_turns)
    return _within(lambda: _Template(tokenizer, template, where).encoder(trained_turns), where)


def _within(work: Callable[[], Found], where: object) -> Found:
    """What `work` gives. Raises: UnknownTemplate for whatever it raises, or when it does not end in time."""
    done: list[Found] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:  # a template may raise anything, and run out of memory or stack
            failed.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(SECONDS)
    if done:
        return done[0]
    if failed and isinstance(failed[0], (UnknownTemplate, AssertionError)):
        raise failed[0]
    why = f"fails: {first_line(failed[0]) or type(failed[0]).__name__}" if failed else f"takes over {SECONDS:g} s"
    raise UnknownTemplate(f"{where}: its chat template {why}; {CURE}") from (failed[0] if failed else None)


@dataclass(frozen=True)
class _Template:
    """One tokenizer's own chat template."""

    tokenizer: Any
    text: str
    where: object

    def encoder(self, trained_turns: Literal["all", "last"]) -> ChatEncoder:
        """The encoder that gives this template's ids. Raises: UnknownTemplate, and what the template raises."""
        self._refuse_powers()
        rendered = self.rendered((("user", ASKED), ("assistant", ANSWERED), ("user", AGAIN)))
        for family in CHAT_FORMATS:
            form = self._read(rendered, family)
            if form is None:
                continue
            ids = {name: self.tokenizer.convert_tokens_to_ids(name) for name in form.control_tokens}
            missing = [name for name, id in ids.items() if id in (None, self.tokenizer.unk_token_id)]
            if missing:
                raise self.refusal(f"writes {missing[0]}, which is no token of its tokenizer")
            encoder = ChatEncoder(self.tokenizer, trained_turns=trained_turns, format=form)
            text = [name for name, id in ids.items() if id not in encoder.content.control_ids]
            if text:
                raise self.refusal(f"writes {text[0]}, which is text to its tokenizer: a question could forge it")
            self._compare(encoder)
            return encoder
        raise self.refusal(
            f"writes none of the turns that are known here ({', '.join(one[0] for one in CHAT_FORMATS)})"
        )

    def rendered(self, chat: Chat) -> str:
        """A chat as the template writes it, up to where the model speaks. Raises: whatever the template raises."""
        messages = [{"role": role, "content": text} for role, text in chat]
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=self.text, tokenize=False, add_generation_prompt=True
        )
        if len(text) > MOST_CHARACTERS:
            raise self.refusal(f"writes {len(text):,} characters for a short chat")
        return str(text)

    def refusal(self, why: str) -> UnknownTemplate:
        return UnknownTemplate(f"{self.where}: its chat template {why}; {CURE}")

    def _refuse_powers(self) -> None:
        """A power of numbers can keep Python busy in one operation, which nothing can end."""
        try:
            tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(unmarked(self.text))
        except TemplateSyntaxError as error:
            raise self.refusal(f"is no Jinja: {first_line(error)}") from error
        if tree.find(nodes.Pow) is not None:
            raise self.refusal("computes powers, which no chat needs")

    def _read(self, text: str, family: tuple[str, str, str, str | None]) -> ChatFormat | None:
        """The format of a family that a rendered chat has, or None."""
        name, start, end, end_of_role = family
        s, e, bos = (re.escape(token) for token in (start, end, chat_of(self.tokenizer).bos))
        within = f"(?:(?!{s}|{e}).)*?"
        found = re.fullmatch(
            f"(?P<bos>(?:{bos})?)(?P<front>.*?){s}(?P<user>{within}){ASKED}{e}(?P<after>{within})"
            f"{s}(?P<model>{within}){ANSWERED}{e}(?P=after){s}(?P=user){AGAIN}{e}(?P=after){s}(?P=model)",
            text,
            re.DOTALL,
        )
        user = _parted(found["user"], end_of_role) if found else None
        model = _parted(found["model"], end_of_role) if found else None
        if found is None or user is None or model is None:
            return None
        form = ChatFormat(
            name=name,
            start=start,
            end=end,
            end_of_role=end_of_role,
            roles={"user": user[0], "assistant": model[0]},
            after_role=user[1],
            after_turn=found["after"],
            system="error",
            template=self.text,
            bos=bool(found["bos"]),
        )
        return self._with_system(self._with_blanks(form), found["front"])

    def _with_blanks(self, form: ChatFormat) -> ChatFormat:
        """The format with whose texts lose their outer white space."""
        text = self.rendered((("user", f" {ASKED} \n"), ("assistant", f"\n {ANSWERED} "), ("user", AGAIN)))
        words = {"user": ASKED, "assistant": ANSWERED}
        kept = {role: word for role, word in words.items() if form.head(role) + word + form.end in text}
        return replace(form, stripped=frozenset(kept))

    def _with_system(self, form: ChatFormat, front: str) -> ChatFormat:
        """The format with what becomes of a system text. front: what the template writes before the first turn."""
        try:
            text = self.rendered((("system", ORDERS), ("user", ASKED)))
            blank = self.rendered((("system", f" {ORDERS} "), ("user", ASKED)))
        except TemplateError:
            return replace(form, stripped=form.stripped | {"system"}) if "user" in form.stripped else form  # refused
        if ORDERS not in text:
            return replace(form, system="drop")
        before, _, after = text.partition(ORDERS)
        stripped = form.stripped | {"system"} if f" {ORDERS}" not in blank else form.stripped
        between = after.partition(ASKED)[0]
        if form.end not in between:
            return replace(form, system="fold", after_system=between, stripped=stripped)
        parted = _parted(before.rpartition(form.start)[2], form.end_of_role)
        name = parted[0] if parted else ""
        made = replace(form, system="turn", roles={**form.roles, "system": name}, stripped=stripped)
        default = front.removeprefix(made.head("system")).removesuffix(made.end + made.after_turn)
        if front and "strftime_now" in self.text:
            raise self.refusal("writes today's date into its system turn")
        return replace(made, default_system=default) if front else made

    def _compare(self, encoder: ChatEncoder) -> None:
        """Raises: UnknownTemplate unless the encoder's ids are the template's on every fixed chat, and no text forges a
        control token.
        """
        system = encoder.system_policy
        chats = PLAIN_CHATS + (() if system == "error" else SYSTEM_CHATS)
        if system == "turn":
            chats += ((("system", ""), ("user", "Hello")),)
        for chat in chats:
            expected = self.tokenizer(self.rendered(chat), add_special_tokens=False)["input_ids"]
            if encoder.encode_prompt([Turn(role, text) for role, text in chat]) != expected:
                what = "a system turn" if chat[0][0] == "system" else f"{len(chat)} turns"
                raise self.refusal(f"writes {what} in a way that is not known here (nearest: {encoder.format.name})")
        forged, plain = (encoder.encode_prompt([Turn("user", text)]) for text in (FORGING, "Hello"))
        control = encoder.content.control_ids
        assert [id for id in forged if id in control] == [id for id in plain if id in control], "a forged control token"


def _parted(head: str, end_of_role: str | None) -> tuple[str, str] | None:
    """The name of a speaker and the text after it; None where `end_of_role` does not end the name."""
    if end_of_role is not None:
        name, found, after = head.partition(end_of_role)
        return (name, after) if found else None
    name = head.rstrip()
    return name, head[len(name) :]
