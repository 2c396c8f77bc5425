"""A recipe in TRL's words: steps and trainer settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from trl import SFTConfig

from gemma_ft.data.pack.examples import steps_per_epoch
from gemma_ft.recipe.batch_plan import BatchPlan
from gemma_ft.recipe.schema import Recipe
from gemma_ft.system import hardware
from gemma_ft.train.distributed import World
from gemma_ft.train.lr_schedule import Schedule
from gemma_ft.train.optimizers import OptimizerClass, optimizer_of


def total_steps(recipe: Recipe, examples: int) -> int:
    """Optimizer steps of a run over so many examples."""
    per_epoch = steps_per_epoch(examples, recipe.train.global_batch_size)
    return recipe.train.max_steps or math.ceil(recipe.train.epochs * per_epoch)


@dataclass(frozen=True)
class TrainerOptions:
    """What of a recipe is no setting of TRL's, or decided otherwise here."""

    schedule: Schedule = "constant"
    warmup_ratio: float = 0.0
    autocast: torch.dtype | None = None  # of full fine-tuning, whose weights are float32; a frozen base has its own
    keep_checkpoints: int = 1
    keep_best: bool = False
    optimizer: OptimizerClass | None = None  # and what it is made with; None: the one of `training_arguments`

    @classmethod
    def of(cls, recipe: Recipe) -> TrainerOptions:
        """Those of a recipe."""
        narrow = recipe.strategy == "full" and recipe.train.precision == "bf16"
        return cls(
            schedule=recipe.train.schedule,
            warmup_ratio=recipe.train.warmup_ratio,
            autocast=torch.bfloat16 if narrow else None,
            keep_checkpoints=recipe.checkpoint.keep,
            keep_best=recipe.checkpoint.keep_best,
            optimizer=optimizer_of(recipe.train),
        )


def training_arguments(
    recipe: Recipe, checkpoints: Path, total: int, batch: BatchPlan, world: World, *, evaluates: bool
) -> SFTConfig:
    """A recipe as TRL's settings; whatever a library would do on its own (reports, progress bars, datasets) is switched
    off.
    """
    train = recipe.train
    evals = recipe.eval.every_steps if evaluates else None
    return SFTConfig(
        output_dir=str(checkpoints),
        seed=recipe.seed,
        max_steps=total,
        per_device_train_batch_size=batch.micro_batch_size,
        per_device_eval_batch_size=recipe.eval.batch_size,
        gradient_accumulation_steps=1,  # a step of Trainer's is a whole one of ours, which accumulates (step.py)
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=False,
        gradient_checkpointing=False,  # Trainer knows all layers or none; train.checkpointing takes some
        logging_strategy="no",  # each step tells its own figures
        logging_nan_inf_filter=False,
        ddp_find_unused_parameters=False,  # every trained weight is used in every step
        ddp_broadcast_buffers=False,  # there are none
        save_only_model=world.layout == "fsdp2",  # Trainer refuses to resume what was cut beforehand; our saves do
        save_strategy="steps",
        save_steps=recipe.checkpoint.every_steps or total,
        eval_strategy="steps" if evals else "no",
        eval_steps=evals,
        prediction_loss_only=True,
        use_cache=True,  # Trainer writes it into the model's config, and the saved model would generate without a cache
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        packing=False,
        padding_free=False,
        max_length=None,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        use_cpu=hardware.default_device().type == "cpu",
    )
