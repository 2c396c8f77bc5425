"""A model from where it lies: a folder, a hub id, an adapter, the directory of a run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from gemma_ft.adapters.adapter_config import for_loading, resized_fault, saved_base_weights
from gemma_ft.adapters.class_names import key_mapping
from gemma_ft.adapters.kinds import ADAPTER_CONFIG, ADAPTER_WEIGHTS, quantized_fault
from gemma_ft.adapters.quantize import allow_packing, quantization_config
from gemma_ft.adapters.trainable_tokens import INITIAL, TRAINED, native_of
from gemma_ft.build.contract import Contract
from gemma_ft.build.located import Source, adapter_in, check_is_model, folder_of, located, refuse_file
from gemma_ft.build.new_tokens import take_rows
from gemma_ft.build.place import AdapterFiles, Place, place_of
from gemma_ft.build.reward import check_reward_head, refuse_reward_base
from gemma_ft.build.text_weights import check_fits, has_other_names, model_weights, unread
from gemma_ft.build.weights import WeightFiles
from gemma_ft.data.encode import tokenizer as tokenizers
from gemma_ft.data.encode.tokenizer_files import brings_tokenizer
from gemma_ft.errors import UserError, first_line
from gemma_ft.model.config import read_config, read_generation_config
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.model.loading import FLOAT16_OVERFLOWS
from gemma_ft.model.reward import GemmaForSequenceClassification, check_one_label
from gemma_ft.recipe.run_files import RunFiles
from gemma_ft.system import environment, hardware
from gemma_ft.system.hub import hub_reason

# What transformers, huggingface_hub and safetensors raise for files, names, access and configs that are not right.
CACHE_LINE = 64  # bytes
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
    reward: bool = False,
) -> Any:
    """A model from a folder or hub id, frozen weights quantized on the way in when asked.

    `trainable`: False for a model that is only asked: 4-bit weights may then be packed for speed, after which a
    backward is refused. `reward`: a reward model, whose head is zero where the folder is a language model's.
    Raises: UserError in one line: not a Gemma, weights that do not fit, gated, not reachable.
    """
    device = torch.device(device) if device is not None else hardware.default_device()
    files = checked_weights(source)
    if not reward:
        refuse_reward_base(files.folder, source.name)
    model_class = GemmaForSequenceClassification if reward else GemmaForCausalLM
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    if attention is not None:
        options["attn_implementation"] = attention
    if quantize is not None:
        options["quantization_config"] = quantization_config(quantize, double_quant=double_quant, compute_dtype=dtype)
    try:
        if has_other_names(files.folder):
            model = _renamed(files, model_class, options)
        else:
            model = model_class.from_pretrained(str(files.folder), **options)
    except UserError:
        raise
    except (*LOAD_ERRORS, ImportError) as error:
        raise UserError(hub_reason(error, source.name, kind="model", revision=source.revision)) from error
    if quantize == "nf4":
        from gemma_ft.adapters.nf4_linear import keep_unpacked

        keep_unpacked(model)
    if not trainable and quantize == "nf4":
        allow_packing(model)
    if not trainable and device.type == "cpu" and environment.huge_pages():
        _move_into_huge_pages(model)
    return model


def _renamed(files: WeightFiles, model_class: Any, options: dict[str, Any]) -> Any:
    """The model of a folder whose files may call its tensors otherwise, or hold other models too: transformers' loader
    is given those of the text model alone, under our names.
    """
    folder, config = files.folder, read_config(files.folder)
    if model_class is GemmaForSequenceClassification:
        check_one_label(config, folder)
    config.name_or_path = str(folder)
    if getattr(config, "quantization_config", None) is None:  # else there are more tensors than the config tells
        with torch.device("meta"):
            empty = model_class(config)
        check_fits(files, empty, str(folder))
    with unread(files) as tensors:
        model = model_class.from_pretrained(None, config=config, state_dict=tensors, **options)
    model.name_or_path = str(folder)
    if model.can_generate():
        model.generation_config = read_generation_config(folder) or model.generation_config
    return model


def _move_into_huge_pages(model: Any) -> None:
    """Take the weights out of the file that they are mapped from, whose pages are small, one at a time into one piece
    of memory: small weights have no huge pages of their own, and large ones end in small pages.
    """
    weights = [one for one in model.parameters() if type(one) is torch.nn.Parameter and one.device.type == "cpu"]
    sizes = [-(-one.nbytes // CACHE_LINE) * CACHE_LINE for one in weights]
    memory = torch.empty(sum(sizes), dtype=torch.uint8)  # of which only what is written takes memory
    for weight, place in zip(weights, memory.split(sizes), strict=True):
        moved = place[: weight.nbytes].view(weight.dtype).view(weight.shape)
        weight.data = moved.copy_(weight.data)


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
    place.check()
    adapter = place.of_adapter
    kind = place.trained_over if quantize == "auto" else quantize
    fault = quantized_fault(adapter.config, kind) if adapter is not None else None
    if fault is not None:
        raise UserError(f"{place.adapter}/{ADAPTER_CONFIG}: {fault}")
    if place.reward:
        check_reward_head(place)
    double_quant = place.contract is None or place.adapter is None or place.contract.double_quant
    model = load_base(
        place.base,
        dtype=dtype,
        quantize=kind,
        double_quant=double_quant,
        device=device,
        trainable=False,
        reward=place.reward,
    )
    if adapter is not None:
        _check_base_stays(model, adapter)
        model = put_adapter(model, adapter)
    return model.eval()


def tokenizer_of(place: Place) -> Any:
    """The tokenizer of a place, ready for text and chats. Raises: UserError when it is not Gemma's."""
    own = place.folder == (place.adapter or place.of_base.folder)
    contract = place.contract if own else Contract.read(place.folder)
    return _tokenizer_in(place.folder, contract)


