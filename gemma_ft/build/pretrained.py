"""A model from where it lies: a folder, a hub id, an adapter, the directory of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from gemma_ft.adapters.adapter_config import adapter_config, for_loading, resized_fault, saved_base_weights
from gemma_ft.adapters.kinds import quantized_fault
from gemma_ft.adapters.quantize import Kind, allow_packing, quantization_config
from gemma_ft.adapters.trainable_tokens import INITIAL, TRAINED
from gemma_ft.build.contract import CONTRACT, Contract, adapter_hash
from gemma_ft.build.located import (
    ADAPTER_WEIGHTS,
    Source,
    adapter_in,
    check_is_model,
    folder_of,
    located,
    model_source,
    pinned,
    refuse_file,
    refuse_no_adapter,
)
from gemma_ft.build.new_tokens import take_rows
from gemma_ft.build.weights import WeightFiles
from gemma_ft.data.encode import tokenizer as tokenizers
from gemma_ft.data.encode.tokenizer_files import brings_tokenizer
from gemma_ft.errors import UserError, first_line
from gemma_ft.model.config import config_in, numerics_hash, read_generation_config
from gemma_ft.model.gemma import FLOAT16_OVERFLOWS, GemmaForCausalLM
from gemma_ft.system import hardware
from gemma_ft.system.hub import hub_reason

# What transformers, huggingface_hub and safetensors raise for files, names, access and configs that are not right.
LOAD_ERRORS = (OSError, ValueError, StrictDataclassError, SafetensorError)


def load_base(
    source: Source,
    *,
    dtype: torch.dtype,
    quantize: Any = None,
    double_quant: bool = True,
    attention: str | None = None,
    device: torch.device | str | None = None,
    trainable: bool = True,
) -> Any:
    """A model from a folder or hub id, frozen weights quantized on the way in when asked.

    `trainable`: False for a model that is only asked: 4-bit weights may then be packed for speed, after which a
    backward is refused.
    Raises: UserError in one line: not a Gemma, weights that do not fit, gated, not reachable.
    """
    device = torch.device(device) if device is not None else hardware.default_device()
    folder = checked_folder(source)
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    if attention is not None:
        options["attn_implementation"] = attention
    if quantize is not None:
        options["quantization_config"] = quantization_config(quantize, double_quant=double_quant, compute_dtype=dtype)
    try:
        model = GemmaForCausalLM.from_pretrained(str(folder), **options)
    except UserError:
        raise
    except (*LOAD_ERRORS, ImportError) as error:
        raise UserError(hub_reason(error, source.name, kind="model", revision=source.revision)) from error
    if quantize == "nf4":
        from gemma_ft.adapters.nf4_linear import keep_unpacked

        keep_unpacked(model)
    if not trainable and quantize == "nf4":
        allow_packing(model)
    return model


@dataclass(frozen=True)
class Place:
    """What a name that a user gives stands for: the base, the adapter on it, and what was agreed when it was trained.

    `folder` holds the tokenizer. A hub id has been downloaded, and is pinned to its commit.
    """

    base: Source
    adapter: Path | None
    folder: Path
    contract: Contract | None

    @property
    def trained_in(self) -> str:
        """The name of the dtype to compute in unless another is asked for: that of training, where it is known."""
        return (self.contract.precision if self.contract is not None else None) or "bf16"

    @property
    def trained_over(self) -> Kind | None:
        """How the frozen weights were stored while the adapter was trained."""
        return self.contract.quantize if self.contract is not None and self.adapter is not None else None


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
    if found is not None:
        adapter_config(found)  # one that is not computed here is refused before anything is read
        if not (found / ADAPTER_WEIGHTS).is_file():
            raise UserError(f"{found}: no {ADAPTER_WEIGHTS} in it; other forms of weights are not opened")
    if own is None and (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    if (folder / "config.json").is_file():
        source = hub or model_source(str(folder))
    elif own is not None:
        source = pinned(_base_of(own))
    elif folder.is_dir():
        for file in sorted(folder.glob("*.gguf")):
            refuse_file(file)
        raise UserError(
            f"{path}: neither a model, an adapter nor a finished run; expected config.json or adapter/ in it"
        )
    else:
        source = model_source(str(path))  # a file: refused
    base = folder_of(source, downloaded=True)
    # An adapter of another toolkit may come without a tokenizer: then the base's serves.
    beside = found if found is not None and brings_tokenizer(found) else base
    return Place(source, found, beside, Contract.read(found or base))


def check_base(place: Place) -> None:
    """Raises UserError when the adapter of a place is not the file that was saved, or was trained on another base."""
    contract, adapter = place.contract, place.adapter
    if adapter is None or contract is None:
        return
    if contract.adapter_sha256 is not None and contract.adapter_sha256 != adapter_hash(adapter):
        raise UserError(
            f"{adapter}: {ADAPTER_WEIGHTS} or adapter_config.json is not the file that was saved ({CONTRACT}); "
            "fetch both again"
        )
    if contract.base_sha256 is None:
        return
    folder = folder_of(place.base)
    found = WeightFiles.open(folder).fingerprint()
    if found != contract.base_sha256:
        raise UserError(
            f"{adapter}: was trained on {contract.base} with fingerprint {contract.base_sha256[:12]}, but "
            f"{place.base.name} has {found[:12]} ({CONTRACT}); give the base that it was trained on"
        )
    if contract.numerics_sha256 not in (None, numerics_hash(config_in(folder))):
        raise UserError(
            f"{folder}/config.json: has another window, scale, cap or shape than when {adapter} was trained "
            f"({CONTRACT}); restore it"
        )


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    quantize: str | None = None,
    adapter: str | Path | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """A model ready for use, in eval mode, from a run directory, an adapter folder, a model folder or a hub id.

    `quantize`: None, "nf4" or "int8" for the frozen weights, "auto" for what the adapter was trained over. `adapter`:
    an adapter folder to put on the model that `path` names. A run directory gives its adapter on its base, or its fully
    tuned model. The model is to be asked: a backward is refused where its 4-bit weights were packed for speed.
    Raises: UserError when there is no such model, or the adapter's base cannot be found or is another.
    """
    if quantize not in (None, "nf4", "int8", "auto"):
        raise UserError(f"quantize: expected nf4, int8 or auto, got {quantize!r}")
    if dtype == torch.float16:
        raise UserError(f"dtype: float16 {FLOAT16_OVERFLOWS}; use bfloat16 or float32")
    return model_at(place_of(path, adapter), dtype=dtype, quantize=quantize, device=device)


def model_at(
    place: Place, *, dtype: torch.dtype, quantize: str | None, device: torch.device | str | None = None
) -> Any:
    """The model of a place; the rest as `load_model`."""
    check_base(place)
    kind = place.trained_over if quantize == "auto" else quantize
    fault = quantized_fault(adapter_config(place.adapter), kind) if place.adapter is not None else None
    if fault is not None:
        raise UserError(f"{place.adapter}/adapter_config.json: {fault}")
    double_quant = place.contract is None or place.adapter is None or place.contract.double_quant
    model = load_base(
        place.base,
        dtype=dtype,
        quantize=kind,
        double_quant=double_quant,
        device=device,
        trainable=False,
    )
    if place.adapter is not None:
        model = _with_adapter(model, place.adapter)
    return model.eval()


def load_tokenizer(path: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer of a run directory, an adapter or model folder, or a hub id, ready for text and chats; that of its
    base for an adapter folder which brings none (PEFT saves none).

    Raises: UserError when there is none, or it is not Gemma's.
    """
    folder = Path(located(path))
    if folder.is_file():
        refuse_file(folder, str(path))
    inside = (folder / "adapter", folder / "model")
    found = next(filter(Path.is_dir, inside), folder)
    own = adapter_in(folder)
    if own is not None and not (folder / "config.json").is_file() and not brings_tokenizer(own):
        base = _base_of(own)
        return tokenizers.load_tokenizer(base.name, revision=base.revision)
    contract = Contract.read(found)
    trained = contract.tokenizer_sha256 if contract is not None else None
    return tokenizers.load_tokenizer(str(found), revision=revision, trained_sha256=trained)


