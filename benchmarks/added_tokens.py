"""What training the rows of added tokens costs in a step, by our rows and by PEFT's `trainable_token_indices`.

.venv/bin/python -m benchmarks.added_tokens        writes benchmarks/results/added_tokens.json

Both have the same Gemma 2 (two layers, the vocabulary and width of the 2B), LoRA, tokens and fused head; two tokens are
added. Each arm runs in a process of its own, in turn; the best step and the least peak of each count.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.shared.record import write_result

VOCAB, WIDTH, LAYERS, TOKENS, ADDED = 256_000, 2304, 2, 512, 2
STEPS, ROUNDS = 4, 3
ARMS = ("none", "ours", "peft")


def model_of(arm: str) -> Any:
    """The model of an arm in training mode, LoRA on it."""
    from peft import LoraConfig, get_peft_model

    from gemma_ft.families.records import PRESETS
    from gemma_ft.model.added_rows import AddedRows
    from gemma_ft.model.gemma import GemmaForCausalLM

    torch.manual_seed(0)
    config = PRESETS["gemma-2-2b"].config(
        vocab_size=VOCAB + (ADDED if arm == "peft" else 0), num_hidden_layers=LAYERS, dtype=torch.bfloat16
    )
    torch.set_default_dtype(torch.bfloat16)
    model = GemmaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if arm == "ours":
        model.model.added_rows = AddedRows(VOCAB, torch.randn(ADDED, WIDTH) * 0.02)
    rows = {"trainable_token_indices": {"embed_tokens": [VOCAB, VOCAB + 1]}} if arm == "peft" else {}
    wrapped = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", **rows))
    if arm == "ours":
        model.model.added_rows.requires_grad_(True)
    return wrapped.train()


def one_step(model: Any, ids: torch.Tensor) -> float:
    """Forward and backward: our head in both, given PEFT's merged weight where it has one."""
    from gemma_ft.model.lm_head import fused_head_loss

    native = model.get_base_model()
    begun = time.perf_counter()
    hidden = native.model(input_ids=ids, use_cache=False).last_hidden_state
    added = native.model.added_rows
    cap = native.model.numerics.final_softcap
    found = fused_head_loss(
        hidden, native.lm_head.weight, ids, softcap=cap, added=None if added is None else added.rows
    )
    (found.loss_sum / TOKENS).backward()
    seconds = time.perf_counter() - begun
    model.zero_grad(set_to_none=True)
    return seconds


def one_arm(arm: str) -> None:
    model = model_of(arm)
    ids = torch.randint(0, VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    if arm != "none":
        ids[:, ::16] = VOCAB + 1
    built = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = min(one_step(model, ids) for _ in range(STEPS))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, "above_the_built_model_bytes": peak - built}))


def main() -> None:
    """All arms in turn, several rounds."""
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for _ in range(ROUNDS):
        for arm in ARMS:
            told = subprocess.run([sys.executable, "-m", "benchmarks.added_tokens", arm],
                                  check=True, capture_output=True, text=True)  # fmt: skip
            found[arm].append(json.loads(told.stdout.splitlines()[-1]))
    best = {arm: {key: min(one[key] for one in ones) for key in ones[0]} for arm, ones in found.items()}
    ratios = sorted(two["seconds"] / one["seconds"] for one, two in zip(found["ours"], found["peft"], strict=True))
    write_result("added_tokens", command="python -m benchmarks.added_tokens", vocabulary=VOCAB, width=WIDTH,
                 layers=LAYERS, tokens=TOKENS, added=ADDED, rounds=ROUNDS, figures=best,
                 peft_over_ours=ratios[len(ratios) // 2])  # fmt: skip
    print(json.dumps(best, indent=2), f"PEFT takes {ratios[len(ratios) // 2]:.2f} times as long")


if __name__ == "__main__":
    one_arm(sys.argv[1]) if len(sys.argv) == 2 else main()
