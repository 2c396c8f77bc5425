"""A tokenizer as files beside a model or adapter, so that whoever serves it encodes what was trained."""

import json
import os
import re
from pathlib import Path
from shutil import copyfile
from typing import Any

from gemma_ft.data.encode.template import chat_of
from gemma_ft.families.chat_template import SystemPolicy

PIECES = "tokenizer.model"
VOCABULARIES = ("tokenizer.json", PIECES)  # a tokenizer is opened from either
LEGACY_TEMPLATE = "chat_template.json"  # of transformers' processors, which tokenizers do not read


def brings_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies in a folder, or a part of one: it is then the one to open, or to refuse."""
    return any((folder / name).is_file() for name in (*VOCABULARIES, "tokenizer_config.json"))


def own_template(tokenizer: Any, folder: Path) -> Any:
    """The chat template that the folder of a tokenizer brings: the only one, the default of several, or all of them
    where none is named so; None where there is none.

    Source: transformers tokenization_utils_base.py (get_chat_template), processing_utils.py.
    """
    found = tokenizer.chat_template
    if isinstance(found, dict):
        found = found.get("default") or found
    return found or _legacy_template(folder)


def has_chat_template(folder: Path) -> bool:
    """Whether a folder brings a chat template of its own."""
    named = (folder / "additional_chat_templates").glob("*.jinja")
    if (folder / "chat_template.jinja").is_file() or any(named) or _legacy_template(folder):
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def _legacy_template(folder: Path) -> str | None:
    try:
        found = json.loads((folder / LEGACY_TEMPLATE).read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return found if isinstance(found, str) else None


def save_tokenizer(tokenizer: Any, folder: Path, *, system_policy: SystemPolicy | None) -> None:
    """Write the tokenizer's files, with the chat template of this system policy (None: its own), into `folder`.

    transformers leaves tokenizer.model behind, which other programs read: it is copied from where the tokenizer came
    from.
    """
    if system_policy is not None:
        tokenizer.chat_template = chat_of(tokenizer).text(system_policy)
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:  # its Rust half tells a full disk in the text of a bare Exception
        code = re.search(r"os error (\d+)", str(error))
        if type(error) is not Exception or code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from error
    pieces = Path(tokenizer.name_or_path) / PIECES
    if pieces.is_file():
        copyfile(pieces, folder / pieces.name)
