"""Every setting of a run, on one page: name, type, range, default, one line each, in the order of the pipeline.

A recipe holds what changes the numbers and nothing about where they are computed. This page alone has the defaults.
Unknown keys, wrong types and values out of range are refused (validate.py), never coerced: `"3"` is not 3.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from gemma_ft.families.chat_template import SystemPolicy
from gemma_ft.families.family import LINEARS
from gemma_ft.families.records import PRESETS
from gemma_ft.recipe.format_names import format_names
from gemma_ft.recipe.objectives import Objective, SupervisedFineTuning, check_objective
from gemma_ft.recipe.section import Batch, Location, Name, Rows, Section, Share, Steps, Text, rule

Column = Literal[
    "prompt", "completion", "system", "messages", "text", "chosen", "rejected", "weight", "label", "margin"
]  # fmt: skip
if TYPE_CHECKING:
    Format: TypeAlias = str
    Linear: TypeAlias = str
    Preset: TypeAlias = str
else:  # words that have their home elsewhere
    Format, Linear, Preset = Literal["auto", *format_names()], Literal[LINEARS], Literal[tuple(PRESETS)]


class Source(Section):
    """Rows that lie together. In a recipe a source may also be its path alone."""

    path: Location = Field(
        description="File (.jsonl .json .csv .tsv .parquet .arrow .txt; .gz .zst), folder, pattern, URL, hub data set"
    )
    split: Text = Field("train", description="Split of a hub data set, or of a folder that names splits; or all")
    revision: Text | None = Field(None, description="Revision of a hub data set")
    format: Format | None = Field(None, description="Not set: data.format")
    columns: dict[Column, Text] | None = Field(None, description="Not set: data.columns")
    max_rows: Steps | None = Field(None, description="So many of its first documents at most")
    repeats: float = Field(1.0, gt=0, le=1000, description="Times a row is seen in an epoch; 0.5: half of the rows are")
    weight: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="In proportion to those of the other sources, instead of repeats: none is repeated",
    )


def _as_list(value: Any) -> Any:
    """A source, or its path alone, as a list of one; the paths of a list as sources."""
    if value is None:
        return value
    return [{"path": one} if isinstance(one, str) else one for one in (value if isinstance(value, list) else [value])]


class _AnyForm:
    """Tells the JSON Schema of each form that `_as_list` takes, for editors."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        listed = handler(core)
        one = [{"type": "string"}, listed["items"]]
        return {"anyOf": [*one, {**listed, "items": {"anyOf": one}}]}


Sources = Annotated[list[Source], Field(min_length=1, max_length=100), BeforeValidator(_as_list), _AnyForm()]


class Data(Section):
    """What is learned from: the rows, how they become tokens, how tokens fill a sequence."""

    train: Sources = Field(description="Training rows: a source, or a list of them")
    eval: Sources | None = Field(None, description="Held-out rows, likewise")
    eval_fraction: Share = Field(0.0, description="Share of train held out by content hash when eval is not set")
    format: Format = Field("auto", description="How a row is read; auto detects it from the columns")
    columns: dict[Column, Text] = Field(
        {}, description='Maps other column names: {prompt: "{question}"}; weight: in the loss; label: good or bad'
    )
    trained_turns: Literal["all", "last"] = Field("all", description="Answers of a chat that are trained")
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="skip: leave up to 0.1% of the rows out, and write them to bad_rows.jsonl"
    )
    max_seq_len: int = Field(2048, ge=16, le=131_072, description="Tokens in a sequence; longer rows are cut, counted")
    streaming: bool = Field(
        False, description="Never read all rows: shuffle within blocks of some 10,000 documents; needs train.max_steps"
    )
    packing: bool = Field(True, description="Fill each sequence with several documents that cannot see each other")
    too_long: Literal["auto", "truncate_right", "truncate_left", "split", "drop", "error"] = Field(
        "auto", description="Rows past max_seq_len; auto: chats are cut at the right, documents split"
    )
    system: SystemPolicy = Field(
        "fold", description="A system message goes into the first user turn, is refused, or is left out"
    )

    @field_validator("eval", mode="after")
    @classmethod
    def _seen_once(cls, sources: list[Source] | None) -> list[Source] | None:
        if any(one.repeats != 1 or one.weight is not None for one in sources or ()):
            raise rule("held-out rows are scored once; take repeats and weight out", key="data.eval")
        return sources

    @field_validator("streaming")
    @classmethod
    def _held_out_apart(cls, streaming: bool, info: ValidationInfo) -> bool:
        if streaming and info.data.get("eval_fraction"):
            raise rule("cannot be held out of rows that are streamed; give data.eval", key="data.eval_fraction")
        return streaming

    @field_validator("train", mode="after")
    @classmethod
    def _one_kind_of_share(cls, train: list[Source]) -> list[Source]:
        weighed = [one for one in train if one.weight is not None]
        if weighed and len(weighed) < len(train):
            raise rule("some sources have a weight and some none; give each one, or none", key="data.train")
        if any(one.repeats != 1 for one in weighed):
            raise rule("a source has a weight and repeats; give one of them", key="data.train")
        return train


