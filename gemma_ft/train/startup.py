"""What a run will do, before it begins, in lines that a person can check."""

from __future__ import annotations

from typing import Any

import torch

from gemma_ft.adapters.trainable_tokens import native_of
from gemma_ft.build.data import BuiltData
from gemma_ft.build.located import Source, folder_of
from gemma_ft.build.text_weights import model_weights, others_told
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.own_template import UnknownTemplate, own_encoder
from gemma_ft.evaluate.forgetting import ForgettingSet
from gemma_ft.kernels.backend import choice_of, describe
from gemma_ft.kernels.triton.triton_backend import CAPABILITY
from gemma_ft.model.attention import resolve_attention
from gemma_ft.recipe.batch_plan import BatchPlan
from gemma_ft.recipe.objectives import Preference, reference_kind
from gemma_ft.recipe.schema import Recipe
from gemma_ft.system import hardware
from gemma_ft.train.activation_checkpointing import Checkpointing
from gemma_ft.train.distributed import World
from gemma_ft.train.objective_settings import settings_of
from gemma_ft.train.optimizers import describe_optimizer

REFERENCES = {
    "none": "nothing: it has no reference",
    "adapter_off": "the same model, its adapter switched off",
    "start": "the adapter that it starts from, frozen",
    "precomputed": "the model as it is now, its log-probabilities computed before training",
}
FILLS = 4096  # tokens of a micro-batch that keep a GPU busy for longer than its kernels take to be started


