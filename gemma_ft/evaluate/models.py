"""What `gemma-ft eval` compares: the models that a run, a recipe or a folder stands for, each loaded when its turn
comes, one at a time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gemma_ft.adapters.kinds import ADAPTER_CONFIG
from gemma_ft.adapters.lora import adapter_off
from gemma_ft.adapters.trainable_tokens import added_by
from gemma_ft.build.contract import CONTRACT, Contract, stop_ids_in
from gemma_ft.build.inputs import FRESH, build_tokenizer, weights_source
from gemma_ft.build.located import Source, adapter_in, model_in, refuse_no_adapter, refuse_weights, taken_for_folder
from gemma_ft.build.new_tokens import begin_rows, check_rows, embedding_rows
from gemma_ft.build.place import Place, model_place, place_of
from gemma_ft.build.pretrained import load_base, load_model, load_tokenizer, model_at
from gemma_ft.build.text_weights import model_weights
from gemma_ft.build.weights import EMBEDDING
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.own_template import own_encoder
from gemma_ft.data.encode.tokenizer_files import brings_tokenizer
from gemma_ft.errors import UserError
from gemma_ft.export.card.run_record import read_object
from gemma_ft.export.merge.merge import merge_into
from gemma_ft.export.merge.merged import merged_weights
from gemma_ft.model.linear import keep_trainable
from gemma_ft.recipe.load import load_recipe
from gemma_ft.recipe.run_files import FACTS, RunFiles
from gemma_ft.recipe.schema import Data, Recipe
from gemma_ft.system import hardware
from gemma_ft.system.paths import given_path

BASE, ADAPTER, MERGED, TUNED = "base", "adapter", "merged", "tuned"
# What was fixed when something was trained: it is read from there, and a setting for it would change nothing.
FIXED = ("model", "quantize", "adapter", "data.system")


@dataclass(frozen=True)
class ModelsToCompare:
    """The models to compare, by name, and the recipe that says on which rows.

    `place`: base and adapter, None where there is no base (trained from fresh weights) and no adapter. `tuned`: the
    folder of a fully tuned model. `merged`: a merged folder; None: the adapter is merged in memory. `run`: whose
    eval.json this is; None where it is no run, or one with other folders or settings than its own.
    """

    recipe: Recipe
    source: str
    run: RunFiles | None
    place: Place | None
    tuned: Path | None
    merged: Path | None

    @property
    def names(self) -> list[str]:
        """The models that there are, in the order of the table."""
        there = {
            BASE: self.place is not None and not self.reward,
            ADAPTER: self.place is not None and self.place.adapter is not None,
            TUNED: self.tuned is not None,
            MERGED: self.merged is not None or (self.place is not None and self.place.adapter is not None),
        }
        return [name for name, found in there.items() if found]

    @property
    def reward(self) -> bool:
        """Whether they are reward models; their base then is none, and not compared."""
        return self.recipe.objective.kind == "reward" or (self.place is not None and self.place.reward)

    @property
    def contract(self) -> Contract | None:
        """What was agreed on when the adapter or the tuned model was trained."""
        if self.place is not None and self.place.contract is not None:
            return self.place.contract
        return Contract.read(self.tuned) if self.tuned is not None else None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that was saved with what was trained, else the recipe's. Raises: UserError when it was
        changed.
        """
        trained = self.tuned or (self.place.adapter if self.place is not None else None)
        if trained is None or not brings_tokenizer(trained):
            return build_tokenizer(self.recipe)
        tokenizer: PreTrainedTokenizerBase = load_tokenizer(trained)
        if self.contract is not None:
            self.contract.encoder(tokenizer, trained)
        return tokenizer

    def encoder(self, tokenizer: PreTrainedTokenizerBase, data: Data) -> ChatEncoder:
        """How rows become tokens: as training wrote them; for an adapter without a contract in its own chat template,
        with the recipe's way with system turns where that refuses them. Answers end where the base's do, too.

        Raises: UserError when its chats begin without BOS; UnknownTemplate, as own_encoder.
        """
        adapter = self.place.adapter if self.place is not None else None
        if self.place is None or adapter is None or self.contract is not None:
            encoder = ChatEncoder(tokenizer, data.system, data.trained_turns)
        else:
            encoder = own_encoder(tokenizer, adapter, data.trained_turns)
            encoder = encoder.but(system=data.system) if encoder.system_policy == "error" else encoder
        if not encoder.format.bos:
            raise UserError(f"{adapter}: its chats begin without BOS, and rows are scored with one; ask it by generate")
        if self.place is not None and adapter is not None:
            check_rows(encoder, embedding_rows(self.place), adapter)
        base = self.place.of_base.folder if self.place is not None else None
        return encoder.but(stop_ids=stop_ids_in(base) if base is not None else ())

    @property
    def quantize(self) -> tuple[str | None, bool]:
        """How base and adapter are stored: as the adapter was trained, else as the recipe says."""
        if self.place is not None and self.place.adapter is not None and self.contract is not None:
            return self.contract.quantize, self.contract.double_quant
        block = self.recipe.quantize
        return (block.kind, block.double_quant) if block is not None else (None, True)

    @property
    def dtype(self) -> torch.dtype:
        """The recipe's precision, in which every model is asked."""
        return hardware.dtype_by_name(self.recipe.train.precision)


