"""What makes a folder a reward model's, checked where one is built or opened."""

from __future__ import annotations

import shlex
from pathlib import Path

from gemma_ft.adapters.class_names import PREFIX
from gemma_ft.adapters.kinds import ADAPTER_WEIGHTS
from gemma_ft.build.place import Place
from gemma_ft.errors import UserError
from gemma_ft.model.config_file import is_reward_model
from gemma_ft.model.reward import HEAD_WEIGHT

ADAPTER_HEAD = PREFIX + HEAD_WEIGHT  # the name of the head in an adapter


def refuse_reward_base(folder: Path, name: str) -> None:
    """Raises: UserError for a reward model, where a model with a head for tokens is to be built."""
    if is_reward_model(folder):
        raise UserError(f"{name}: a reward model, which has no head for tokens; name the model that it was made from")


def check_reward_head(place: Place) -> None:
    """Raises: UserError where the adapter of a reward model has no head that gives one number."""
    adapter = place.of_adapter
    if adapter is None:
        return
    if ADAPTER_HEAD not in adapter.weights.names:
        if place.of_base.reward:  # whose head it leaves as it is
            return
        raise UserError(
            f"{adapter.folder}/{ADAPTER_WEIGHTS}: a reward model's adapter without its head ({ADAPTER_HEAD}); save it "
            "again with task_type SEQ_CLS, which keeps it"
        )
    rows = adapter.weights.info(ADAPTER_HEAD).shape[0]
    if rows != 1:
        raise UserError(
            f"{adapter.folder}: its head gives {rows} numbers, a classifier's; a reward model gives one (num_labels 1)"
        )


def refuse_reward_form(name: str, form: str, *, graft: bool) -> None:
    """Raises: UserError for a form of an export, or a merge, that has no place for the head of a reward model."""
    cure = f"--to hf keeps it, and gemma-ft score {shlex.quote(name)} --input ROWS --output FILE scores rows"
    if form == "gguf":
        raise UserError(f"{name}: a reward model, and a GGUF file has no place for its head; {cure}")
    if graft:
        raise UserError(f"{name}: a reward model, and a multimodal folder has no place for its head; leave --graft out")