def startup_lines(
    recipe: Recipe,
    data: BuiltData,
    canary: ForgettingSet | None,
    model: Any,
    source: Source | None,
    total: int,
    batch: BatchPlan,
    world: World,
    checkpointing: Checkpointing,
) -> list[tuple[str, str]]:
    """What is about to happen, in lines a person can check."""
    base = native_of(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    how = {
        "full": f"all {trainable:,} weights trained",
        "lora": f"LoRA: {trainable:,} weights trained",
        "qlora": f"{recipe.quantize.kind if recipe.quantize else ''} + LoRA: {trainable:,} weights trained",
    }[recipe.strategy]
    numerics = base.model.numerics
    choice = resolve_attention(recipe.model.attention, numerics.attn_softcap, windows=numerics.windowed)
    train = recipe.train
    if recipe.model.added_tokens:
        how += f", rows of {len(recipe.model.added_tokens)} added tokens among them"
    beside = others_told(model_weights(folder_of(source, downloaded=True))) if source is not None else None
    lines = data.train.stats.describe().splitlines()
    rows = [
        *_objective_rows(recipe, data),
        ("model", f"{recipe.model.preset} from {source.name if source else 'fresh weights'}, {how}, {train.precision}"),
        *([("", beside)] if beside is not None else []),
        ("attention", f"{choice.name}: {choice.reason}"),
        *_device_rows(base, train.precision),
        ("data", f"{data.train_source}: {lines[0]}"),
        *(("", line) for line in lines[1:]),
        *((("format", "")[number > 0], line) for number, line in enumerate(data.train_format.splitlines())),
    ]
    if data.train.stats.terminators:
        rows += _template_rows(data.encoder)
    if data.skipped:
        rows.append(("", f"{len(data.skipped):,} bad rows left out, see bad_rows.jsonl"))
    if data.held_out is not None:
        totals, _, *notes = data.held_out.stats.describe().splitlines()
        rows += [("held out", f"{data.eval_source}: {totals}"), *(("", note) for note in notes)]
    if canary is not None:
        rows.append(("canary", f"{recipe.eval.canary}: {canary.rows} general rows, to see what is forgotten"))
    if data.overlap:
        rows.append(("", f"{data.overlap:,} held-out rows are training rows too: their scores mean little"))
    devices = "1 device" if world.size == 1 else f"{world.size} devices"
    cut = f"{batch.micro_batch_size} (micro batch) x {batch.accumulation_steps} (accumulation) x {devices}"
    if world.size > 1:
        rows.append(("ranks", f"{world.size}, {sharing(world)}"))
    of = "" if recipe.objective.rows == "answers" else f" {data.train.stats.example_word}"
    rows.append(("batch", f"{batch.global_batch_size}{of} = {cut}"))
    if batch.micro_batch_size < train.micro_batch_size:
        rows.append(("", f"micro_batch_size {train.micro_batch_size} would leave devices without rows"))
    elif base.device.type == "cuda":
        stats = data.train.stats
        rows += _small(batch, round(stats.tokens / max(stats.packed_rows, 1)))
    rows.append(("memory", checkpointing.describe()))
    moments = describe_optimizer(train, model)
    rows += [("optimizer", moments)] if moments is not None else []
    rows.append(("steps", f"{total:,} at learning rate {train.learning_rate:g}, {train.schedule}"))
    return rows


def _objective_rows(recipe: Recipe, data: BuiltData) -> list[tuple[str, str]]:
    """What is minimized, and what is compared with, of a run that learns from preferences."""
    objective = recipe.objective
    if not isinstance(objective, Preference):
        return []
    told = [
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {str(value).lower()}"
        for name, value in settings_of(recipe, data).items()
    ]
    start = recipe.adapter.start if recipe.adapter is not None else None
    kind = reference_kind(objective, recipe.strategy, start)
    against = REFERENCES.get(kind, f"the model in {kind}, its log-probabilities computed before training")
    dropped = "" if objective.dropout else "; no dropout"
    return [("objective", f"{objective.kind}, {', '.join(told)}"), ("", f"compared with {against}{dropped}")]


def _template_rows(encoder: ChatEncoder) -> list[tuple[str, str]]:
    """What to know where the base was tuned on chats in another template than a run trains."""
    try:
        own = own_encoder(encoder.tokenizer, "base").format.name
    except UnknownTemplate:
        own = "a template that is not known here"
    if own == encoder.format.name:
        return []
    return [("chats", f"the base was tuned in {own}; this run trains {encoder.format.name}, in which it is then asked")]


def sharing(world: World) -> str:
    """How several ranks share a model, in words."""
    if world.layout == "ddp":
        return "each with the whole model (DDP); gradients are summed"
    parts = ["the model cut into slices (FSDP2), gathered layer by layer"]
    if not world.reshard_after_forward:
        parts.append("kept whole between forward and backward")
    if world.offload:
        parts.append("slices on the CPU")
    return ", ".join(parts)


def _small(batch: BatchPlan, tokens: int) -> list[tuple[str, str]]:
    """What to set where micro-batches of rows of so many tokens leave a GPU waiting for what starts its kernels."""
    micro, on_a_rank = batch.micro_batch_size, batch.global_batch_size // batch.ranks
    larger = [size for size in range(micro + 1, on_a_rank + 1) if on_a_rank % size == 0]
    if micro * tokens >= FILLS or not larger:
        return []
    enough = next((size for size in larger if size * tokens >= FILLS), larger[-1])
    told = f"micro-batches of about {micro * tokens:,} tokens are small for a GPU; train.micro_batch_size={enough}"
    return [("", f"{told} would make them {enough * tokens:,}, and change no result")]


def _device_rows(base: Any, precision: str) -> list[tuple[str, str]]:
    """What runs on the device of the base model, and what it does not do well."""
    dtype = hardware.dtype_by_name(precision)
    said = describe(base.device, dtype)
    rows = [("kernels", said)] if said else []
    if base.device.type != "cuda":
        return rows
    softcap = base.model.numerics.attn_softcap
    if resolve_attention(base.config._attn_implementation, softcap).name == "blockwise":
        chosen = choice_of("attention", base.device, dtype, head_dim=base.config.head_dim)
        without = (
            "attention is torch's SDPA with a mask" if softcap is None else "every score of attention is written out"
        )
        flexes = chosen.implementation.name == "flex"
        rows.append(("", chosen.reason if flexes else f"{without}: {chosen.reason}"))
    if precision == "bf16" and torch.cuda.get_device_capability(base.device) < CAPABILITY:
        rows.append(("", "this GPU has no bf16 of its own and is slow in it; train.precision=float32 may be faster"))
    return rows
