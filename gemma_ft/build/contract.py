"""The contract between training and serving, gemma_ft.json: it lies beside every adapter and model that is written,
and whoever serves one keeps to it or refuses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from gemma_ft.adapters.kinds import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.own_template import own_encoder
from gemma_ft.data.encode.template import unmarked
from gemma_ft.data.encode.tokenizer_files import PIECES
from gemma_ft.errors import UserError
from gemma_ft.families.chat_template import SystemPolicy
from gemma_ft.model.config import config_in, read_generation_config
from gemma_ft.system.files import file_hash

CONTRACT = "gemma_ft.json"
ONE_BOS = "once, at the start of every sequence"


@dataclass(frozen=True)
class Contract:
    """What was trained, as far as a server must know it."""

    template_sha256: str  # of the chat template under the system policy, without marks of what is trained (unmarked)
    tokenizer_sha256: str  # data.tokenizer.ContentEncoder.sha256: vocabulary, merges, added tokens
    stop_ids: list[int]
    system: SystemPolicy
    bos: str = ONE_BOS
    base: str | None = None  # folder or hub id of the weights that were tuned; None: fresh weights
    revision: str | None = None  # commit of a hub id
    base_sha256: str | None = None  # weights.WeightFiles.fingerprint of the base's text model
    preset: str | None = None
    quantize: Literal["nf4", "int8"] | None = None  # how the frozen weights were stored while the adapter was trained
    double_quant: bool = True
    precision: Literal["bf16", "float32"] | None = None  # dtype of frozen weights and activations in training
    numerics_sha256: str | None = None  # model.config.numerics_hash of the base's config.json
    adapter_sha256: str | None = None  # adapter_hash
    pieces_sha256: str | None = None  # of the bytes of tokenizer.model, where there is one
    others_sha256: str | None = None  # text_weights.others_fingerprint of the base, where its folder holds other models

    @classmethod
    def read(cls, folder: Path) -> Contract | None:
        """The contract of a folder, or None where there is none. Raises: UserError when it cannot be read."""
        path = folder / CONTRACT
        if not path.is_file():
            return None
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes(), strict=True)
        except ValidationError as error:
            key = ".".join(str(part) for part in error.errors()[0]["loc"][:1])
            where = f"{path}: {key}" if key else str(path)
            raise UserError(f"{where}: damaged; restore it from where the model was trained") from error
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error

    def said(self) -> dict[str, Any]:
        """Its fields by name; without that of other models where there are none."""
        found = asdict(self)
        if self.others_sha256 is None:
            del found["others_sha256"]
        return found

    def text(self) -> str:
        """What gemma_ft.json holds."""
        return json.dumps(self.said(), indent=2) + "\n"

    def write(self, folder: Path) -> None:
        """Write gemma_ft.json into `folder`."""
        (folder / CONTRACT).write_text(self.text(), encoding="utf-8")

    def encoder(self, tokenizer: Any, where: str | Path) -> ChatEncoder:
        """The encoder that makes prompts as they were trained.

        Raises: UserError when the tokenizer, its chat template or its stop tokens are not those of the training.
        """
        encoder = ChatEncoder(tokenizer, self.system)
        own = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
        if {encoder.template_hash, sha256_of(unmarked(own))} != {self.template_sha256}:
            raise UserError(f"{where}: its chat template is not the one that was trained ({CONTRACT}); {_RESTORE}")
        if self.bos != ONE_BOS:
            raise UserError(f"{where}: trained with BOS {self.bos!r} ({CONTRACT}), which this version cannot serve")
        if sorted(encoder.stop_ids) != sorted(self.stop_ids):
            raise UserError(f"{where}: stop ids {encoder.stop_ids}, but trained with {self.stop_ids}; {_RESTORE}")
        if encoder.content.sha256 != self.tokenizer_sha256:
            raise UserError(f"{where}: its vocabulary is not the one that was trained ({CONTRACT}); {_RESTORE}")
        if self.pieces_sha256 is not None and pieces_hash(tokenizer) not in (None, self.pieces_sha256):
            raise UserError(f"{where}: its {PIECES} is not the one that was trained ({CONTRACT}); {_RESTORE}")
        return encoder


_OF_THE_PLACE = {"base_model_name_or_path", "revision", "auto_mapping", "task_type", "inference_mode", "peft_version"}
_RESTORE = "restore the tokenizer files that were saved with it"


def contract_of(encoder: ChatEncoder, **facts: Any) -> Contract:
    """The contract of what an encoder's chats trained; `facts` are the fields that tell of base and quantization."""
    return Contract(
        template_sha256=encoder.template_hash,
        tokenizer_sha256=encoder.content.sha256,
        pieces_sha256=pieces_hash(encoder.tokenizer),
        stop_ids=encoder.stop_ids,
        system=encoder.trained_policy,
        **facts,
    )


def asking_encoder(tokenizer: Any, where: str | Path, contract: Contract | None, model: Path) -> ChatEncoder:
    """The encoder that asks a model as it was trained: by its contract, else in its own chat template. Its answers end
    where the contract, the template, the tokenizer or the folder of the model says.

    Raises: UserError, as Contract.encoder; UnknownTemplate, as own_encoder.
    """
    encoder = contract.encoder(tokenizer, where) if contract is not None else own_encoder(tokenizer, where)
    own = [tokenizer.eos_token_id] if contract is None and tokenizer.eos_token_id is not None else []
    return encoder.but(stop_ids=[*own, *stop_ids_in(model)])


def stop_ids_in(model: Path) -> list[int]:
    """The ids at which transformers ends an answer of the model in a folder: those of generation_config.json, or of
    config.json where there is none. Raises: UserError when a file is damaged.
    """
    config = read_generation_config(model) or (config_in(model) if (model / "config.json").is_file() else None)
    found = config.eos_token_id if config is not None else None
    ids = found if isinstance(found, list) else [] if found is None else [found]
    return [id for id in ids if type(id) is int]


def pieces_hash(tokenizer: Any) -> str | None:
    """SHA-256 (hex) of the tokenizer.model that a tokenizer was opened beside, or None."""
    pieces = Path(tokenizer.name_or_path) / PIECES
    return file_hash(pieces) if pieces.is_file() else None


def adapter_hash(folder: Path, fields: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of an adapter's weights, byte for byte, and of what its config makes of them: not of where its base
    lies or which class was wrapped. `fields`: what its adapter_config.json says (adapters.adapter_config.read_fields).

    Raises: UserError when the weights cannot be read.
    """
    decides = {key: value for key, value in fields.items() if key not in _OF_THE_PLACE}
    try:
        return sha256_of(json.dumps([file_hash(folder / ADAPTER_WEIGHTS), decides], sort_keys=True))
    except OSError as error:
        raise UserError(f"{folder / ADAPTER_CONFIG}: damaged; restore it from where the adapter was trained") from error


def sha256_of(text: str) -> str:
    """SHA-256 (hex) of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()
