"""The outlook on a run, before it begins, in lines that a person can check."""

from __future__ import annotations

from typing import Any

from gemma_ft.build import BuiltData
from gemma_ft.evaluate.canary import Canary
from gemma_ft.model.attention import resolve_attention
from gemma_ft.recipe.schema import Recipe
from gemma_ft.weights import Source


def outlook(
    recipe: Recipe, data: BuiltData, canary: Canary | None, model: Any, source: Source | None, total: int
) -> list[tuple[str, str]]:
    """What is about to happen, in lines a person can check."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    how = {
        "full": f"all {trainable:,} weights trained",
        "lora": f"LoRA: {trainable:,} weights trained",
        "qlora": f"{recipe.quantize.kind if recipe.quantize else ''} + LoRA: {trainable:,} weights trained",
    }[recipe.strategy]
    choice = resolve_attention(recipe.model.attention, base.model.numerics.attn_softcap)
    train = recipe.train
    lines = data.train.stats.describe().splitlines()
    rows = [
        ("model", f"{recipe.model.preset} from {source.name if source else 'fresh weights'}, {how}, {train.precision}"),
        ("attention", f"{choice.name}: {choice.reason}"),
        ("data", f"{data.train_source}: {lines[0]}"),
        *(("", line) for line in lines[1:]),
        ("format", data.train_format),
    ]
    if data.held_out is not None:
        totals, _, *notes = data.held_out.stats.describe().splitlines()
        rows += [("held out", f"{data.eval_source}: {totals}"), *(("", note) for note in notes)]
    if canary is not None:
        rows.append(("canary", f"{recipe.eval.canary}: {canary.rows} general rows, to see what is forgotten"))
    if data.overlap:
        rows.append(("", f"{data.overlap:,} held-out rows are training rows too: their scores mean little"))
    accumulation = train.global_batch_size // train.micro_batch_size
    cut = f"{train.micro_batch_size} (micro batch) x {accumulation} (accumulation) x 1 device"
    rows.append(("batch", f"{train.global_batch_size} = {cut}"))
    rows.append(("steps", f"{total:,} at learning rate {train.learning_rate:g}, {train.schedule}"))
    return rows
