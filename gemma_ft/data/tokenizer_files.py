"""A tokenizer as files beside a model or adapter, so that whoever serves it encodes what was trained."""

import os
import re
from pathlib import Path
from shutil import copyfile
from typing import Any

from gemma_ft.data.template import SystemPolicy, chat_template

PIECES = "tokenizer.model"


def save_tokenizer(tokenizer: Any, folder: Path, *, system_policy: SystemPolicy | None) -> None:
    """Write the tokenizer's files, with the chat template of this system policy (None: its own), into `folder`.

    transformers leaves tokenizer.model behind, which other programs read: it is copied from where the tokenizer came
    from.
    """
    if system_policy is not None:
        tokenizer.chat_template = chat_template(system_policy)
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