class Model(Section):
    """Which Gemma is tuned."""

    preset: Preset = Field(description="Shape of the model")
    weights: Location | None = Field(
        None, description="Folder or hub id; not set: the preset's own; random: fresh weights"
    )
    revision: Text | None = Field(None, description="Revision of the hub id")
    tokenizer: Location | None = Field(None, description="Folder or hub id; not set: the one beside the weights")
    added_tokens: list[Text] | None = Field(
        None, max_length=1000, description="New tokens: their text becomes a token, and their rows alone are trained"
    )
    attention: Literal["auto", "blockwise", "eager", "sdpa"] = Field(
        "auto", description="auto takes the fastest that is exact"
    )


class Quantize(Section):
    """How the frozen weights are stored; used by strategy qlora only."""

    kind: Literal["nf4", "int8"] = Field("nf4", description="4 or 8 bits for each weight of a linear layer")
    double_quant: bool = Field(True, description="nf4: store the block scales in 8 bits as well")


class Adapter(Section):
    """The low-rank weights that are trained; used by strategies lora and qlora.

    init offers what leaves the base untouched and starts at the base's own output: pissa and olora rewrite the base
    weights, and orthogonal is rounded away from zero in bf16 and breaks on 4-bit weights.
    """

    rank: int = Field(16, ge=1, le=1024, description="Inner width of the two low-rank factors")
    alpha: float = Field(32.0, gt=0, le=65_536, description="Scale: alpha / rank, or alpha / sqrt(rank) with rslora")
    dropout: Share = Field(0.0, description="Dropout in front of the adapter")
    targets: Literal["all-linear"] | list[Linear] = Field("all-linear", description="Linear layers that get an adapter")
    rslora: bool = Field(False, description="Rank-stabilised scale")
    dora: bool = Field(False, description="Train the magnitude of each weight row as well (DoRA)")
    init: Literal["default", "gaussian"] = Field("default", description="Initial factor A; factor B starts at zero")
    start: Location | None = Field(
        None, description="Run or adapter folder that training goes on from; rank, alpha and the rest are then its own"
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _known_form(cls, value: Any) -> Any:
        if value == "all-linear" or (isinstance(value, list) and value):
            return value
        raise rule("expected all-linear or a list such as [q_proj, v_proj], got {got}", got=value)


class Train(Section):
    """How it is learned. Accumulation is derived: global_batch_size / (micro_batch_size x devices)."""

    epochs: float = Field(1.0, gt=0, le=100_000, description="Passes over the training rows")
    max_steps: Steps | None = Field(None, description="Optimizer steps; wins over epochs")
    optimizer: Literal["adamw", "adamw8bit", "lion8bit"] = Field(
        "adamw",
        description="8bit: moments of large tensors in 8 bits; lion wants a third of the learning rate, or less",
    )
    learning_rate: float = Field(2e-4, gt=0, le=1, description="Peak learning rate")
    global_batch_size: Batch = Field(32, description="Sequences, or pairs, in an optimizer step, over all devices")
    micro_batch_size: Batch = Field(
        4, description="Sequences, or pairs, on one device at a time; changes memory, not the result"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Learning rate after warm-up")
    warmup_ratio: Share = Field(0.03, description="Share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0, le=1, description="Decoupled weight decay")
    max_grad_norm: float = Field(1.0, ge=0, le=1e6, description="Gradient clipping; 0: none")
    precision: Literal["bf16", "float32"] = Field("bf16", description="dtype of frozen weights and activations")
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto", description="Layers that recompute their activations in backward: as many as memory asks for, all, none"
    )

    @field_validator("precision", mode="before")
    @classmethod
    def _no_float16(cls, value: Any) -> Any:
        if value in ("float16", "fp16", "half"):
            raise rule("{got} overflows in Gemma, whose activations pass 65504; use bf16 or float32", got=value)
        return value

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _one_of_three(cls, value: Any) -> Any:
        if value == "auto" or isinstance(value, bool):
            return value
        raise rule("expected auto, true or false, got {got}", got=value)

    @field_validator("micro_batch_size")
    @classmethod
    def _whole_accumulation(cls, micro: int, info: ValidationInfo) -> int:
        total = info.data.get("global_batch_size")
        if total is None or total % micro == 0:
            return micro
        divisors = [d for d in range(1, total + 1) if total % d == 0]
        fits = sorted({max([d for d in divisors if d < micro]), min([d for d in divisors if d > micro], default=total)})
        multiples = sorted({max(micro, total // micro * micro), (total // micro + 1) * micro})
        raise rule(
            f"{total} is not a multiple of micro_batch_size {micro}; use micro_batch_size {' or '.join(map(str, fits))}"
            f", or global_batch_size {' or '.join(map(str, multiples))}",
            key="train.global_batch_size",
        )


class Eval(Section):
    """How the held-out rows are scored, before and after training and in between."""

    every_steps: Steps | None = Field(None, description="Not set: only before and after")
    overlap: Literal["error", "allow"] = Field("error", description="Held-out rows that are training rows too")
    max_rows: Steps | None = Field(200, description="Rows scored for the loss; null: all")
    generate_rows: Rows = Field(32, description="Rows answered by generation for exact match; 0: none")
    max_new_tokens: int = Field(256, ge=1, le=131_072, description="Longest generated answer")
    batch_size: Batch = Field(8, description="Rows scored at a time")
    samples: Rows = Field(3, description="Answers written to samples.jsonl at each evaluation; 0: none")
    canary: Location | None = Field(
        "data/canary.jsonl",
        description="General rows scored with and without the adapter, to see forgetting; null: none",
    )


class Checkpoint(Section):
    """What is kept for --resume."""

    every_steps: Steps | None = Field(None, description="Not set: only at the end")
    keep: int = Field(2, ge=1, le=1000, description="Newest checkpoints kept")
    keep_best: bool = Field(False, description="Also keep the one with the lowest held-out loss (eval.every_steps)")


class Logging(Section):
    """Where the figures go; metrics.jsonl is always written."""

    every_steps: Steps = Field(1, description="Steps between two lines of metrics.jsonl")
    wandb: Literal["disabled", "offline", "online"] = Field("disabled", description="Weights & Biases")
    project: Name = Field("gemma-ft", description="Weights & Biases project")
    run_name: Name | None = Field(None, description="Not set: the name of the output directory")
    tensorboard: bool = Field(False, description="Also write TensorBoard event files")


class Recipe(Section):
    """A run from data to tuned model. strategy decides which of adapter and quantize are used."""

    output_dir: Location = Field(description="Everything the run writes goes here")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="Data order, adapter start and dropout")
    strategy: Literal["full", "lora", "qlora"] = Field(
        description="full: all weights; lora: an adapter; qlora: an adapter over quantized weights"
    )
    objective: Objective = Field(
        SupervisedFineTuning(), description="What is minimized; kind decides on its other keys"
    )
    data: Data
    model: Model
    quantize: Quantize | None = Field(None, description="qlora only; not set: nf4")
    adapter: Adapter | None = Field(None, description="lora and qlora: required; full: ignored")
    train: Train = Train()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()

    @field_validator("train")
    @classmethod
    def _an_end(cls, train: Train, info: ValidationInfo) -> Train:
        data, objective = info.data.get("data"), info.data.get("objective")
        if data is not None and data.streaming and train.max_steps is None:
            raise rule("data.streaming: the rows are not counted, so that an epoch has no end; set train.max_steps",
                       key="train.max_steps")  # fmt: skip
        if data is not None and objective is not None and {"strategy", "adapter"} <= info.data.keys():
            adapter = info.data["adapter"]
            check_objective(objective, info.data["strategy"], adapter and adapter.start, data, train)
        return train

    @field_validator("checkpoint")
    @classmethod
    def _best_of_something(cls, checkpoint: Checkpoint, info: ValidationInfo) -> Checkpoint:
        scored = info.data.get("eval")
        if checkpoint.keep_best and scored is not None and scored.every_steps is None:
            raise rule(
                "needs a held-out loss on the way to be the best of; set eval.every_steps", key="checkpoint.keep_best"
            )
        return checkpoint

    @field_validator("adapter")
    @classmethod
    def _strategy_has_adapter(cls, adapter: Adapter | None, info: ValidationInfo) -> Adapter | None:
        strategy = info.data.get("strategy")
        if adapter is None and strategy in ("lora", "qlora"):
            raise rule(f"{strategy} needs an adapter block; add one, or set strategy: full", key="strategy")
        quantize = info.data.get("quantize")
        if adapter is not None and adapter.dora and strategy == "qlora" and quantize and quantize.kind == "int8":
            raise rule("magnitudes cannot be computed over int8 weights; set quantize: nf4, or dora: false",
                       key="adapter.dora")  # fmt: skip
        return adapter
