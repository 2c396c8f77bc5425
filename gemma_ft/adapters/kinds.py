"""Which adapters of PEFT are computed here as PEFT computes them, and why the others are not: its types, the options of
its LoRA, and the starts of its LoRA. None: computed; else what a user is told.

A type or an option that PEFT has and these tables lack fails a test. Source: peft 0.21.2 utils/peft_types.py,
tuners/lora/config.py and tuners/lora/layer.py.
"""

from __future__ import annotations

from typing import Any

from gemma_ft.families.family import LINEARS

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names for its files

_MERGE = "merge it with PEFT (merge_and_unload) where it was trained, and give the merged folder"
_LAYERS = f"it changes layers otherwise than LoRA does; {_MERGE}"
_AROUND = "part of it is not in the layers but around the model, and cannot be merged either; train LoRA"
_CONVERT = "save it as a plain LoRA with PEFT's path_initial_model_for_weight_conversion"

TYPES: dict[str, str | None] = {
    **dict.fromkeys(("LORA", "TRAINABLE_TOKENS"), None),
    **dict.fromkeys(
        (
            "ADALORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA",
            "HIRA", "HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA",
            "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT",
        ),
        _LAYERS,
    ),
    **dict.fromkeys(
        (
            "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING",
            "PROMPT_TUNING", "P_TUNING", "SHADOW", "XLORA",
        ),
        _AROUND,
    ),
}  # fmt: skip

# Of LoraConfig, where it is set.
OPTIONS: dict[str, str | None] = {
    **dict.fromkeys(
        (
            "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
            "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
            "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config",
            "megatron_core", "modules_to_save", "monteclora_config", "peft_type", "peft_version", "qalora_group_size",
            "r", "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters", "task_type",
            "trainable_token_indices", "use_bdlora", "use_dora", "use_rslora", "velora_config",
        ),
        None,
    ),
    "alora_invocation_tokens": "PEFT switches it on by the prompt's tokens, around the model; train plain LoRA",
    "arrow_config": f"it chooses among several adapters; {_MERGE}",
    "kasa_config": f"it rewrote the base; {_MERGE}",
    "layer_replication": f"it repeats layers; {_MERGE}",
    "megatron_config": "it is made for Megatron's layers; train it with transformers",
    "use_qalora": "it is made for a GPTQ base; train it without",
}  # fmt: skip

# init_lora_weights: those that leave the base as it is, and those after which "the base" is not what its folder holds.
STARTS: dict[Any, str | None] = {
    **dict.fromkeys((True, False, None, "gaussian", "eva", "mica", "orthogonal"), None),
    **dict.fromkeys(("corda", "lora_ga", "olora", "pissa", "pissa_niter_[number of iters]"), _CONVERT),
    "loftq": "save the base that it left as a folder, and the adapter with init_lora_weights: true; merge them there",
}
REWARD_TASK = "SEQ_CLS"  # of which PEFT saves the head with the adapter
TASKS = ("CAUSAL_LM", REWARD_TASK, None)


def type_fault(kind: str) -> str | None:
    """Why an adapter of a type is not computed here, or None."""
    why = TYPES.get(kind, "it is not known here")
    return None if why is None else f"a {kind} adapter is not supported: {why}"


def lora_fault(config: Any) -> str | None:
    """Why PEFT's config of a LoRA asks for what is not computed here, or None."""
    for name, why in OPTIONS.items():
        if why is not None and getattr(config, name, None):
            return f"{name} is set, which is not supported: {why}"
    start = config.init_lora_weights
    row = start.lower() if isinstance(start, str) else start
    row = "pissa_niter_[number of iters]" if isinstance(row, str) and row.startswith("pissa_niter_") else row
    if not isinstance(row, str | bool | None) or row not in STARTS:
        return f"init_lora_weights {start!r} is not known here; {_CONVERT}"
    if STARTS[row] is not None:
        return f"init_lora_weights {start!r} rewrote the base; {STARTS[row]}"
    task = _task(config)
    return None if task in TASKS else f"task_type {task} is not supported; only adapters for CAUSAL_LM and SEQ_CLS are"


def scores(config: Any) -> bool:
    """Whether an adapter makes a reward model, by PEFT's config of it."""
    return bool(_task(config) == REWARD_TASK)


def _task(config: Any) -> Any:
    return getattr(config.task_type, "value", config.task_type)


# PEFT's layers over quantized weights lack them.
_NOT_QUANTIZED = ("monteclora_config", "use_bdlora", "velora_config")


def quantized_fault(config: Any, kind: str | None) -> str | None:
    """Why an adapter cannot be computed over frozen weights that are stored as `kind`, or None."""
    if kind is None:
        return None
    if kind == "int8" and getattr(config, "use_dora", False):
        # PEFT reads each weight, and bitsandbytes then takes the layer for one whose scales it has in hand
        return "use_dora is set, which cannot be computed over int8 weights; take nf4, or the weights as they are"
    odd = next((name for name in _NOT_QUANTIZED if getattr(config, name, None)), None)
    whole = [one for one in getattr(config, "modules_to_save", None) or () if one.rpartition(".")[2] in LINEARS]
    if odd is None and not whole:
        return None
    what = f"{odd} is set" if odd is not None else f"modules_to_save names {whole[0]}"
    return f"{what}, which cannot be computed over {kind} weights; take them as they are"