def find_models(
    name: str, overrides: Sequence[str] = (), *, adapter: Path | None = None, merged: Path | None = None
) -> ModelsToCompare:
    """The models of a run directory, or of a recipe: then the run in its output_dir, where there is a finished one,
    else the base alone. `adapter` and `merged` name folders to be taken instead of the run's own, or beside the base.

    Raises: UserError in one line.
    """
    if adapter is not None and adapter_in(adapter) is None:
        refuse_no_adapter(adapter, "--adapter ")
    folder = given_path(name)
    if folder.is_file():
        refuse_weights(folder, name, "give a run directory or a recipe")
    if folder.is_dir() or adapter is not None:
        _check_overrides(overrides, str(adapter or name))
    alone = adapter is None and merged is None
    named = (
        _of_run(folder, name, overrides, alone=alone) if folder.is_dir() else _of_recipe(name, overrides, alone=alone)
    )
    base = None if named.recipe.model.weights == FRESH else weights_source(named.recipe)
    if merged is not None and not (merged / "config.json").is_file():
        what = taken_for_folder(merged)[0] if merged.is_file() else "no config.json in it"
        raise UserError(f"--merged {merged}: {what}; give a folder that gemma-ft merge wrote")
    tuned = named.tuned if adapter is None else None
    place = _place(base, adapter if adapter is not None else named.adapter)
    if merged is not None and place is not None:
        _check_merged(merged, place)
    return ModelsToCompare(named.recipe, name, named.run, place, tuned, merged)


@dataclass(frozen=True)
class _Named:
    """What the name of a run or a recipe stands for: the recipe, the adapter or the tuned model of the finished run,
    and that run where it is measured alone and as the recipe says: its eval.json may then be written.
    """

    recipe: Recipe
    adapter: Path | None = None
    tuned: Path | None = None
    run: RunFiles | None = None


def _of_run(folder: Path, name: str, overrides: Sequence[str], *, alone: bool) -> _Named:
    """What the directory of a run stands for. Raises: UserError where it is none, or, `alone`, an unfinished one."""
    run = RunFiles(folder)
    if not run.recipe.is_file():
        raise UserError(f"{name}: not a run, there is no recipe.yaml in it; give a run directory or a recipe")
    recipe = load_recipe(run.recipe, overrides).recipe
    adapter, tuned = _result_of(run)
    finished = adapter is not None or tuned is not None
    if alone and not finished:
        raise UserError(f"{name}: the run is not finished, there is no adapter/ or model/ in it; finish it first")
    return _Named(recipe, adapter, tuned, run if alone and not overrides else None)


def _of_recipe(name: str, overrides: Sequence[str], *, alone: bool) -> _Named:
    """What a recipe stands for: the finished run in its output_dir, or, where there is none, itself."""
    recipe = load_recipe(name, overrides).recipe
    run = RunFiles(Path(recipe.output_dir))
    adapter, tuned = _result_of(run) if run.recipe.is_file() else (None, None)
    finished = adapter is not None or tuned is not None
    alike = finished and alone and not overrides and _measures_alike(recipe, load_recipe(run.recipe).recipe)
    return _Named(recipe, adapter, tuned, run if alike else None)


def _result_of(run: RunFiles) -> tuple[Path | None, Path | None]:
    """The adapter of a finished run, or its fully tuned model."""
    tuned = model_in(run.root)
    return (adapter_in(run.root), None) if tuned is None else (None, tuned)


