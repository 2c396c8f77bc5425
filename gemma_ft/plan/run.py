"""A run in the numbers that its memory follows from, and how they come out of a recipe."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from gemma_ft.errors import UserError
from gemma_ft.plan.activations import Attention, Layer
from gemma_ft.plan.shape import Shape, preset_shape, shape_in
from gemma_ft.plan.storage import BYTES, Kind
from gemma_ft.recipe.batch_plan import BatchPlan, batch_plan
from gemma_ft.recipe.objectives import KINDS, reference_kind
from gemma_ft.recipe.schema import Recipe
from gemma_ft.system import environment
from gemma_ft.system.hardware import cpu_flags, float32_is_faster
from gemma_ft.system.shipped import locate

Device = Literal["cuda", "cpu"]
Layout = Literal["one device", "ddp", "fsdp2"]


@dataclass(frozen=True)
class Ranks:
    """How many devices share the work, and how; the fields of train.world.World that memory depends on."""

    size: int = 1
    layout: Layout = "one device"
    reshard_after_forward: bool = True
    offload: bool = False

    @property
    def cut(self) -> int:
        """Into how many slices weights, gradients and optimizer are cut."""
        return self.size if self.layout == "fsdp2" else 1


@dataclass(frozen=True)
class Run:
    """One run. Sizes are those of one rank: `micro_batch_size` rows at a time, one sequence of `tokens` tokens each, or
    two of a pair.
    """

    shape: Shape
    strategy: Literal["full", "lora", "qlora"]
    micro_batch_size: int
    tokens: int
    accumulation_steps: int = 1
    objective: str = "sft"  # as recipe.objectives.KINDS names it
    reference: str = "none"  # as recipe.objectives.reference_kind names it
    precision: Literal["bf16", "float32"] = "bf16"
    optimizer: Literal["adamw", "adamw8bit", "lion8bit"] = "adamw"
    quantize: Literal["nf4", "int8"] | None = None
    double_quant: bool = True
    rank: int = 16
    targets: frozenset[str] | None = None  # None: all linear layers
    dora: bool = False
    dropout: bool = False
    device: Device = "cuda"
    attention: Attention = "scores"
    own_kernels: bool = False  # operations in C++ or Triton run
    widened: bool = False  # products in bf16 are computed in float32
    fused: bool = True  # where adapters are plain LoRA, their products are fused
    ranks: Ranks = Ranks()
    checkpointed: int = 0  # layers that recompute their activations
    eval_rows: int = 8
    new_tokens: int = 256
    answers: bool = True  # evaluations generate
    checkpoints: int = 3  # on the disk at once

    @property
    def full(self) -> bool:
        """Whether all weights are trained."""
        return self.strategy == "full"

    @property
    def row_sequences(self) -> int:
        """Sequences of a row: both answers of a pair."""
        return 2 if KINDS[self.objective].rows == "pairs" else 1

    @property
    def sequences(self) -> int:
        """Sequences of a micro-batch."""
        return self.micro_batch_size * self.row_sequences

    @property
    def eval_sequences(self) -> int:
        """Sequences of a micro-batch of held-out rows."""
        return self.eval_rows * self.row_sequences

    @property
    def scores(self) -> bool:
        """Whether it gives a number for each answer: a reward model."""
        return self.objective == "reward"

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return BYTES[self.precision]

    @property
    def kind(self) -> Kind:
        """How the linear layers lie in memory; all weights that are trained are float32."""
        return "float32" if self.full else self.quantize or self.precision

    @property
    def rest(self) -> int:
        """Bytes of a weight that is not in a linear layer."""
        return BYTES["float32" if self.full else self.precision]

    @property
    def trained(self) -> int:
        """Weights that are trained."""
        head = self.shape.hidden if self.scores else 0
        return head + (
            self.shape.parameters if self.full else self.shape.adapter(self.rank, self.targets, dora=self.dora)
        )

    @property
    def trained_tensors(self) -> dict[int, int]:
        """Sizes of the tensors that are trained, and how many there are of each."""
        shape, found = self.shape, Counter({self.shape.hidden: 1} if self.scores else {})
        found.update(shape.tensors if self.full else shape.adapter_tensors(self.rank, self.targets, dora=self.dora))
        return found

    @property
    def layer(self) -> Layer:
        """What decides how much a layer saves."""
        targets = frozenset(self.shape.linears if self.targets is None else self.targets)
        return Layer(
            shape=self.shape,
            tokens=self.tokens,
            element=self.element,
            attention=self.attention,
            rank=0 if self.full else self.rank,
            targets=frozenset() if self.full else targets,
            dropout=self.dropout,
            int8=self.quantize == "int8",
            fused=self.fused and not (self.full or self.dropout or self.dora or self.quantize == "int8"),
            own_kernels=self.own_kernels,
        )

    def changed(self, **fields: Any) -> Run:
        """The run with some fields replaced."""
        return replace(self, **fields)


def attention_of(requested: str, *, softcap: bool, windows: bool = False, device: Device) -> Attention:
    """What model.attention.resolve_attention and its backends come to in training, in the words of activations.py."""
    if requested == "sdpa" or (requested == "auto" and not (softcap or windows) and device == "cpu"):
        return "sdpa"
    if requested not in ("auto", "blockwise"):
        return "scores"
    if device == "cpu":
        return "blocks"
    return "flex" if environment.own_kernels_wanted() else without_flex(softcap=softcap)


def without_flex(*, softcap: bool) -> Attention:
    """What attention in blocks comes to on a GPU where FlexAttention does not run."""
    return "scores" if softcap else "sdpa"


def multiple_for(device: Device, *, packing: bool) -> int:
    """What the lengths of micro-batches are a multiple of on a kind of device. On a GPU kernels are compiled for
    lengths and work in blocks of 128 tokens; half of one is much already of rows that nothing fills.
    """
    if device != "cuda":
        return 1
    return 128 if packing else 64


def run_of(
    recipe: Recipe,
    *,
    batch: BatchPlan | None = None,
    tokens: int | None = None,
    device: Device = "cuda",
    ranks: Ranks | None = None,
) -> Run:
    """The run that a recipe describes. `batch`: how its steps are dealt (None: `batch_plan` of the recipe and ranks);
    `tokens`: of a sequence, where that is known better than the recipe says (None: max_seq_len).

    gradient_checkpointing: auto is taken as no layer: fit.py chooses. Raises: UserError for weights in a folder without
    a Gemma's config.json, and where no micro-batch deals the rows of a step to all ranks.
    """
    train, adapter = recipe.train, recipe.adapter
    ranks = ranks or Ranks()
    shape = _shape(recipe)
    batch = batch or batch_plan(recipe, ranks.size)
    multiple = multiple_for(device, packing=recipe.data.packing)
    targets = None if adapter is None or adapter.targets == "all-linear" else frozenset(adapter.targets)
    run = Run(
        shape=shape,
        strategy=recipe.strategy,
        micro_batch_size=batch.micro_batch_size,
        tokens=-(-(tokens or recipe.data.max_seq_len) // multiple) * multiple,
        accumulation_steps=batch.accumulation_steps,
        objective=recipe.objective.kind,
        reference=reference_kind(recipe.objective, recipe.strategy, adapter.start if adapter else None),
        precision=train.precision,
        optimizer=train.optimizer,
        quantize=recipe.quantize.kind if recipe.quantize else None,
        double_quant=recipe.quantize.double_quant if recipe.quantize else True,
        rank=adapter.rank if adapter else 0,
        targets=targets,
        dora=adapter.dora if adapter else False,
        dropout=bool(adapter and adapter.dropout),
        device=device,
        attention=attention_of(
            recipe.model.attention, softcap=shape.attn_softcap, windows=any(shape.windows), device=device
        ),
        own_kernels=environment.own_kernels_wanted() and (device == "cuda" or environment.compiler() is not None),
        widened=device == "cpu" and environment.own_kernels_wanted() and float32_is_faster(cpu_flags()),
        fused=environment.own_kernels_wanted(),
        ranks=ranks,
        eval_rows=recipe.eval.batch_size,
        new_tokens=recipe.eval.max_new_tokens,
        answers=bool(recipe.eval.generate_rows or recipe.eval.samples),
        checkpoints=recipe.checkpoint.keep + recipe.checkpoint.keep_best + 1,
    )
    return run.changed(checkpointed=shape.layers if train.gradient_checkpointing is True else 0)


def ranks_in(file: Path, count: int | None) -> Ranks:
    """The ranks of an accelerate config; `count`: so many instead. Raises: UserError when it is no such config."""
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read as an accelerate config") from error
    config = config if isinstance(config, dict) else {}
    size = count or config.get("num_processes", 1)
    if type(size) is not int or size < 1:
        raise UserError(f"{file}: num_processes {size!r} is no number of ranks")
    sharded = config.get("distributed_type") == "FSDP"
    settings = config.get("fsdp_config") or {}
    layout: Layout = "fsdp2" if sharded else "ddp" if size > 1 else "one device"
    return Ranks(
        size=size,
        layout=layout,
        reshard_after_forward=bool(settings.get("fsdp_reshard_after_forward", True)),
        offload=bool(settings.get("fsdp_offload_params", False)),
    )


def _shape(recipe: Recipe) -> Shape:
    """The preset's, or that of weights in a folder of this machine: it may have another vocabulary."""
    folder = locate(recipe.model.weights) if recipe.model.weights not in (None, "random") else None
    if folder is not None and Path(folder / "config.json").is_file():
        return replace(shape_in(folder), name=recipe.model.preset)
    return preset_shape(recipe.model.preset)
