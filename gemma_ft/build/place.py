"""What a user's name for a model stands for: a base, the adapter on it, and what their files say, each opened once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig

from gemma_ft.adapters.adapter_config import adapter_config, read_fields
from gemma_ft.adapters.class_names import PREFIX, native_config, native_key
from gemma_ft.adapters.kinds import ADAPTER_CONFIG, ADAPTER_WEIGHTS, scores
from gemma_ft.adapters.quantize import Kind
from gemma_ft.build.contract import CONTRACT, Contract, adapter_hash
from gemma_ft.build.located import (
    Source,
    adapter_in,
    folder_of,
    located,
    model_in,
    model_source,
    pinned,
    refuse_file,
    refuse_no_adapter,
)
from gemma_ft.build.text_weights import model_weights
from gemma_ft.build.weights import WeightFiles
from gemma_ft.data.encode.tokenizer_files import brings_tokenizer
from gemma_ft.errors import UserError
from gemma_ft.model.config import config_in, numerics_hash
from gemma_ft.model.config_file import names_reward_model
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.model.reward import GemmaForSequenceClassification
from gemma_ft.recipe.load import load_recipe
from gemma_ft.recipe.run_files import RunFiles
from gemma_ft.recipe.schema import Recipe

ADAPTER_STEM = ADAPTER_WEIGHTS.removesuffix(".safetensors")  # of the file's name, as WeightFiles.open takes it


@dataclass(frozen=True)
class BaseFiles:
    """A base as its files hold it. Each is read when it is first asked for, and kept; what is handed out is not to be
    changed. A hub id has been downloaded.
    """

    source: Source

    @cached_property
    def folder(self) -> Path:
        """Its folder on this machine."""
        return folder_of(self.source, downloaded=True)

    @cached_property
    def weights(self) -> WeightFiles:
        """Headers of the text model's files, no tensor. Raises: UserError, as WeightFiles.open."""
        return model_weights(self.folder)

    @cached_property
    def sha256(self) -> str:
        """The fingerprint of its weights."""
        return self.weights.fingerprint()

    @cached_property
    def config(self) -> PreTrainedConfig:
        """Its config.json. Raises: UserError, as config_in."""
        return config_in(self.folder)

    @cached_property
    def empty_model(self) -> GemmaForCausalLM | GemmaForSequenceClassification:
        """A model of that config without any memory: names and shapes. Of a reward model's folder it is one."""
        with torch.device("meta"):
            return GemmaForSequenceClassification(self.config) if self.reward else GemmaForCausalLM(self.config)

    @cached_property
    def reward(self) -> bool:
        """Whether it is a reward model."""
        return names_reward_model(self.config.architectures)

    def unlike(self, contract: Contract | None) -> str | None:
        """The fingerprint of this base where it is not the one that `contract` names; None where it is, or where no
        contract tells.
        """
        expected = contract.base_sha256 if contract is not None else None
        return self.sha256 if expected is not None and self.sha256 != expected else None


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as its folder holds it, read as `BaseFiles` are."""

    folder: Path

    @cached_property
    def fields(self) -> dict[str, Any]:
        """What adapter_config.json says, as it stands there. Raises: UserError, as read_fields."""
        return read_fields(self.folder)

    @cached_property
    def config(self) -> Any:
        """PEFT's config of it, by a text model's own names. Raises: UserError for one that is not computed here."""
        return native_config(adapter_config(self.folder, self.fields), self._stored_names)

    @cached_property
    def weights(self) -> WeightFiles:
        """Headers, no tensor, under the names of a text model alone. Raises: UserError, as WeightFiles.open; for an
        adapter that changes another model of a multimodal folder.
        """
        files = WeightFiles.open(self.folder, ADAPTER_STEM, native_key)
        if files.left:
            raise UserError(
                f"{self.folder}: changes {min(files.left).removeprefix(PREFIX)}, which is no part of the text model; "
                "train with target_modules that name layers of the language model alone"
            )
        return files

    @property
    def renamed(self) -> bool:
        """Whether the file has the names of a multimodal folder's class."""
        return any(self.weights.info(name).name != name for name in self.weights.names)

    def _stored_names(self) -> list[str]:
        """The names in the file; none where it cannot be read, which is told where it is."""
        try:
            return WeightFiles.open(self.folder, ADAPTER_STEM).names
        except UserError:
            return []

    @cached_property
    def hash(self) -> str:
        """What a contract knows the adapter by. Raises: UserError, as adapter_hash."""
        return adapter_hash(self.folder, self.fields)

    def base(self) -> Source:
        """The base model that it names. Raises: UserError where it names none, or what is no model."""
        name, path = self.config.base_model_name_or_path, self.folder / ADAPTER_CONFIG
        if not name or not isinstance(name, str):
            raise UserError(f"{path}: names no base model; pass the base as path and this as adapter")
        try:
            return model_source(name, self.config.revision, key=f"{path}: base model ")
        except UserError as error:
            raise UserError(f"{error}; or give the base as MODEL, and this with --adapter") from error