def load_tokenizer(path: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer of a run directory, an adapter or model folder, or a hub id, ready for text and chats; that of its
    base for an adapter folder which brings none (PEFT saves none).

    Raises: UserError when there is none, or it is not Gemma's.
    """
    folder = Path(located(path))
    if folder.is_file():
        refuse_file(folder, str(path))
    run = RunFiles(folder)
    found = next(filter(Path.is_dir, (run.adapter, run.model)), folder)
    own = adapter_in(folder)
    if own is not None and not (folder / "config.json").is_file() and not brings_tokenizer(own):
        base = AdapterFiles(own).base()
        return tokenizers.load_tokenizer(base.name, revision=base.revision)
    return _tokenizer_in(found, Contract.read(found), revision)


def _tokenizer_in(folder: Path, contract: Contract | None, revision: str | None = None) -> Any:
    """The tokenizer of a folder or hub id, checked against the contract that lies with it."""
    trained = contract.tokenizer_sha256 if contract is not None else None
    return tokenizers.load_tokenizer(str(folder), revision=revision, trained_sha256=trained)


def put_adapter(
    model: Any, adapter: AdapterFiles, *, name: str = "default", dropout: float | None = None, training: bool = False
) -> Any:
    """`model`, which may have others already, with the adapter `name` on it, in eval mode, or in that of `training`,
    with `dropout` in front of it, where that is given (None: none in training, else its own). Raises: UserError when
    any tensor of it is damaged, missing, or has no place: PEFT would go on without it.
    """
    from peft import PeftModel, get_peft_model_state_dict

    from gemma_ft.adapters.fused_layers import with_fused_layers

    folder, names = adapter.folder, set(adapter.weights.names)
    config = for_loading(copy.deepcopy(adapter.config))  # PEFT writes to it
    native = native_of(model)
    fault = resized_fault(adapter.weights.shapes(), native.config.vocab_size)
    if fault is not None:
        raise UserError(f"{folder}: {fault}")
    take_rows(native, adapter.weights, config, folder)
    if training:
        config.lora_dropout = dropout or 0.0
    config = with_fused_layers(config)
    mapping: dict[str, Any] = {"key_mapping": key_mapping()} if adapter.renamed else {}
    try:
        if native is model:
            model = PeftModel.from_pretrained(model, str(folder), name, config=config, is_trainable=False, **mapping)
        else:
            config.inference_mode = True
            model.add_adapter(name, config)
            model.load_adapter(str(folder), name, is_trainable=False, **mapping)
    except Exception as error:  # PEFT raises many kinds for an adapter that is not this model's
        raise UserError(f"{folder}: does not fit its base: {first_line(error)}") from error
    expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).keys()
    lost = sorted(expected - names)
    foreign = sorted(names - expected - model.state_dict().keys() - {TRAINED, INITIAL})
    if lost or foreign:
        what = f"has no tensor {lost[0]}" if lost else f"{foreign[0]} belongs to no layer of its base"
        raise UserError(f"{folder}/{ADAPTER_WEIGHTS}: {what}; the adapter is not whole, or another base's")
    return model


def _check_base_stays(model: Any, adapter: AdapterFiles) -> None:
    """Raises: UserError where the weights of an adapter hold base weights that are not those of `model`: PEFT would
    put them in, and with the adapter off another model would answer than its base.
    """
    for name in saved_base_weights(adapter.weights.names, adapter.config):
        table = model.get_input_embeddings().weight
        saved = adapter.weights.tensor(name)
        if name.endswith(".bias") or (
            saved.shape == table.shape and not torch.equal(saved.to(table.dtype), table.detach().cpu())
        ):
            raise UserError(
                f"{adapter.folder}: {name} holds another weight than its base has; merge it (gemma-ft merge), or train "
                "with the base's own left as they are"
            )


def checked_weights(source: Source) -> WeightFiles:
    """The weights of the text model in a source's folder, their headers read once. Raises: UserError where they are no
    whole safetensors, an adapter lies in the folder, or its generation_config.json is damaged.
    """
    folder = folder_of(source)
    if (folder / ADAPTER_CONFIG).is_file():
        check_is_model(folder, source.name)
        raise UserError(
            f"{source.name}: an adapter lies in this model folder and would be put on unasked; "
            "move it to its own folder"
        )
    files = model_weights(folder)
    read_generation_config(folder)
    return files
