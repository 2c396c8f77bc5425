"""What travels with exported weights, whatever their form: model card, notice, contract and certificate, without a path
of the machine that wrote them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from gemma_ft.build.contract import CONTRACT, Contract, asking_encoder
from gemma_ft.build.place import Place
from gemma_ft.build.pretrained import tokenizer_of
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.own_template import UnknownTemplate
from gemma_ft.data.encode.tokenizer import load_tokenizer
from gemma_ft.export.card.license import License, license_of
from gemma_ft.export.card.model_card import Card
from gemma_ft.export.card.run_record import RunRecord, public, read_record
from gemma_ft.export.form_names import FormName
from gemma_ft.families.records import PRESETS
from gemma_ft.recipe.run_files import FACTS
from gemma_ft.system.files import as_json

CARD, NOTICE = "README.md", "NOTICE"


@dataclass(frozen=True)
class ExportMetadata:
    """What the metadata of one export says. name: a hub id, or the name of the new folder; base: how others may name
    the base, None for fresh weights.
    """

    name: str
    config: PreTrainedConfig
    contract: Contract | None
    terms: License
    record: RunRecord
    base: str | None
    chats: ChatEncoder | UnknownTemplate  # how it is asked, or why that is not known
    reward: bool = False  # a reward model
    graft: bool = False  # the weights are put back among the files of a multimodal original

    @property
    def encoder(self) -> ChatEncoder:
        """How its chats are asked. Raises: UnknownTemplate where that is not known."""
        if isinstance(self.chats, UnknownTemplate):
            raise self.chats
        return self.chats

    @property
    def notes(self) -> list[str]:
        """What a user should know of a chat template that is copied as it is."""
        return [str(self.chats)] if isinstance(self.chats, UnknownTemplate) else []

    @classmethod
    def of(cls, place: Place, name: str, base_id: str | None = None) -> ExportMetadata:
        """The metadata of a place. Raises: UserError when its config.json cannot be read, or its tokenizer is not that
        of its contract.
        """
        config, contract = config_of(place), place.contract
        known = contract.base if contract is not None else place.base.name
        chats = _chats(tokenizer_of(place), place.folder, contract, place.of_base.folder)
        return cls(
            name=name,
            config=config,
            contract=contract,
            terms=license_of(config, contract),
            record=read_record(place),
            base=base_id or public(known, "base"),
            chats=chats,
            reward=place.reward,
        )

    def grafted(self, original: Path, contract: Contract | None) -> ExportMetadata:
        """The same, of weights among the files of `original`; contract: what is written beside them. Without one chats
        are asked as the original's own template has them.
        """
        if contract is not None:
            return replace(self, graft=True)
        return replace(self, graft=True, chats=_chats(load_tokenizer(str(original)), original, None, original))

    def write(
        self,
        folder: Path,
        form: FormName,
        *,
        file: str | None = None,
        merge: dict[str, Any] | None = None,
        rounded_to: str | None = None,
    ) -> None:
        """Write `texts` into a folder, over its gemma_ft.json and merge.json."""
        texts = self.texts(form, Contract.read(folder), file=file, merge=merge, rounded_to=rounded_to)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")

    def texts(
        self,
        form: FormName,
        contract: Contract | None,
        *,
        file: str | None = None,
        merge: dict[str, Any] | None = None,
        rounded_to: str | None = None,
    ) -> dict[str, str]:
        """The metadata by file name: README.md, NOTICE where the terms ask for one, and for readers elsewhere the
        `contract` of the folder and merge.json.

        file: the GGUF file in the folder. merge: the facts of the merge that made the weights (default: the record's).
        rounded_to: the type that the weights were cast to since; the merge's certificate is then not of these, and
        merge.json stays away.
        """
        record = replace(self.record, merge=public(merge or self.record.merge))
        chats = self.chats if isinstance(self.chats, ChatEncoder) else None
        card = Card(
            self.name, form, self.config, self.contract, self.terms, record, self.base, file, rounded_to, chats,
            graft=self.graft, sealed=not self.graft or contract is not None, reward=self.reward,
        )  # fmt: skip
        found = {CARD: card.text()}
        if contract is not None:
            found[CONTRACT] = replace(contract, base=self.base).text()
        if record.merge is not None and form != "adapter" and rounded_to is None:
            found[FACTS] = as_json(record.merge)
        if self.terms.notice is not None:
            found[NOTICE] = self.terms.notice
        return found


def _chats(tokenizer: Any, where: Path, contract: Contract | None, model: Path) -> ChatEncoder | UnknownTemplate:
    try:
        return asking_encoder(tokenizer, where, contract, model)
    except UnknownTemplate as error:
        return error


def config_of(place: Place) -> PreTrainedConfig:
    """The config of a place's model: of its folder, else of its preset, else of the hub.

    Raises: UserError when none of them has one.
    """
    preset = place.contract.preset if place.contract is not None else None
    if not Path(place.base.name).is_absolute() and preset in PRESETS:
        return PRESETS[preset].config()
    return place.of_base.config
