"""Rows that went through a chat template before they came here: their markers would be learned as spelled text.

Such a text begins with a marker of a turn, as its template writes it; text that only names a marker does not. An answer
may also have been given the name of a token that ends it; that it is no prose is told by how many rows end so.
Source: the chat templates that models are published with, as collected in TRL 1.16.0 (trl/chat_templates); those of
plain words as in the data sets Anthropic/hh-rlhf and timdettmers/openassistant-guanaco, in stanford_alpaca's train.py
(PROMPT_DICT) and in FastChat's conversation.py (vicuna_v1.1): they need the marker of an answer too.
"""

from __future__ import annotations

import re

from gemma_ft.data.conversation import Item, texts_of
from gemma_ft.families.records import CHATS

ROLE = r"(?:system|developer|user|human|assistant|model|tool|ipython)"
# (template, its marker as it is told, what stands at the beginning of a rendered text)
TEMPLATES = (
    *((chat.name, chat.start_of_turn, rf"{re.escape(chat.start_of_turn)}{ROLE}[ \t\r]*\n") for chat in CHATS),
    ("Gemma 4's", "<|turn>", rf"<\|turn>{ROLE}[ \t\r]*\n"),
    ("ChatML's", "<|im_start|>", rf"<\|im_start\|>{ROLE}[ \t\r]*\n"),
    ("Llama 3's", "<|start_header_id|>", rf"<\|start_header_id\|>{ROLE}<\|end_header_id\|>"),
    ("Llama 4's", "<|header_start|>", rf"<\|header_start\|>{ROLE}<\|header_end\|>"),
    ("Llama 2's or Mistral's", "[INST]", r"(?:\[SYSTEM_PROMPT\].*?)?\[INST\].*?\[/INST\]"),
    ("Phi's, Zephyr's or GLM's", "<|user|>", rf"<\|{ROLE}\|>(?:[ \t\r]*\n|.*?(?:<\|end\|>|<\|{ROLE}\|>|</s>))"),
    ("gpt-oss'", "<|start|>", rf"<\|start\|>{ROLE}\b[^\n]*?<\|message\|>"),
    ("DeepSeek's", "<｜User｜>", r"(?:(?!<｜).)*<｜User｜>.*?<｜Assistant｜>"),
    ("Command R's", "<|START_OF_TURN_TOKEN|>", r"<\|START_OF_TURN_TOKEN\|><\|\w+_TOKEN\|>"),
    ("Anthropic's", "Human:", r"Human:.*?\n\s*Assistant:"),
    ("Guanaco's", "### Human:", r"### Human:.*?### Assistant:"),
    ("Alpaca's", "### Instruction:", r"(?:Below is an instruction[^\n]*\n\s*)?### Instruction:.*?### Response:"),
    ("Vicuna's", "USER:", r"(?:A chat between[^\n]*?\s)?USER:.*?\sASSISTANT:"),
    ("a list of turns in JSON", '[{"role"', rf"\[\s*\{{\s*['\"](?:role|from)['\"]\s*:\s*['\"](?:{ROLE}|gpt)['\"]"),
)
BOS = (
    *(chat.bos for chat in CHATS),
    "<s>",
    "[gMASK]",
    "<sop>",
    "<|begin_of_text|>",
    "<|endoftext|>",
    "<|startoftext|>",
    "<BOS_TOKEN>",
    "<｜begin▁of▁sentence｜>",
)
FIRST = rf"(?:(?:{'|'.join(map(re.escape, BOS))})\s*)*"
OPENINGS = [(f"{name} {marker}", re.compile(FIRST + begins, re.DOTALL)) for name, marker, begins in TEMPLATES]
ENDS = (
    *(name for chat in CHATS for name in (chat.end_of_turn, chat.eos)),
    "</s>", "<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|end|>",
    "<turn|>",
)  # fmt: skip
FEWEST_ENDS, ENDS_SHARE = 3, 0.5  # rows, and share of all rows, from which on it is a custom of the data
# With which every opening begins.
MARKS = ("<", "[", "Human:", "### ", "Below is an instruction", "USER:", "A chat between")


def rendered_as(item: Item) -> str | None:
    """The template that one of an item's texts went through, and its marker ("ChatML's <|im_start|>"), or None."""
    for text in texts_of(item):
        if text[:1].isspace():
            text = text.lstrip()
        if text.startswith(MARKS):
            for name, opening in OPENINGS:
                if opening.match(text):
                    return name
    return None


def spelled_end(item: Item) -> str | None:
    """The name of an ending token with which an item's last text ends, or None."""
    last = texts_of(item)[-1].rstrip()
    return next((end for end in ENDS if last.endswith(end)), None) if last.endswith(">") else None


def is_custom(count: int, rows: int) -> bool:
    """Whether so many of all rows that end in one token's name do so on purpose."""
    return count >= max(FEWEST_ENDS, ENDS_SHARE * rows)