def _base_of(adapter: Path) -> Source:
    """The base model that an adapter folder names."""
    config = adapter_config(adapter)
    name = config.base_model_name_or_path
    if not name or not isinstance(name, str):
        raise UserError(
            f"{adapter}/adapter_config.json: names no base model; pass the base as path and this as adapter"
        )
    try:
        return model_source(name, config.revision, key=f"{adapter}/adapter_config.json: base model ")
    except UserError as error:
        raise UserError(f"{error}; or give the base as MODEL, and this with --adapter") from error


def _with_adapter(model: Any, folder: Path) -> Any:
    """`model` with the adapter of a folder on it. Raises: UserError when any tensor of it is damaged, missing, or has
    no place: PEFT would go on without it; or would leave another base than the folder's beside it.
    """
    from peft import PeftModel, get_peft_model_state_dict

    from gemma_ft.adapters.fused_layers import with_fused_layers

    config = for_loading(adapter_config(folder))
    files = WeightFiles.open(folder, "adapter_model")
    fault = resized_fault(files.shapes(), model.config.vocab_size)
    if fault is not None:
        raise UserError(f"{folder}: {fault}")
    take_rows(model, files, config, folder)
    _check_same_base(model, files, config, folder)
    try:
        wrapped = PeftModel.from_pretrained(model, str(folder), config=with_fused_layers(config), is_trainable=False)
    except Exception as error:  # PEFT raises many kinds for an adapter that is not this model's
        raise UserError(f"{folder}: does not fit its base: {first_line(error)}") from error
    expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False).keys()
    lost = sorted(expected - set(files.names))
    foreign = sorted(set(files.names) - expected - wrapped.state_dict().keys() - {TRAINED, INITIAL})
    if lost or foreign:
        what = f"has no tensor {lost[0]}" if lost else f"{foreign[0]} belongs to no layer of its base"
        raise UserError(f"{folder}/{ADAPTER_WEIGHTS}: {what}; the adapter is not whole, or another base's")
    return wrapped


def _check_same_base(model: Any, files: WeightFiles, config: Any, folder: Path) -> None:
    """Raises: UserError where the weights of an adapter hold base weights that are not those of `model`: PEFT would
    put them in, and with the adapter off another model would answer than its base.
    """
    for name in saved_base_weights(files.names, config):
        table = model.get_input_embeddings().weight
        saved = files.tensor(name)
        if name.endswith(".bias") or (
            saved.shape == table.shape and not torch.equal(saved.to(table.dtype), table.detach().cpu())
        ):
            raise UserError(
                f"{folder}: {name} holds another weight than its base has; merge it (gemma-ft merge), or train with "
                "the base's own left as they are"
            )


def checked_folder(source: Source) -> Path:
    """The folder of a model. Raises: UserError where its weights are no whole safetensors, an adapter lies in it, or
    its generation_config.json is damaged.
    """
    folder = folder_of(source)
    if (folder / "adapter_config.json").is_file():
        check_is_model(folder, source.name)
        raise UserError(
            f"{source.name}: an adapter lies in this model folder and would be put on unasked; "
            "move it to its own folder"
        )
    WeightFiles.open(folder)
    read_generation_config(folder)
    return folder