def _check_merged(merged: Path, place: Place) -> None:
    """That a merged folder was made of the base and the adapter that it stands beside.

    Raises: UserError where it says otherwise; a folder that does not say is taken as it is.
    """
    adapter = place.of_adapter
    rows = [files.info(EMBEDDING).shape[0] for files in (model_weights(merged), place.of_base.weights)]
    if adapter is not None:
        added = added_by(adapter.config, adapter.folder / ADAPTER_CONFIG, rows[1])
        rows[1] += added.count if added else 0
    if rows[0] != rows[1]:
        raise UserError(f"--merged {merged}: has {rows[0]} tokens, {place.base.name} {rows[1]}; give a merge of it")
    contract = Contract.read(merged)
    for field in ("base_sha256", "tokenizer_sha256", "template_sha256"):
        said = [getattr(one, field, None) for one in (contract, place.contract)]
        if None not in said and said[0] != said[1]:
            what = field.partition("_")[0]
            raise UserError(f"--merged {merged}: has another {what} than {place.adapter}; give a merge of that adapter")
    adapters = (read_object(merged / FACTS) or {}).get("adapters")
    adapters = [one.get("sha256") for one in adapters if isinstance(one, dict)] if isinstance(adapters, list) else []
    if adapter is not None and adapters and adapter.weights.fingerprint() not in adapters:
        raise UserError(f"--merged {merged}: was not made of {adapter.folder}; give a merge of that adapter")


def _measures_alike(recipe: Recipe, other: Recipe) -> bool:
    """Whether two recipes score the same rows in the same way."""
    first, second = ((one.data, one.eval, one.train.precision, one.seed) for one in (recipe, other))
    return first == second


def _check_overrides(overrides: Sequence[str], where: str) -> None:
    """Raises: UserError for a setting that what was trained has already decided."""
    for text in overrides:
        key = text.lstrip("~").partition("=")[0].strip()
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED):
            raise UserError(f"{key}: {where} was trained with its own, which an evaluation keeps; leave it out")


def check_base(compared: ModelsToCompare) -> None:
    """That the base beside a fully tuned model is the one it was tuned from; an adapter's is checked as it is loaded.

    Raises: UserError.
    """
    if compared.tuned is None or compared.place is None:
        return
    contract = Contract.read(compared.tuned)
    found = compared.place.of_base.unlike(contract)
    if contract is not None and found is not None:
        raise UserError(
            f"{compared.tuned}: was trained on {contract.base} with fingerprint {str(contract.base_sha256)[:12]}, but "
            f"{compared.place.base.name} has {found[:12]} ({CONTRACT}); restore that base, or leave it out of --models"
        )


def _place(base: Source | None, adapter: Path | None) -> Place | None:
    """Base and adapter together; an adapter names its own base."""
    return place_of(adapter) if adapter is not None else model_place(base) if base is not None else None


def chosen_models(compared: ModelsToCompare, names: Sequence[str] | None) -> list[str]:
    """The models a user named, in the order of the table; None: all that there are. Raises: UserError."""
    there = compared.names
    if not there:
        raise UserError(f"{compared.source}: nothing to evaluate: fresh weights, and no finished run in its output_dir")
    for name in names or ():
        if name not in there:
            raise UserError(f"--models: there is no {name!r} here; there are {', '.join(there)}")
    return [name for name in there if names is None or name in names]


def with_each(compared: ModelsToCompare, names: Sequence[str], measure: Callable[[str, Any], None]) -> None:
    """Call `measure` with each named model, in eval mode, on its device; a model is gone before the next is loaded.

    Base and adapter are one model, loaded once, as it was trained: quantized, with the adapter off and on. The merged
    model is the adapter in the base as it was before it was quantized.
    """
    loaders = (
        ([name for name in (BASE, ADAPTER) if name in names], _load_live),
        ([TUNED] if TUNED in names else [], lambda one: load_model(one.tuned, dtype=one.dtype)),
        ([MERGED] if MERGED in names else [], _load_merged),
    )
    for wanted, load in loaders:
        if not wanted:
            continue
        model = load(compared).eval()
        for name in wanted:
            if name == BASE and hasattr(model, "disable_adapter"):
                with adapter_off(model):
                    measure(name, model)
            else:
                measure(name, model)
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _load_live(compared: ModelsToCompare) -> Any:
    assert compared.place is not None
    kind, double_quant = compared.quantize
    place = compared.place
    if place.adapter is not None:
        model = model_at(place, dtype=compared.dtype, quantize=kind)
    else:
        model = load_base(place.base, dtype=compared.dtype, quantize=kind, double_quant=double_quant)
        begin_rows(model, compared.tokenizer(), place.base)
    # weights packed for speed are computed with in bf16: the loss would not be the one that training reported
    keep_trainable(model)
    return model


def _load_merged(compared: ModelsToCompare) -> Any:
    if compared.merged is not None:
        return load_model(compared.merged, dtype=compared.dtype)
    assert compared.place is not None
    weights = merged_weights(compared.place)
    model = load_base(compared.place.base, dtype=compared.dtype, trainable=False, reward=compared.reward)
    merge_into(model, weights)
    return model
