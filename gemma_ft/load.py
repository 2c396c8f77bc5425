"""A model from where it lies: a folder, a hub id, an adapter, the directory of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from gemma_ft import runtime
from gemma_ft.adapters.quantize import allow_packing, keep_trainable, quantization_config
from gemma_ft.contract import CONTRACT, Contract
from gemma_ft.data import tokenizer as tokenizers
from gemma_ft.data.hub import hub_reason
from gemma_ft.errors import UserError
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.recipe.paths import locate
from gemma_ft.weights import Source, WeightFiles, folder_of

# What transformers, huggingface_hub and safetensors raise for files, names, access and configs that are not right.
LOAD_ERRORS = (OSError, ValueError, StrictDataclassError, SafetensorError)


def located(name: str) -> str:
    """A path as it stands on this machine (current directory, then the files that ship), or `name` as it is: a hub
    id.
    """
    found = locate(name)
    return str(found) if found is not None else name


def model_source(name: str, revision: str | None = None, *, key: str = "") -> Source:
    """An absolute folder or a hub id out of what a user wrote; `key` begins the message of the error."""
    found = locate(name)
    if found is not None and found.is_dir():
        return Source(str(found.resolve()), None)
    if found is not None or not tokenizers.HUB_ID.fullmatch(name):
        raise UserError(f"{key}{name}: no such folder; name a folder with a model, or a hub id (owner/name)")
    return Source(name, revision)


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

    `trainable`: False for a model that is only asked: 4-bit weights may then be packed for speed, after which no
    gradient passes them.
    Raises: UserError in one line: not a Gemma, weights that do not fit, gated, not reachable.
    """
    device = torch.device(device) if device is not None else runtime.default_device()
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    if attention is not None:
        options["attn_implementation"] = attention
    if source.revision is not None:
        options["revision"] = source.revision
    if quantize is not None:
        options["quantization_config"] = quantization_config(quantize, double_quant=double_quant, compute_dtype=dtype)
    try:
        model = GemmaForCausalLM.from_pretrained(source.name, **options)
    except UserError:
        raise
    except LOAD_ERRORS as error:
        raise UserError(hub_reason(error, source.name, kind="model", revision=source.revision)) from error
    if trainable:
        keep_trainable(model)
    elif quantize == "nf4":
        allow_packing(model)
    return model


@dataclass(frozen=True)
class Place:
    """What a name that a user gives stands for: the base, the adapter on it, and what was agreed when it was trained.

    `folder` holds the tokenizer; None: it is the hub id's.
    """

    base: Source
    adapter: Path | None
    folder: Path | None
    contract: Contract | None


def place_of(path: str | Path, adapter: str | Path | None = None) -> Place:
    """The place of a run directory, an adapter folder, a model folder or a hub id; `adapter`: one to put on it.

    A run directory stands for its adapter on its base, or for its fully tuned model.
    Raises: UserError when there is no such model, when the adapter's base cannot be found, or is not the one that the
    adapter was trained on.
    """
    folder = Path(located(str(path)))
    given = adapter is not None
    found = _adapter_in(folder if adapter is None else Path(adapter))
    if given and found is None:
        raise UserError(f"{adapter}: no adapter_config.json in it; name a PEFT adapter folder, or a run with one")
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    if folder.is_dir() and (folder / "config.json").is_file():
        source = model_source(str(folder))
    elif found is not None and not (given and not folder.exists()):
        source = _base_of(found)
    elif folder.is_dir():
        raise UserError(
            f"{path}: neither a model, an adapter nor a finished run; expected config.json or adapter/ in it"
        )
    else:
        source = model_source(str(path))
    if found is not None and not (found / "adapter_model.safetensors").is_file():
        raise UserError(f"{found}: no adapter_model.safetensors in it; other forms of weights are not opened")
    base = Path(source.name) if Path(source.name).is_absolute() else None
    # An adapter of another toolkit may come without a tokenizer: then the base's serves.
    beside = found if found is not None and (found / "tokenizer_config.json").is_file() else base
    agreed = found or base
    return Place(source, found, beside, Contract.read(agreed) if agreed is not None else None)


def check_base(place: Place) -> None:
    """Raises UserError when the adapter of a place was trained on other weights than those of its base."""
    contract = place.contract
    if place.adapter is None or contract is None or contract.base_sha256 is None:
        return
    found = WeightFiles.open(folder_of(place.base)).fingerprint()
    if found != contract.base_sha256:
        raise UserError(
            f"{place.adapter}: was trained on {contract.base} with fingerprint {contract.base_sha256[:12]}, but "
            f"{place.base.name} has {found[:12]} ({CONTRACT}); give the base that it was trained on"
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
    tuned model. The model is to be asked, not trained on.
    Raises: UserError when there is no such model, or the adapter's base cannot be found or is another.
    """
    if quantize not in (None, "nf4", "int8", "auto"):
        raise UserError(f"quantize: expected nf4, int8 or auto, got {quantize!r}")
    if dtype == torch.float16:
        raise UserError("dtype: float16 overflows in Gemma, whose activations pass 65504; use bfloat16 or float32")
    place = place_of(path, adapter)
    check_base(place)
    contract, double_quant = place.contract, True
    if contract is not None and place.adapter is not None:
        double_quant = contract.double_quant
    if quantize == "auto":
        quantize = contract.quantize if contract is not None and place.adapter is not None else None
    model = load_base(
        place.base, dtype=dtype, quantize=quantize, double_quant=double_quant, device=device, trainable=False
    )
    if place.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(place.adapter), is_trainable=False)
    return model.eval()


def load_tokenizer(path: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer of a run directory, an adapter or model folder, or a hub id, ready for text and chats.

    Raises: UserError when there is none, or it is not Gemma's.
    """
    folder = Path(located(str(path)))
    inside = (folder / "adapter", folder / "model")
    return tokenizers.load_tokenizer(str(next(filter(Path.is_dir, inside), folder)), revision=revision)


def _adapter_in(folder: Path) -> Path | None:
    """The adapter folder that a run or an adapter folder stands for, or None."""
    return next((one for one in (folder / "adapter", folder) if (one / "adapter_config.json").is_file()), None)


def _base_of(adapter: Path) -> Source:
    """The base model that an adapter folder names."""
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{adapter}/adapter_config.json: cannot be read as a PEFT adapter: {error}") from error
    name = config.base_model_name_or_path
    if not name:
        raise UserError(
            f"{adapter}/adapter_config.json: names no base model; pass the base as path and this as adapter"
        )
    return model_source(name, config.revision, key=f"{adapter}/adapter_config.json: base model ")