@dataclass(frozen=True)
class Place:
    """What a name that a user gives stands for: the base, the adapter on it, and what was agreed when it was trained.

    `folder` holds the tokenizer. A hub id has been downloaded, and is pinned to its commit. `of_base` and `of_adapter`
    are their files; left out, they are those of `base` and `adapter`, not opened yet.
    """

    base: Source
    adapter: Path | None
    folder: Path
    contract: Contract | None
    of_base: BaseFiles = None  # type: ignore[assignment]  # __post_init__ gives it one
    of_adapter: AdapterFiles | None = None

    def __post_init__(self) -> None:
        if self.of_base is None or self.of_base.source != self.base:
            object.__setattr__(self, "of_base", BaseFiles(self.base))
        if self.adapter is None:
            object.__setattr__(self, "of_adapter", None)
        elif self.of_adapter is None or self.of_adapter.folder != self.adapter:
            object.__setattr__(self, "of_adapter", AdapterFiles(self.adapter))

    @property
    def trained_in(self) -> str:
        """The name of the dtype to compute in unless another is asked for: that of training, where it is known."""
        return (self.contract.precision if self.contract is not None else None) or "bf16"

    @property
    def trained_over(self) -> Kind | None:
        """How the frozen weights were stored while the adapter was trained."""
        return self.contract.quantize if self.contract is not None and self.adapter is not None else None

    @property
    def reward(self) -> bool:
        """Whether it is a reward model: a number for an answer, and no text."""
        adapter = self.of_adapter
        return (adapter is not None and scores(adapter.config)) or self.of_base.reward

    @cached_property
    def run(self) -> RunFiles | None:
        """The run that the adapter, or a whole model's folder, lies in; None where it lies in none."""
        folder = self.adapter or (Path(self.base.name) if Path(self.base.name).is_absolute() else None)
        run = RunFiles(folder.resolve().parent) if folder is not None else None
        return run if run is not None and run.recipe.is_file() else None

    @cached_property
    def recipe(self) -> Recipe | None:
        """The recipe of that run; None where there is none, or it is damaged or of another version."""
        try:
            return load_recipe(self.run.recipe).recipe if self.run is not None else None
        except UserError:
            return None

    def with_adapter(self, folder: Path) -> Place:
        """This base with the adapter in `folder`, of an adapter or a run, and its contract.

        Raises: UserError where none lies there, or one that is not computed here.
        """
        found = adapter_in(folder)
        if found is None:
            raise UserError(f"{folder}: no {ADAPTER_CONFIG} in it; name a run or a PEFT adapter folder")
        if found == self.adapter:
            return self
        place = replace(self, adapter=found, folder=_tokenizer_beside(found, self), contract=Contract.read(found))
        assert place.of_adapter is not None
        _ = place.of_adapter.config  # one that is not computed here is refused before anything is read
        return place

    def check(self) -> None:
        """Raises UserError when the adapter is not the file that was saved, or was trained on another base."""
        contract, adapter = self.contract, self.of_adapter
        if adapter is None or contract is None:
            return
        if contract.adapter_sha256 is not None and contract.adapter_sha256 != adapter.hash:
            raise UserError(
                f"{adapter.folder}: {ADAPTER_WEIGHTS} or {ADAPTER_CONFIG} is not the file that was saved ({CONTRACT}); "
                "fetch both again"
            )
        found = self.of_base.unlike(contract)
        if found is not None:
            raise UserError(
                f"{adapter.folder}: was trained on {contract.base} with fingerprint {str(contract.base_sha256)[:12]}, "
                f"but {self.base.name} has {found[:12]} ({CONTRACT}); give the base that it was trained on"
            )
        if contract.base_sha256 is None or contract.numerics_sha256 is None:
            return
        if contract.numerics_sha256 != numerics_hash(self.of_base.config):
            raise UserError(
                f"{self.of_base.folder}/config.json: has another window, scale, cap or shape than when "
                f"{adapter.folder} was trained ({CONTRACT}); restore it"
            )


def place_of(path: str | Path, adapter: str | Path | None = None) -> Place:
    """The place of a run directory, an adapter folder, a model folder or a hub id; `adapter`: one to put on it.

    A run directory stands for its adapter on its base, or for its fully tuned model.
    Raises: UserError when there is no such model, or the adapter's base cannot be found.
    """
    folder, hub = Path(located(path)), None
    if not folder.exists():
        hub = pinned(model_source(str(path)))
        folder = folder_of(hub, downloaded=True)
    own = adapter_in(folder)
    found = own if adapter is None else adapter_in(Path(located(adapter)))
    if adapter is not None and found is None:
        refuse_no_adapter(Path(adapter))
    opened = AdapterFiles(found) if found is not None else None
    if opened is not None:
        _ = opened.config  # one that is not computed here is refused before anything is read
        if not (opened.folder / ADAPTER_WEIGHTS).is_file():
            raise UserError(f"{opened.folder}: no {ADAPTER_WEIGHTS} in it; other forms of weights are not opened")
    if own is None:
        folder = model_in(folder) or folder
    if (folder / "config.json").is_file():
        source = hub or model_source(str(folder))
    elif own is not None:
        source = pinned((opened if opened is not None and own == found else AdapterFiles(own)).base())
    elif folder.is_dir():
        for file in sorted(folder.glob("*.gguf")):
            refuse_file(file)
        raise UserError(
            f"{path}: neither a model, an adapter nor a finished run; expected config.json or adapter/ in it"
        )
    else:
        source = model_source(str(path))  # a file: refused
    place = model_place(source)
    if opened is None:
        return replace(place, contract=Contract.read(place.folder))
    beside, contract = _tokenizer_beside(opened.folder, place), Contract.read(opened.folder)
    return replace(place, adapter=opened.folder, folder=beside, contract=contract, of_adapter=opened)


def model_place(source: Source) -> Place:
    """The place of a model alone, whatever it was made of: downloaded, pinned, and without a contract."""
    base = BaseFiles(pinned(source))
    return Place(base.source, None, base.folder, None, base)


def _tokenizer_beside(adapter: Path, place: Place) -> Path:
    """Where the tokenizer lies: an adapter of another toolkit may come without one, and then the base's serves."""
    return adapter if brings_tokenizer(adapter) else place.of_base.folder
