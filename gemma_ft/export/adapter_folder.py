"""An adapter as a PEFT folder for others: the base by a name they can resolve, tokenizer and contract beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gemma_ft.adapters.kinds import ADAPTER_CONFIG, REWARD_TASK
from gemma_ft.build.place import Place
from gemma_ft.build.pretrained import tokenizer_of
from gemma_ft.build.weights import WeightFiles
from gemma_ft.data.encode.tokenizer_files import save_tokenizer
from gemma_ft.errors import UserError
from gemma_ft.system.files import write_json

# What vLLM gives a place for an adapter. Source: vllm/config/lora.py (MaxLoRARanks, max_lora_rank).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16
# Source: vllm/model_executor/models/gemma.py, gemma2.py and gemma3_mm.py: no other module takes an adapter there.
VLLM_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(place: Place, folder: Path, *, base_id: str | None = None) -> None:
    """Write what lies beside an adapter's weights into `folder`: its config, tokenizer and contract.

    base_id: the hub id that is written as the base; default: what the adapter names.
    Raises: UserError: not the base it was trained on, weights that are damaged or not finite, another tokenizer.
    """
    adapter = place.of_adapter
    assert adapter is not None, "a place with an adapter"
    if Path(place.base.name).is_absolute():  # of a hub id the weights need not be here
        place.check()
    check_finite(adapter.weights)
    tokenizer = tokenizer_of(place)
    if place.contract is not None:
        place.contract.encoder(tokenizer, place.folder)
        place.contract.write(folder)
    save_tokenizer(tokenizer, folder, system_policy=place.contract.system if place.contract is not None else None)
    # The task in place of PEFT's note on the class that was trained: stock PEFT loads either, but not a class of ours.
    task = REWARD_TASK if place.reward else "CAUSAL_LM"
    config = {**adapter.fields, "task_type": task, "auto_mapping": None}
    if base_id is not None:
        config |= {"base_model_name_or_path": base_id, "revision": None}
    write_json(folder / ADAPTER_CONFIG, config)


def check_finite(weights: WeightFiles) -> None:
    """Raises UserError naming the first tensor that holds NaN or infinity."""
    for name in weights.names:
        if not bool(torch.isfinite(weights.tensor(name)).all()):
            raise UserError(f"{weights.folder}: {name} holds NaN or infinity; the training diverged, use a checkpoint")


def vllm_notes(config: dict[str, Any], names: Sequence[str]) -> list[str]:
    """What vLLM would refuse of an adapter, or serve otherwise than it was trained; `names` are its tensors.

    Source: vllm/lora/peft_helper.py (validate_legal), and the sources of the constants above.
    """
    notes = []
    if config.get("use_dora"):
        notes.append("vLLM refuses DoRA adapters; export --to hf for it")
    if config.get("modules_to_save"):
        notes.append("vLLM refuses adapters with modules_to_save; export --to hf for it")
    if config.get("trainable_token_indices") or config.get("peft_type") == "TRAINABLE_TOKENS":
        notes.append("vLLM refuses adapters with rows of tokens; export --to hf for it")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        notes.append("vLLM refuses adapters with a bias; export --to hf for it")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        notes.append(
            "vLLM scales all modules alike, whatever rank_pattern and alpha_pattern say; export --to hf for it"
        )
    rank = max([int(config.get("r", 0)), *(config.get("rank_pattern") or {}).values()])
    room = next((size for size in VLLM_RANKS if size >= rank), None)
    if room is None:
        notes.append(f"vLLM takes ranks up to {VLLM_RANKS[-1]}, this adapter has {rank}; export --to hf for it")
    elif room > VLLM_DEFAULT_RANK:
        notes.append(f"vLLM takes ranks up to {VLLM_DEFAULT_RANK} unless told: serve with --max-lora-rank {room}")
    trained = {name.partition(".lora_")[0].rpartition(".")[2] for name in names if ".lora_" in name}
    others = sorted(trained - set(VLLM_MODULES))
    if others:
        notes.append(f"vLLM takes no adapter on {', '.join(others)} of a Gemma; export --to hf for it")
    return notes
