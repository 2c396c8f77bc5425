"""A tokenizer as files beside a model or adapter, so that whoever serves it encodes what was trained."""

from pathlib import Path
from shutil import copyfile
from typing import Any

from gemma_ft.data.template import SystemPolicy, chat_template


def save_tokenizer(tokenizer: Any, folder: Path, *, system_policy: SystemPolicy) -> None:
    """Write the tokenizer's files, with the chat template of this system policy, into `folder`.

    transformers leaves tokenizer.model behind, which GGUF needs for its scores: it is copied from where the tokenizer
    came from.
    """
    tokenizer.chat_template = chat_template(system_policy)
    tokenizer.save_pretrained(str(folder))
    pieces = Path(tokenizer.name_or_path) / "tokenizer.model"
    if pieces.is_file():
        copyfile(pieces, folder / pieces.name)
