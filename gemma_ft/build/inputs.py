"""What a recipe reads: its tokenizer, and the files that its rows, weights and tokenizer lie in. Needs no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_ft.build.located import Source, adapter_in, located, located_rows, model_source
from gemma_ft.data.encode.tokenizer import add_tokens, load_tokenizer
from gemma_ft.data.read.files import DataFile, files_at
from gemma_ft.errors import UserError
from gemma_ft.families.records import PRESETS
from gemma_ft.recipe.objectives import WORDS
from gemma_ft.recipe.schema import Recipe
from gemma_ft.recipe.schema import Source as Rows
from gemma_ft.system.shipped import locate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FRESH = "random"  # model.weights: start from fresh weights of the preset's shape


def weights_source(recipe: Recipe) -> Source:
    """Where the recipe's weights lie: `model.weights`, else the preset's own.

    Raises: UserError for something that is neither a folder nor a hub id.
    """
    name = recipe.model.weights or PRESETS[recipe.model.preset].weights
    return model_source(name, recipe.model.revision, key="model.weights: ")


def build_tokenizer(recipe: Recipe, trained_sha256: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of the recipe: `model.tokenizer`, else the one beside the weights, with `model.added_tokens`.

    trained_sha256: as `load_tokenizer` takes it, of a run that goes on.
    """
    if recipe.model.tokenizer is not None:
        source = model_source(recipe.model.tokenizer, key="model.tokenizer: ", weights=False)
    elif recipe.model.weights == FRESH:
        raise UserError("model.tokenizer: fresh weights come without a tokenizer; name a folder or hub id")
    else:
        source = weights_source(recipe)
    tokenizer = load_tokenizer(source.name, revision=source.revision, trained_sha256=trained_sha256)
    add_tokens(tokenizer, recipe.model.added_tokens or ())
    return tokenizer


def sources_of(recipe: Recipe) -> list[Rows]:
    """All rows that a recipe trains on and holds out."""
    return [*recipe.data.train, *(recipe.data.eval or ())]


def check_apart(recipe: Recipe, place: Path, *, named: str, cure: str) -> None:
    """Raises: UserError, from `named` to `cure`, when what is written to `place` would be read as rows: it lies in a
    folder that is a source.
    """
    for source in sources_of(recipe):
        folder = Path(located_rows(source.path))
        if os.path.isdir(folder) and place.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{named}: lies in {source.path}, whose files are all read as rows; {cure}")


def _files_of(source: Rows) -> list[DataFile]:
    """The files of this machine that a source stands for; none where it is to be refused when it is read."""
    try:
        return [file for file in files_at(located_rows(source.path), source.split) or () if not file.remote]
    except UserError:
        return []


def _compared(recipe: Recipe) -> list[str]:
    """The folders that training goes on from, and is compared with: in a run that of its adapter."""
    start = recipe.adapter.start if recipe.adapter is not None else None
    reference: str | None = getattr(recipe.objective, "reference", None)
    names = [name for name in (start, reference) if name is not None and name not in WORDS]
    return [str(adapter_in(Path(located(name))) or name) for name in names]


def inputs_of(recipe: Recipe) -> list[str]:
    """The files and folders of this machine that a recipe reads."""
    rows = [file.name for source in sources_of(recipe) for file in _files_of(source)]
    names = [*rows, recipe.eval.canary, recipe.model.weights, recipe.model.tokenizer, *_compared(recipe)]
    return [str(found) for name in names if name is not None and (found := locate(name)) is not None]
