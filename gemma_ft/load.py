"""A model from where it lies: a folder, a hub id, an adapter, the directory of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from gemma_ft import runtime
from gemma_ft.adapters.quantize import keep_trainable, quantization_config
from gemma_ft.data import tokenizer as tokenizers
from gemma_ft.data.hub import hub_reason
from gemma_ft.errors import UserError
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.recipe.paths import locate

# What transformers, huggingface_hub and safetensors raise for files, names, access and configs that are not right.
LOAD_ERRORS = (OSError, ValueError, StrictDataclassError, SafetensorError)


def located(name: str) -> str:
    """A path as it stands on this machine (current directory, then the files that ship), or `name` as it is: a hub
    id.
    """
    found = locate(name)
    return str(found) if found is not None else name


@dataclass(frozen=True)
class Source:
    """Where a model comes from: an absolute folder, or a hub id with the revision asked for."""

    name: str
    revision: str | None


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
) -> Any:
    """A model from a folder or hub id, frozen weights quantized on the way in when asked.

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
    keep_trainable(model)
    return model


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    quantize: str | None = None,
    adapter: str | Path | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """A model ready for use, in eval mode, from a run directory, an adapter folder, a model folder or a hub id.

    `quantize`: None, "nf4" or "int8" for the frozen weights. `adapter`: an adapter folder to put on the model that
    `path` names. A run directory gives its adapter on its base, or its fully tuned model.
    Raises: UserError when there is no such model, or the adapter's base cannot be found.
    """
    if quantize not in (None, "nf4", "int8"):
        raise UserError(f"quantize: expected nf4 or int8, got {quantize!r}")
    if dtype == torch.float16:
        raise UserError("dtype: float16 overflows in Gemma, whose activations pass 65504; use bfloat16 or float32")
    folder = Path(located(str(path)))
    if adapter is None:
        inside = [folder / "adapter", folder]
        adapter = next((place for place in inside if (place / "adapter_config.json").is_file()), None)
    elif not (Path(adapter) / "adapter_config.json").is_file():
        raise UserError(f"{adapter}: no adapter_config.json in it; name a PEFT adapter folder")
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    if folder.is_dir() and (folder / "config.json").is_file():
        source = model_source(str(folder))
    elif adapter is not None:
        source = _base_of(Path(adapter))
    elif folder.is_dir():
        raise UserError(
            f"{path}: neither a model, an adapter nor a finished run; expected config.json or adapter/ in it"
        )
    else:
        source = model_source(str(path))
    if adapter is not None and not (Path(adapter) / "adapter_model.safetensors").is_file():
        raise UserError(f"{adapter}: no adapter_model.safetensors in it; other forms of weights are not opened")
    model = load_base(source, dtype=dtype, quantize=quantize, device=device)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter), is_trainable=False)
    return model.eval()


def load_tokenizer(path: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer of a run directory, an adapter or model folder, or a hub id, ready for text and chats.

    Raises: UserError when there is none, or it is not Gemma's.
    """
    folder = Path(located(str(path)))
    inside = (folder / "adapter", folder / "model")
    return tokenizers.load_tokenizer(str(next(filter(Path.is_dir, inside), folder)), revision=revision)


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
